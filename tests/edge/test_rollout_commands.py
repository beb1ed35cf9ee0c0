"""`fedspine rollout`: what it sends, where it goes on, what it prints, how it ends."""

import hashlib
import json

import pytest
from typer.testing import CliRunner

from fedspine_edge.cli_rollout import commands
from fedspine_edge.commands import operate, rollout
from fedspine_edge.errors import CheckpointError, UsageError, VerificationError

CONTENT = b"GGUF" + bytes(range(250)) * 4
SHA256 = hashlib.sha256(CONTENT).hexdigest()
DEVICE = {
    "device_id": "a", "canary": True, "state": "committed", "reason": "", "received_bytes": 0,
    "figures": {"ppl": 21.34, "tokens_per_second": 12.7}, "base": {"ppl": 20.0}, "reported_at": 1.0,
    "last_seen_seconds": 3.0,
}  # fmt: skip
ROLLOUT = {
    "rollout_id": 7, "status": "finished", "detail": "", "gate": "ppl<=30", "own_passage": False, "canaries": ["a"],
    "model": {"name": "m.gguf", "num_bytes": len(CONTENT), "sha256": SHA256}, "counts": {"committed": 1},
    "devices": [DEVICE], "for_devices": None, "created_at": 1.0,
}  # fmt: skip
MODELS = [
    {"name": "m.gguf", "sha256": SHA256, "num_bytes": 1 << 20},
    {"name": "x.gguf", "sha256": "f" * 64, "num_bytes": 9},
]


class Server:
    """An operator's calls, answered here."""

    def __init__(self, chunks=0, complete=False, rollouts=(ROLLOUT,)):
        self.sent, self.posted, self.rollouts = [], [], list(rollouts)
        self._upload = {"complete": complete, "num_chunks": chunks, "chunk_bytes": 100}

    def get(self, path):
        if path.endswith("/upload"):
            return self._upload
        if path == "models":
            return MODELS
        if path == "rollouts":
            return self.rollouts
        return self.rollouts.pop(0) if len(self.rollouts) > 1 else self.rollouts[0]

    def put(self, path, content):
        self.sent.append((path, content))

    def post(self, path, body=None):
        self.posted.append((path, body))
        return MODELS[0] if path.startswith("models/") else self.rollouts[0]


@pytest.fixture
def file(tmp_path):
    (tmp_path / "my model!.gguf").write_bytes(CONTENT)
    return tmp_path / "my model!.gguf"


def test_a_model_is_sent_in_chunks_from_where_it_broke_off_and_not_again_once_it_is_there(file):
    server, told = Server(chunks=3), []
    rollout.upload(server, file, told.append)
    assert [path for path, _ in server.sent] == [f"models/{SHA256}/upload/{index}" for index in range(3, 11)]
    assert b"".join(content for _, content in server.sent) == CONTENT[300:]
    assert told[-1] == "my model!.gguf: 100%"
    assert server.posted == [(f"models/{SHA256}", {"name": "my-model-.gguf", "num_bytes": len(CONTENT)})]
    server = Server(complete=True)
    rollout.upload(server, file, told.append)
    assert server.sent == []
    with pytest.raises(CheckpointError, match="cannot read"):
        rollout.upload(server, file.parent, told.append)


def test_a_model_is_a_file_here_or_one_of_the_servers_by_name_or_hash(file):
    assert rollout.model_of(Server(), str(file), print)["sha256"] == SHA256
    assert rollout.model_of(Server(), "x.gguf", print)["sha256"] == "f" * 64
    assert rollout.model_of(Server(), SHA256[:8], print)["sha256"] == SHA256
    for wanted in ("y.gguf", "ffff", ""):
        with pytest.raises(UsageError, match="expected a GGUF file or one model of the server, found none"):
            rollout.model_of(Server(), wanted, print)


def test_a_gate_that_is_none_is_refused_before_anything_is_sent(file):
    server = Server()
    with pytest.raises(UsageError, match="expected a condition"):
        rollout.start(server, str(file), {"gate": "ppl"}, print)
    assert (server.sent, server.posted) == ([], [])


