"""A rollout on the device: the pure function under power cuts anywhere, its files, what is measured and told."""

import contextlib
import dataclasses
import hashlib
import os
import signal
import struct
import sys
import time

import pytest
from export_models import DENSE, PER_LAYER, save_decoder
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspine_edge.agent import health_process, rollout_work
from fedspine_edge.agent.gguf_file import check_gguf
from fedspine_edge.agent.health_process import check_health
from fedspine_edge.agent.link import NotTakenError, UnreachableError
from fedspine_edge.agent.models import Models
from fedspine_edge.agent.rollout import (
    CHECKING,
    COMMITTED,
    COMMITTING,
    DOWNLOADING,
    FINAL,
    INSTALL,
    INSTALLED,
    MOST_TRIES,
    RESTORE,
    RETURNING,
    ROLLED_BACK,
    Action,
    Order,
    Record,
    begun,
    failed,
    next_action,
    unfinished,
)
from fedspine_edge.agent.rollout_work import RolloutWork
from fedspine_edge.agent.settings import AgentSettings
from fedspine_edge.agent.tasks import checked_order
from fedspine_edge.errors import CheckpointError, IncompatibleError
from fedspine_edge.export.gguf import write_gguf
from fedspine_edge.rollout_gate import parse

HEALTH = "fedspine_edge.agent.health"


class PowerCutError(Exception):
    """The board is without power."""


class Board:
    """A device in a few variables: what is on its disk, and a plug that is pulled after so many writes."""

    def __init__(self, bad):
        self.bad, self.record, self.current, self.installed, self.writes_left = bad, Record(), None, set(), None
        self.checked, self.served = set(), [None]

    def write(self, change):
        if self.writes_left is not None:
            self.writes_left -= 1
            if self.writes_left < 0:
                raise PowerCutError
        change()

    def keep(self, record):
        self.write(lambda: setattr(self, "record", record))

    def serve(self, model):
        def change():
            self.current = model
            self.served.append(model)

        self.write(change)

    def remove(self, kept):
        self.write(lambda: self.installed.intersection_update(kept))

    def do(self, action, order):
        moved = {
            Action.GIVE_UP: lambda record: failed(record, "worn out"),
            Action.TAKE_BACK: lambda record: dataclasses.replace(record, phase=RETURNING),
            Action.LEAVE: lambda record: dataclasses.replace(record, phase=ROLLED_BACK),
        }
        done = (
            moved[action](self.record)
            if action in moved
            else getattr(self, action.value.replace("return", "back"))(order, self.record)
        )
        self.keep(done)

    def begin(self, order, record):
        self.remove({self.current, order.sha256})
        return begun(order, self.current)

    def download(self, order, record):
        self.write(lambda: self.installed.add(order.sha256))
        return dataclasses.replace(record, phase=INSTALLED)

    def check(self, order, record):
        self.keep(dataclasses.replace(record, phase=CHECKING, tries=record.tries + 1))
        self.write(lambda: None)  # the check itself
        if order.sha256 in self.bad:
            return failed(self.record, "bad")
        self.checked.add(order.sha256)
        return dataclasses.replace(self.record, phase=COMMITTING)

    def switch(self, order, record):
        self.serve(record.sha256)
        return dataclasses.replace(record, phase=COMMITTED)

    def back(self, order, record):
        self.serve(record.before)
        return dataclasses.replace(record, phase=ROLLED_BACK)

    def tell(self, order, record):
        self.remove({self.current, record.before if record.phase == COMMITTED else None})
        return dataclasses.replace(record, told=record.phase)

    def follow(self, order):
        for _ in range(40):
            action = next_action(order, self.record)
            if action is Action.REST:
                return
            self.do(action, order)
        raise AssertionError(f"it does not end: {self.record}")

    def assert_sound(self):
        assert self.current is None or self.current in self.installed, "what programs load is not there"
        assert set(self.served) - {None} <= self.checked, "a model was served that no check had passed"


ORDERS = st.lists(
    st.tuples(st.sampled_from("abc"), st.booleans(), st.lists(st.integers(0, 9), max_size=4)), min_size=1, max_size=5
)


