"""The agent on a Unix socket, with a worker that only pretends: what it takes, what it refuses, what it remembers."""

import hashlib
import io
import socket
import threading
import time

import pytest

from fedspine_edge.agent import local
from fedspine_edge.agent.local_call import call, receive, send
from fedspine_edge.agent.settings import AgentSettings
from fedspine_edge.atomic import write_bytes
from fedspine_edge.errors import LinkError, UsageError

BASE = "ba" * 32


class PretendedWorker:
    """Answers at once; counts how often it was asked."""

    asked = 0
    fails = None
    hangs = False

    def __init__(self, settings):
        self.pid = 1
        self.answers = []

    def start(self):
        self.answers.append({"kind": "ready", "base_sha256": BASE, "num_examples": 7})

    def ask(self, kind, *, task=None, update=None, **_):
        if kind == "cancel":
            self.answers = [{"kind": "failed", "reason": "cancelled"}]
        elif self.hangs:
            self.answers = [{"kind": "step"}]
        else:
            self.work(task, update)

    def work(self, task, update):
        type(self).asked += 1
        content = f"update of {task['task_id']}".encode()
        write_bytes(local.Path(update), content)
        done = {"kind": "done", "sha256": hashlib.sha256(content).hexdigest(), "num_bytes": len(content)}
        self.answers = [{"kind": "step"}, {"kind": "failed", "reason": self.fails} if self.fails else done]

    def answer(self, seconds):
        return self.answers.pop(0) if self.answers else None

    def stop(self):
        pass


@pytest.fixture
def agent(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "WorkerProcess", PretendedWorker)
    PretendedWorker.asked, PretendedWorker.fails, PretendedWorker.hangs = 0, None, False
    settings = AgentSettings("model", "data", memory_bytes=1 << 30, min_memory_bytes=0, min_disk_bytes=0)
    with local.LocalAgent(tmp_path, "board-1", settings) as agent:
        threading.Thread(target=agent.serve, daemon=True).start()
        yield agent


def task(content, **changes):
    sha256 = hashlib.sha256(content).hexdigest()
    return {
        "task_id": sha256[:32], "run_id": "run", "device_id": "board-1", "base_sha256": BASE, "attempt": 0,
        "round_index": 0, "rank": 2, "num_steps": 3, "min_steps": 1, "seed": 4, "chunk_bytes": 1,
        "max_update_bytes": 1 << 20, "pruning_ratio": 0.0, "lease_seconds": 60.0,
        "recipe": {"classes": ["a", "b"], "prompt": None},
        "blob": {"sha256": sha256, "num_bytes": len(content), "message_bytes": len(content)}, **changes,
    }  # fmt: skip


def ask(agent, content, **changes):
    return call(agent.path, {"kind": "tune", "task": task(content, **changes)}, content)


def test_it_says_what_the_device_has(agent):
    found, content = call(agent.path, {"kind": "inventory"})
    said = found["inventory"]
    assert (said["device_id"], said["base_sha256"], said["num_examples"]) == ("board-1", BASE, 7)
    assert said["memory_bytes"] == 1 << 30
    assert content == b""
    assert agent.path.stat().st_mode & 0o777 == 0o600


def test_a_task_is_done_once_however_often_it_is_asked(agent):
    first = ask(agent, b"message")
    assert first[1] == b"update of " + task(b"message")["task_id"].encode()
    assert ask(agent, b"message")[1] == first[1]
    assert PretendedWorker.asked == 1
    assert ask(agent, b"another")[1] != first[1]
    assert PretendedWorker.asked == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device_id": "board-2"}, "expected a task for board-1"),
        ({"base_sha256": "cc" * 32}, "expected base model cccccccccccc"),
        ({"blob": {"sha256": "dd" * 32, "num_bytes": 7, "message_bytes": 7}}, "expected a message dddddddddddd"),
        ({"run_id": "../../etc"}, "expected run_id as"),
        ({"rank": 0}, "at least 1"),
    ],
)
def test_what_is_not_this_devices_task_is_refused_with_the_reason(agent, changes, reason):
    found, content = ask(agent, b"message", **changes)
    assert reason in found["failure"]
    assert content == b""
    assert PretendedWorker.asked == 0


def test_a_failed_task_says_why_and_is_tried_anew_when_asked_again(agent):
    PretendedWorker.fails = "killed, most likely for want of memory"
    assert "want of memory" in ask(agent, b"message")[0]["failure"]
    PretendedWorker.fails = None
    assert ask(agent, b"message")[1]


def test_work_for_which_nobody_waits_any_more_is_given_up(agent):
    PretendedWorker.hangs = True
    assert ask(agent, b"message", lease_seconds=0.05)[0]["failure"] == "cancelled"
    PretendedWorker.hangs = False
    assert ask(agent, b"another")[1]


def test_a_caller_that_goes_away_harms_nobody(agent):
    with socket.socket(socket.AF_UNIX) as gone:
        gone.connect(str(agent.path))
        gone.sendall(b'{"kind": "tune", "num_bytes": 100}\nshort')
    time.sleep(0.05)
    assert call(agent.path, {"kind": "inventory"})[0]["inventory"]


def test_a_second_agent_at_the_same_socket_is_refused(agent, tmp_path):
    with pytest.raises(UsageError, match="expected no other agent"):
        local.LocalAgent(tmp_path, "board-1", AgentSettings("model", "data"))


def test_without_an_agent_the_caller_is_told_how_to_start_it(tmp_path):
    with pytest.raises(LinkError, match="expected this device's agent") as caught:
        call(tmp_path / "none.sock", {"kind": "inventory"})
    assert "fedspine flower device" in caught.value.hint


@pytest.mark.parametrize(
    "sent", [b"", b"no header", b'{"num_bytes": -1}\n', b'{"num_bytes": 9e99}\n', b'{"num_bytes": 5}\nabc']
)
def test_a_message_that_is_not_whole_is_refused(sent):
    with pytest.raises(ValueError, match="expected"):
        receive(io.BytesIO(sent))


def test_what_is_sent_is_received():
    stream = io.BytesIO()
    send(stream, {"kind": "inventory"}, b"\x00\n\xff")
    stream.seek(0)
    assert receive(stream) == ({"kind": "inventory"}, b"\x00\n\xff")