def test_a_table_shows_each_device_with_its_figures_beside_those_before():
    text = rollout.text({**ROLLOUT, "detail": "canary b failed", "own_passage": True})
    for words in ("rollout 7  finished  1 committed", "gate      ppl<=30, on your text", "why       canary b failed"):
        assert words in text
    assert text.splitlines()[-1].split() == ["a", "canary", "committed", "3", "s", "ago", "21.34", "20", "12.7", "-"]
    away = {**ROLLOUT, "status": "awaiting", "detail": "finished but for 1 that is away: b"}
    assert rollout.text(away).splitlines()[0] == "rollout 7  finished but for 1 that is away: b  1 committed"
    assert "why" not in rollout.text(away)
    on_its_way = {**DEVICE, "state": "downloading", "received_bytes": len(CONTENT) // 2, "figures": None, "base": None}
    assert "downloading 50%" in rollout.text({**ROLLOUT, "devices": [on_its_way], "gate": ""})


def test_waiting_shows_each_change_and_ends_with_3_unless_every_device_has_it(monkeypatch):
    monkeypatch.setattr(rollout, "LOOK_SECONDS", 0.0)
    going, seen = {**ROLLOUT, "status": "canary", "counts": {"waiting": 1}}, []
    assert rollout.wait(Server(rollouts=[going, going, ROLLOUT]), 7, seen.append) == ROLLOUT
    assert [found["status"] for found in seen] == ["canary", "finished"]
    for last, words in (
        ({"status": "stopped", "detail": "canary a failed"}, "rollout 7 is stopped: canary a"),
        ({"status": "awaiting", "detail": "finished but for b"}, "rollout 7 is awaiting: finished but for b"),
        ({"counts": {"committed": 1, "failed": 1}}, "rollout 7 is finished: 1 committed, 1 failed"),
    ):
        with pytest.raises(VerificationError, match=words):
            rollout.wait(Server(rollouts=[{**ROLLOUT, **last}]), 7, seen.append)
    assert VerificationError.exit_code == 3
    with pytest.raises(UsageError, match="there was no rollout yet"):
        rollout.newest(Server(rollouts=[]))


def test_a_text_is_read_whole_and_one_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "own.txt").write_text("Où est-ce?", encoding="utf-8")
    assert rollout.read_passage(tmp_path / "own.txt") == "Où est-ce?"
    for content in (b"", b" \n", b"\xff", b"x" * 40_000):
        (tmp_path / "own.txt").write_bytes(content)
        with pytest.raises(UsageError, match="expected a"):
            rollout.read_passage(tmp_path / "own.txt")


@pytest.mark.parametrize(
    ("words", "asked"),
    [([], {"num_canaries": 1}), (["--canary", "3"], {"num_canaries": 3}),
     (["--canary", "a", "--canary", "b"], {"canaries": ["a", "b"]}), (["--device", "a"], {"devices": ["a"]}),
     (["--replace", "--gate", "ppl<3"], {"replace": True, "gate": "ppl<3"})],
)  # fmt: skip
def test_the_commands_ask_what_their_words_say_and_print_one_document(monkeypatch, words, asked):
    server = Server()
    monkeypatch.setattr(operate, "Operator", lambda file: server)
    found = CliRunner().invoke(commands, ["rollout", "start", "--model", "m.gguf", "--json", *words])
    assert json.loads(found.stdout) == ROLLOUT
    path, body = server.posted[-1]
    assert path == "rollouts"
    assert asked.items() <= body.items()
    assert body["model_sha256"] == SHA256
    for more in (["status"], ["status", "7"], ["rollback"], ["models"], ["models", "--forget", "x.gguf"]):
        assert CliRunner().invoke(commands, ["rollout", *more, "--json"]).exit_code == 0
    assert ("rollouts/7/rollback", None) in server.posted
    assert (f"models/{'f' * 64}/forget", None) in server.posted