@settings(max_examples=300, deadline=None)
@given(orders=ORDERS, bad=st.sets(st.sampled_from("abc"), max_size=2))
def test_whatever_is_asked_and_wherever_the_power_fails_a_checked_model_or_none_is_served(orders, bad):
    board = Board(bad)
    for number, (model, taken_back, cuts) in enumerate(orders, 1):
        before = board.current
        for kind in (INSTALL, RESTORE) if taken_back else (INSTALL,):
            order = Order(number, kind, model, 10, "m.gguf")
            for writes in [*cuts, None]:
                board.writes_left = writes
                try:
                    board.follow(order)
                except PowerCutError:
                    board.assert_sound()
            board.assert_sound()
            worn = board.record.tries >= MOST_TRIES
            if kind == INSTALL:
                assert board.record.phase == COMMITTED or model in bad or worn
                assert board.current == (model if board.record.phase == COMMITTED else before)
            else:
                assert (board.record.phase, board.current) == (ROLLED_BACK, before)
            assert board.record.done == f"{number}:{kind}"
            assert unfinished(board.record) is Action.REST


@settings(max_examples=200, deadline=None)
@given(
    record=st.builds(
        Record,
        rollout_id=st.integers(0, 3), phase=st.sampled_from([DOWNLOADING, INSTALLED, CHECKING, COMMITTING, *FINAL]),
        sha256=st.sampled_from("ab"), before=st.sampled_from(["c", None]), tries=st.integers(0, 4),
        told=st.sampled_from(["", *FINAL]),
    ),
    kind=st.sampled_from([INSTALL, RESTORE]),
)  # fmt: skip
def test_from_any_record_every_order_ends(record, kind):
    board = Board(set())
    board.record, board.installed = record, {"a", "b", "c"}
    board.follow(Order(3, kind, "a", 10, "m.gguf"))
    assert board.record.phase in FINAL
    assert board.record.done == f"3:{kind}"


def test_a_check_that_takes_the_board_down_each_time_is_given_up():
    record = Record(1, "checking", "a", tries=MOST_TRIES)
    assert next_action(Order(1, INSTALL, "a", 10, "m"), record) is Action.GIVE_UP
    assert next_action(Order(1, INSTALL, "a", 10, "m"), dataclasses.replace(record, tries=2)) is Action.CHECK


def test_going_back_without_a_record_says_that_it_cannot_know():
    assert "is lost" in begun(Order(1, RESTORE, "a", 10, "m"), "a").reason
    assert begun(Order(1, RESTORE, "a", 10, "m"), "b").reason == ""


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory):
    """A dense and a really pruned tiny decoder."""
    folder = tmp_path_factory.mktemp("ggufs")
    return {
        name: write_gguf(
            save_decoder(folder / name, "llama", widths), folder / f"{name}.gguf", quantization="F16", name=name
        ).path
        for name, widths in (("dense", DENSE), ("pruned", PER_LAYER))
    }


def test_a_whole_gguf_passes_and_every_shorter_one_is_refused(ggufs, tmp_path):
    content = ggufs["pruned"].read_bytes()
    assert check_gguf(ggufs["pruned"]) > 20
    for length in [*range(0, 4000, 61), len(content) // 2, len(content) - 1]:
        (tmp_path / "cut.gguf").write_bytes(content[:length])
        with pytest.raises(IncompatibleError, match="expected"):
            check_gguf(tmp_path / "cut.gguf")


@pytest.mark.parametrize(
    "head",
    [
        b"GGML" + bytes(40),
        b"GGUF" + struct.pack("<IQQ", 9, 1, 1),
        b"GGUF" + struct.pack("<IQQ", 3, 1 << 62, 1),
        b"GGUF" + struct.pack("<IQQ", 3, 1, 1 << 62),
        b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 1 << 62),
        b"GGUF" + struct.pack("<IQQQ1sIQ", 3, 1, 1, 1, b"a", 8, 1 << 62),
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 1, 1, 1, b"a", 9, 8, 1 << 20),
        b"GGUF" + struct.pack("<IQQQ1sIIQIQ", 3, 1, 1, 1, b"a", 9, 9, 1, 9, 1) + bytes(64),
        b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 1, 1, b"a", 77),
        b"GGUF" + struct.pack("<IQQQ17sII", 3, 1, 1, 17, b"general.alignment", 4, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 0),
    ],
)  # fmt: skip
def test_a_head_that_lies_is_refused_before_anything_is_read_by_it(head, tmp_path):
    (tmp_path / "m.gguf").write_bytes(head)
    with pytest.raises(IncompatibleError, match="expected"):
        check_gguf(tmp_path / "m.gguf")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_head_with_any_bytes_changed_is_judged_and_never_more(ggufs, data):
    content = bytearray(ggufs["pruned"].read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, 6000))] = data.draw(st.integers(0, 255))
    file = ggufs["pruned"].with_name("changed.gguf")
    file.write_bytes(content)
    with contextlib.suppress(IncompatibleError):
        assert check_gguf(file) > 0


def put(models, content):
    sha256 = hashlib.sha256(content).hexdigest()
    models.keep_record(Record())
    models.staged(sha256).write_bytes(content)
    models.install(sha256)
    return sha256


def test_models_lie_under_their_hash_and_one_name_changes_by_a_rename(tmp_path):
    models = Models(tmp_path)
    assert (models.current(), models.record()) == (None, Record())
    one, two = put(models, b"one"), put(models, b"two")
    models.switch(one)
    assert (tmp_path / "models" / "current" / "model.gguf").read_bytes() == b"one"
    models.switch(two)
    models.switch(two)
    assert (tmp_path / "models" / "current" / "model.gguf").read_bytes() == b"two"
    models.install(two)  # after a power cut: there is nothing staged any more
    models.staged("x.partial").write_bytes(b"")
    models.keep_only(two)
    assert sorted(entry.name for entry in (tmp_path / "models").iterdir()) == sorted(
        [two, "current", "rollout.json", "staging"]
    )
    assert list((tmp_path / "models" / "staging").iterdir()) == []
    models.switch(None)
    models.switch(None)
    assert models.current() is None


def test_a_record_comes_back_and_a_damaged_or_strange_one_counts_as_none(tmp_path):
    models, record = Models(tmp_path), Record(3, COMMITTED, "a", "b", 1, {"ppl": 2.0}, None, "", COMMITTED)
    assert models.keep_record(record) == record == models.record()
    models.keep_record(dataclasses.replace(record, phase="of a newer version"))
    assert models.record() == Record()
    (tmp_path / "models" / "rollout.json").write_text("{}")
    assert models.record() == Record()


def test_a_disk_that_takes_no_link_is_said(tmp_path, monkeypatch):
    models = Models(tmp_path)
    put(models, b"one")
    monkeypatch.setattr("pathlib.Path.symlink_to", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(CheckpointError, match=r"cannot write .*current: No space left"):
        models.switch("a")


# --- measured --------------------------------------------------------------------------------------------------------


def test_a_pruned_model_is_measured_beside_the_one_before_and_the_agent_beats_meanwhile(ggufs):
    beats = []
    found = check_health(ggufs["pruned"], ggufs["dense"], num_threads=1, beat=lambda: beats.append(1))
    assert set(found) == {"figures", "base"}
    for figures in found.values():
        assert 1 < figures["ppl"] < 1e6
        assert min(figures["tokens_per_second"], figures["prompt_tokens_per_second"]) > 0
        assert figures["peak_memory_bytes"] > 1 << 20
    assert found["figures"]["ppl"] != found["base"]["ppl"]
    assert beats


def test_a_model_cut_short_and_a_check_that_is_killed_or_never_ends_are_failures_with_a_reason(
    ggufs, tmp_path, monkeypatch
):
    python = sys.executable
    (tmp_path / "cut.gguf").write_bytes(ggufs["dense"].read_bytes()[:50_000])
    found = check_health(tmp_path / "cut.gguf", None, num_threads=1, beat=lambda: None)
    assert "it was cut short" in found["failure"]
    for code, words in (
        (f"import os; os.kill(os.getpid(), {signal.SIGKILL})", "was killed, most likely for want of memory"),
        ("raise SystemExit(9)", "ended with 9"),
        ("print('{')", "said nothing that can be read"),
        ("import time; time.sleep(60)", "did not end within 1 s"),
    ):
        program = tmp_path / "python"
        program.write_text(f'#!/bin/sh\nexec {python} -c "{code}"\n')
        program.chmod(0o755)
        monkeypatch.setattr(health_process.sys, "executable", str(program))
        assert words in check_health(tmp_path, None, num_threads=1, beat=lambda: None, seconds=1.0)["failure"]


def test_perplexity_is_measured_on_the_text_that_was_given(ggufs, tmp_path):
    (tmp_path / "own.txt").write_text("How far is it from Denver to Aspen? " * 9, encoding="utf-8")
    own, built_in = (
        check_health(ggufs["pruned"], None, num_threads=1, beat=lambda: None, passage=passage)["figures"]["ppl"]
        for passage in (tmp_path / "own.txt", None)
    )
    assert own != built_in
    (tmp_path / "own.txt").write_text("?", encoding="utf-8")  # one token: nothing to predict
    said = check_health(ggufs["pruned"], None, num_threads=1, beat=lambda: None, passage=tmp_path / "own.txt")
    assert said["figures"]["ppl"] is None


def test_a_model_before_that_cannot_be_measured_is_no_base(ggufs, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    found = check_health(ggufs["pruned"], tmp_path / "model.gguf", num_threads=1, beat=lambda: None)
    assert found["base"] is None
    assert found["figures"]["ppl"] > 1


# --- done ------------------------------------------------------------------------------------------------------------


class Server:
    """What the device hears of the server."""

    def __init__(self, blobs=()):
        self.blobs = {hashlib.sha256(content).hexdigest(): content for content in blobs}
        self.told, self.go_on, self.away = [], True, False

    def rollout(self, rollout_id, report):
        if self.away:
            raise UnreachableError("away")
        self.told.append((rollout_id, report["state"], report["reason"]))
        return {"go_on": self.go_on, "detail": "superseded"}

    def download(self, sha256, num_bytes, path, on_part):
        if sha256 not in self.blobs:
            raise NotTakenError("expected a blob of this device's rollout")
        path.write_bytes(self.blobs[sha256])
        on_part(num_bytes)


class Plenty:
    def disk_free_bytes(self):
        return 1 << 40


@pytest.fixture
def device(tmp_path, monkeypatch):
    """A device whose checks give what the test says."""
    server, said = Server([b"one", b"two"]), {"figures": {"ppl": 10.0, "tokens_per_second": 9.0}, "base": None}
    monkeypatch.setattr(rollout_work, "check_health", lambda model, base, **_: dict(said))
    models = Models(tmp_path)

    def started():
        return RolloutWork(models, server, Plenty(), AgentSettings("", ""), lambda: None)

    return started, models, server, said


def asked(number, content=b"one", kind=INSTALL, gate="", **model):
    sha256 = hashlib.sha256(content).hexdigest()
    gate = [dataclasses.asdict(condition) for condition in parse(gate)]
    model = {"sha256": sha256, "num_bytes": len(content), "name": "m.gguf", **model}
    return {"rollout_id": number, "kind": kind, "model": model, "gate": gate}


def test_a_device_tells_each_step_and_commits_what_meets_the_gate(device):
    started, models, server, _ = device
    work = started()
    assert work.done == "none"
    work.follow(asked(1, gate="ppl<=10"), 10.0)
    assert [state for _, state, _ in server.told] == ["downloading", "installed", "checking", "committed"]
    assert (models.current(), work.done, started().done) == (
        hashlib.sha256(b"one").hexdigest(),
        "1:install",
        "1:install",
    )


def test_a_model_that_does_not_meet_the_gate_is_gone_and_the_one_before_stays(device):
    started, models, server, said = device
    started().follow(asked(1), 10.0)
    said["base"] = {"ppl": 9.0, "tokens_per_second": 9.0}
    work = started()
    work.follow(asked(2, b"two", gate="ppl<=1.05*base"), 10.0)
    assert server.told[-1] == (2, "failed", "ppl<=1.05*base: 10, limit 9.45")
    assert models.current() == hashlib.sha256(b"one").hexdigest()
    assert not models.path(hashlib.sha256(b"two").hexdigest()).exists()
    assert work.done == "2:install"


def test_a_device_goes_back_to_the_model_before_and_with_none_before_to_none(device):
    started, models, server, _ = device
    one, two = (hashlib.sha256(content).hexdigest() for content in (b"one", b"two"))
    work = started()
    work.follow(asked(1), 10.0)
    work.follow(asked(2, b"two"), 10.0)
    assert models.path(one).exists(), "kept, for it may be wanted back"
    work.follow(asked(2, b"two", RESTORE), 10.0)
    assert (models.current(), work.done) == (one, "2:restore")
    assert not models.path(two).exists()
    work.follow(asked(3, b"two"), 10.0)
    work.follow(asked(4, b"two", RESTORE), 10.0)  # of a rollout it never heard of
    assert server.told[-1][2] == "the record of the model before is lost: roll out the one that is wanted"
    fresh = Models(models.folder.parent / "fresh")
    work = RolloutWork(fresh, server, Plenty(), AgentSettings("", ""), lambda: None)
    work.follow(asked(1), 10.0)
    work.follow(asked(1, kind=RESTORE), 10.0)
    assert fresh.current() is None


def test_a_text_that_came_with_the_order_is_kept_for_the_check_and_gone_after_it(device, monkeypatch):
    started, models, _, said = device
    seen = []

    def check(model, base, *, passage, **_):
        seen.append(passage and passage.read_text(encoding="utf-8"))
        return said

    monkeypatch.setattr(rollout_work, "check_health", check)
    work = started()
    work.follow({**asked(1), "passage": "Où est-ce?"}, 10.0)
    work.follow(asked(2, b"two"), 10.0)
    assert seen == ["Où est-ce?", None]
    assert list((models.folder / "staging").iterdir()) == []


def test_a_long_check_keeps_in_touch_and_ends_when_the_rollout_is_taken_back(device, monkeypatch):
    started, models, server, said = device

    def check(model, base, *, beat, **_):
        for _ in range(3):
            beat()
        server.go_on = False
        beat()
        return said

    monkeypatch.setattr(rollout_work, "check_health", check)
    started().follow(asked(1), 0.0)
    assert [state for _, state, _ in server.told].count("checking") == 5
    assert (models.record().phase, models.current()) == ("checking", None)


def test_a_server_that_is_away_stops_nothing_but_hears_the_end(device):
    started, models, server, _ = device
    server.away = True
    work = started()
    with pytest.raises(UnreachableError):
        work.follow(asked(1), 10.0)
    assert models.current() == hashlib.sha256(b"one").hexdigest()
    assert work.done == "none"
    work = started()
    with pytest.raises(UnreachableError):
        work.catch_up()
    server.away = False
    work.catch_up()
    work.catch_up()
    assert (server.told, work.done) == ([(1, "committed", "")], "1:install")


def test_what_the_server_no_longer_wants_is_left_where_it_stands(device):
    started, models, server, _ = device
    server.go_on = False
    work = started()
    work.follow(asked(1), 10.0)
    assert (models.record().phase, models.current(), work.done) == ("downloading", None, "none")
    server.go_on = True
    work.follow(asked(2, b"two"), 10.0)
    assert models.current() == hashlib.sha256(b"two").hexdigest()


def test_no_disk_no_blob_and_a_failed_check_are_told_with_their_reason(device, tmp_path):
    started, models, server, said = device
    work = RolloutWork(models, server, Plenty(), AgentSettings("", "", min_disk_bytes=2 << 40), lambda: None)
    work.follow(asked(1), 10.0)
    assert "bytes free on disk, found" in server.told[-1][2]
    work = started()
    work.follow(asked(2, b"three"), 10.0)
    assert "expected a blob" in server.told[-1][2]
    said.clear()
    said["failure"] = "the health check\nwas killed"
    work.follow(asked(3), 10.0)
    assert server.told[-1] == (3, "failed", "the health check was killed")
    assert models.current() is None


def test_a_record_that_cannot_be_kept_is_tried_again_later(device, monkeypatch):
    started, _, _, _ = device
    work = started()

    def full(*_):
        raise CheckpointError("cannot write rollout.json: No space left on device")

    monkeypatch.setattr("fedspine_edge.agent.models.write_document", full)
    with pytest.raises(UnreachableError, match="rollout stands: cannot write"):
        work.follow(asked(1), 10.0)


@pytest.mark.parametrize(
    "change",
    [{"kind": "run"}, {"rollout_id": -1}, {"passage": 1}, {"passage": "x" * 70_000},
     {"gate": [{"a": 1}]}, {"model": None},
     {"model": {"sha256": "../x", "num_bytes": 1, "name": "m"}},
     {"model": {"sha256": "0" * 64, "num_bytes": 1 << 50, "name": "m"}},
     {"model": {"sha256": "0" * 64, "num_bytes": 1, "name": "a/b"}}],
)  # fmt: skip
def test_an_order_with_a_field_that_is_not_what_it_must_be_is_not_followed(device, change):
    started, models, _, _ = device
    with pytest.raises(IncompatibleError, match="expected"):
        checked_order({**asked(1), **change})
    with pytest.raises(UnreachableError, match="do not understand each other"):
        started().follow({**asked(1), **change}, 10.0)
    assert models.record() == Record()


def test_a_health_check_ends_with_its_agent(ggufs, tmp_path):
    """The agent's death closes the check's stdin."""
    read, write = os.pipe()
    pid = os.spawnv(
        os.P_NOWAIT, "/bin/sh",
        ["sh", "-c", f"exec {sys.executable} -m {HEALTH} 1 '' {tmp_path / 'fifo'} <&{read} {write}<&-"],
    )  # fmt: skip
    os.mkfifo(tmp_path / "fifo")  # whoever opens it waits for ever
    os.close(read)
    os.close(write)
    limit = time.monotonic() + 20
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        assert time.monotonic() < limit, "it waits for ever"
        time.sleep(0.05)
