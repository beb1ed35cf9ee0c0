"""The agent by itself: what it keeps, what it refuses, what it reports, and how little it is while it waits."""

import base64
import hashlib
import itertools
import json
import re
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from boards import plant

from fedspine_edge.agent import guards
from fedspine_edge.agent.__main__ import Stop
from fedspine_edge.agent.identity import Identity, IdentityError, fingerprint, load_identity, save_identity, split_token
from fedspine_edge.agent.journal import Journal
from fedspine_edge.agent.link import DismissedError, UnreachableError
from fedspine_edge.agent.loop import LONGEST_BACKOFF_SECONDS, Agent
from fedspine_edge.agent.running_release import running_release
from fedspine_edge.agent.senses import Senses
from fedspine_edge.agent.settings import AgentSettings, load_settings, save_settings
from fedspine_edge.agent.tasks import checked_task, inline_message
from fedspine_edge.agent.worker_process import WorkerProcess
from fedspine_edge.errors import CheckpointError, IncompatibleError, LinkError, UsageError
from fedspine_edge.images.root_tree import add_facts
from fedspine_edge.systemd import Pulse, notify
from fedspine_server.link.schemas import Facts

TASK = {
    "task_id": "0" * 32,
    "attempt": 1,
    "run_id": "run-a",
    "round_index": 0,
    "device_id": "a",
    "pruning_ratio": 0.25,
    "rank": 4,
    "num_steps": 8,
    "min_steps": 2,
    "budget_seconds": None,
    "seed": 7,
    "base_sha256": "b" * 64,
    "recipe": {"classes": ["x", "y"], "prompt": None},
    "blob": {"sha256": "c" * 64, "num_bytes": 10, "message_bytes": 20},
    "lease_seconds": 60.0,
    "deadline_seconds": None,
    "chunk_bytes": 1024,
    "max_update_bytes": 5000,
}
SETTINGS = AgentSettings("model", "data.jsonl")


def test_a_task_of_known_fields_is_taken_and_an_unknown_field_is_left_out():
    task = checked_task({**TASK, "more": "of a newer server"})
    assert task["seed"] == 7
    assert "more" not in task


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("task_id", "../../etc"),
        ("run_id", "../other"),
        ("device_id", "a/b"),
        ("base_sha256", "B" * 64),
        ("pruning_ratio", float("nan")),
        ("pruning_ratio", 1.5),
        ("num_steps", 0),
        ("num_steps", True),
        ("rank", "4"),
        ("seed", -1),
        ("blob", {"sha256": "c" * 64, "num_bytes": 1 << 40, "message_bytes": 1}),
        ("blob", None),
        ("recipe", {"classes": "xy", "prompt": None}),
        ("recipe", {"classes": ["x"], "prompt": "no place for the text"}),
    ],
)
def test_a_task_with_a_field_that_is_not_what_it_must_be_is_refused(field, value):
    with pytest.raises(IncompatibleError, match="expected"):
        checked_task({**TASK, field: value})


def test_a_message_that_came_with_its_task_is_kept_before_the_task_and_a_damaged_one_is_fetched(tmp_path):
    message = b"a small message"
    sha256 = hashlib.sha256(message).hexdigest()
    blob = {"sha256": sha256, "num_bytes": len(message), "message_bytes": 20}
    reply = {**TASK, "blob": {**blob, "content": base64.b64encode(message).decode()}}
    task = checked_task(reply)
    journal = Journal(tmp_path)
    journal.begin(task, inline_message(reply, task))
    assert (journal.inbox / sha256).read_bytes() == message
    assert journal.task() == task
    assert "content" not in task["blob"]
    for content in (None, 7, "%%%", base64.b64encode(b"other").decode()):
        assert inline_message({**TASK, "blob": {**blob, "content": content}}, task) is None
    assert checked_task(TASK)["inline_bytes"] == 0  # of a server that takes no update within a result


def test_the_identity_is_readable_by_its_owner_alone_and_comes_back(tmp_path):
    identity = Identity("https://server:8443", "PEM", "a", "secret", enrolled=True)
    save_identity(tmp_path, identity)
    assert stat.S_IMODE((tmp_path / "identity.json").stat().st_mode) == 0o600
    assert load_identity(tmp_path) == identity
    assert "secret" not in repr(identity)
    assert load_identity(tmp_path / "nowhere") is None
    (tmp_path / "identity.json").write_text("{")
    with pytest.raises(IdentityError, match="expected the identity of this device"):
        load_identity(tmp_path)


def test_an_agent_with_a_damaged_identity_says_what_to_do_and_stays_stopped(tmp_path):
    (tmp_path / "identity.json").write_text('{"format": 1, "url": "https')
    command = [sys.executable, "-m", "fedspine_edge.agent", str(tmp_path)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    assert ended.returncode == IdentityError.exit_code
    assert f"expected the identity of this device in {tmp_path / 'identity.json'}" in ended.stderr
    assert "join again" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_a_token_carries_the_fingerprint_of_the_ca():
    assert split_token(f" {'s' * 43}.{'0' * 64}\n") == ("s" * 43, "0" * 64)
    with pytest.raises(UsageError, match="expected a token as"):
        split_token("s" * 43)
    assert fingerprint("no certificate") == ""


def test_settings_come_back_and_missing_ones_say_how_to_join(tmp_path):
    save_settings(tmp_path, SETTINGS)
    assert load_settings(tmp_path) == SETTINGS
    with pytest.raises(UsageError, match="expected this device's settings"):
        load_settings(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="slow-down of at least 1"):
        AgentSettings("m", "d", slow_down=0.5)


def test_a_task_and_its_result_survive_a_restart_and_are_forgotten_together(tmp_path):
    journal = Journal(tmp_path)
    journal.begin(TASK)
    journal.update_path.write_bytes(b"update")
    sha256 = "2937013f2181810606b2a799b05bda2849f3e369a20982a4138f0e0a55984ce4"
    journal.finish({"attempt": 1, "sha256": sha256})
    again = Journal(tmp_path)
    assert again.task() == TASK
    assert again.result() == {"attempt": 1, "sha256": sha256}
    again.clear()
    assert (again.task(), again.result(), again.update_path.exists()) == (None, None, False)


def test_a_truncated_document_counts_as_missing(tmp_path):
    journal = Journal(tmp_path)
    journal.begin(TASK)
    journal.finish({"attempt": 1, "failure": "no memory"})
    (tmp_path / "outbox" / "result.json").write_bytes((tmp_path / "outbox" / "result.json").read_bytes()[:-9])
    assert journal.task() == TASK
    assert journal.result() is None
    (tmp_path / "task.json").write_bytes((tmp_path / "task.json").read_bytes().replace(b"run-a", b"run-b"))
    assert journal.task() is None


def test_an_upload_that_was_damaged_or_is_of_another_attempt_is_made_again(tmp_path):
    journal = Journal(tmp_path)
    journal.begin(TASK)
    journal.update_path.write_bytes(b"updat")
    journal.finish({"attempt": 1, "sha256": "2937013f2181810606b2a799b05bda2849f3e369a20982a4138f0e0a55984ce4"})
    assert journal.result() is None
    journal.finish({"attempt": 2, "failure": "of an attempt that is over"})
    assert journal.result() is None


def test_a_task_is_refused_for_want_of_disk_or_memory_with_the_figures():
    enough = {"message_bytes": 100, "memory_available_bytes": 1 << 40, "disk_free_bytes": 1 << 40}
    assert guards.refusal(SETTINGS, **enough) is None
    no_disk = guards.refusal(SETTINGS, **{**enough, "disk_free_bytes": 5})
    assert no_disk == f"expected {SETTINGS.min_disk_bytes + 300} bytes free on disk, found 5"
    no_memory = guards.refusal(SETTINGS, **{**enough, "memory_available_bytes": 6})
    assert no_memory == f"expected {SETTINGS.min_memory_bytes + 100} bytes of memory free, found 6"


def test_work_pauses_when_hot_and_goes_on_some_degrees_below():
    assert guards.rest(SETTINGS, 95.0, resting=False) is None
    assert guards.rest(SETTINGS, 96.0, resting=False) == "96 degrees, above 95"
    assert guards.rest(SETTINGS, 94.0, resting=True) == "94 degrees, above 90"
    assert guards.rest(SETTINGS, 89.0, resting=True) is None
    assert guards.rest(SETTINGS, None, resting=True) is None


@pytest.mark.parametrize("board", ["tx2", "orin_nano", "laptop"])
def test_a_board_reports_its_facts_and_sensors(board, tmp_path):
    root = plant(board, tmp_path / "root")
    senses = Senses(tmp_path, root)
    facts, sample = senses.facts(), senses.sample()
    json.dumps([facts, sample], allow_nan=False)
    assert facts["board"]
    assert facts["memory_bytes"] > 0
    assert facts["power_source"] in (None, "ina3221", "rapl", "hwmon")
    if facts["power_source"] == "ina3221":
        assert sample["power_watts"] > 0
    assert sample["temperature_celsius"] is None or 0 < sample["temperature_celsius"] < 120
    assert sample["disk_free_bytes"] > 0


@pytest.mark.parametrize(
    ("line", "built_as", "told"),
    [
        ("quiet fedspine.slot=b fedspine.release=21 panic=10", 20, {"image_release": 21, "image_slot": "b"}),
        ("fedspine.slot=a quiet", 20, {"image_release": 20, "image_slot": "a"}),
        ("quiet", 20, {"image_release": 20}),
        ("quiet fedspine.slot=c fedspine.release=x", None, {}),
        (None, None, {}),
    ],
)
def test_a_board_tells_the_release_of_its_image_and_the_slot_it_was_started_from(tmp_path, line, built_as, told):
    if line is not None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc/cmdline").write_text(f"{line}\n")
    if built_as is not None:
        add_facts(tmp_path, {"board": "generic-arm64", "variant": "agent", "release": built_as}, b"key")
    assert running_release(tmp_path) == told
    facts = Senses(tmp_path, tmp_path).facts()
    assert {name: value for name, value in facts.items() if name.startswith("image_")} == told
    assert Facts.model_validate(facts).image_release == told.get("image_release")


def test_a_board_without_sensors_reports_none_and_never_zero(tmp_path):
    sample = Senses(tmp_path, tmp_path).sample()
    assert [sample[name] for name in ("temperature_celsius", "power_watts", "energy_joules", "throttled_by")] == [
        None
    ] * 4


def test_the_agent_loads_neither_torch_nor_numpy_nor_the_command_line():
    heavy = "{'torch', 'numpy', 'transformers', 'pydantic', 'typer', 'rich', 'safetensors', 'zstandard', 'fastapi'}"
    code = f"import sys, fedspine_edge.agent.__main__; sys.exit(str({heavy} & set(sys.modules)) != 'set()')"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_death_of_a_worker_is_an_answer_with_its_cause():
    worker = WorkerProcess(SETTINGS, (sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    worker.start()
    answer = worker.answer(20)
    assert answer == {"kind": "died", "reason": "the worker was killed, most likely for want of memory"}
    assert worker.pid is None
    worker.ask("cancel")
    worker.stop()


def test_ten_minutes_without_a_server_are_waited_out_less_often_each_time_and_at_least_once_a_minute(tmp_path):
    slept, beats, tries = [0.0], [0], list[float]()
    agent = Agent(
        tmp_path,
        Identity("http://127.0.0.1:1", "", "a", "s" * 43, enrolled=True),
        SETTINGS,
        beat=lambda: beats.__setitem__(0, beats[0] + 1),
        sleep=lambda seconds: slept.__setitem__(0, slept[0] + seconds),
    )

    def away_for_ten_minutes():
        tries.append(slept[0])
        if slept[0] < 600:
            raise UnreachableError("nobody there")

    agent._patiently(away_for_ten_minutes)
    waits = [after - before for before, after in itertools.pairwise(tries)]
    assert 600 <= tries[-1] < 660
    assert max(waits) <= LONGEST_BACKOFF_SECONDS
    assert len(waits) < 30
    assert beats[0] >= 600  # systemd's watchdog is fed all the while


class OneTask:
    """A link that hands out one reply and keeps what is said of it."""

    def __init__(self, reply):
        self.reply, self.results = reply, []

    def task(self, _seconds, _done):
        return self.reply

    def result(self, task_id, manifest):
        self.results.append((task_id, manifest))
        return {"fate": "failed", "detail": None}


@pytest.mark.parametrize("change", [{"rank": 0}, {"blob": None}, {"recipe": {"classes": "x"}}])
def test_a_task_that_cannot_be_read_is_given_back_with_the_reason(tmp_path, change):
    agent = Agent(tmp_path, Identity("http://127.0.0.1:1", "", "a", "s" * 43, enrolled=True), SETTINGS)
    agent._welcome, agent._link = {"wait_seconds": 1.0}, OneTask({**TASK, **change})
    agent._next()
    ((task_id, manifest),) = agent._link.results
    assert (task_id, manifest["attempt"]) == (TASK["task_id"], 1)
    assert manifest["failure"].startswith("task not understood: expected")
    assert Journal(tmp_path).task() is None


def test_a_task_without_a_name_is_waited_out_like_a_server_that_is_away(tmp_path):
    agent = Agent(tmp_path, Identity("http://127.0.0.1:1", "", "a", "s" * 43, enrolled=True), SETTINGS)
    agent._welcome, agent._link = {"wait_seconds": 1.0}, OneTask({**TASK, "task_id": "../../etc"})
    with pytest.raises(UnreachableError, match="do not understand each other"):
        agent._next()
    assert agent._link.results == []


def test_a_stop_that_a_finaliser_swallowed_comes_true_at_the_next_beat():
    beats = []
    stop = Stop(lambda: beats.append(1))
    stop.beat()
    with pytest.raises(SystemExit):
        stop.on_signal()
    stop.on_signal()  # asked again while it ends: nothing is cut short
    with pytest.raises(SystemExit):
        stop.beat()
    assert beats == [1]


def test_systemd_leaves_a_dismissed_agent_stopped():
    unit = (Path(__file__).parents[2] / "systemd" / "fedspine-agent.service").read_text()
    (stopped,) = re.findall(r"^RestartPreventExitStatus=(.+)$", unit, re.MULTILINE)
    stay = {int(code) for code in stopped.split()}
    assert stay == {DismissedError.exit_code, IdentityError.exit_code, UsageError.exit_code}
    assert not stay & {LinkError.exit_code, IncompatibleError.exit_code, CheckpointError.exit_code}


def test_systemd_is_told_what_it_asked_for_and_only_by_a_loop_that_lives(tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(tmp_path / "notify"))
        supervisor.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notify("READY=1")
        assert supervisor.recv(64) == b"READY=1"
        monkeypatch.setenv("WATCHDOG_USEC", "20000")
        Pulse(60.0).start()
        assert supervisor.recv(64) == b"WATCHDOG=1"
    now = [0.0]
    pulse = Pulse(10.0, lambda: now[0])
    now[0] = 11.0
    assert not pulse.alive
    pulse.beat()
    assert pulse.alive


@pytest.mark.slow
def test_a_worker_says_what_it_has_and_ends_with_its_agent(tmp_path, tiny_models):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "who is he ?", "label": "human"}\n')
    worker = WorkerProcess(AgentSettings(str(tiny_models["bert"]), str(data), threads=1))
    worker.start()
    answer = worker.answer(60)
    assert answer["kind"] == "ready"
    assert answer["num_examples"] == 1
    process = psutil.Process(worker.pid)
    worker.stop()
    limit = time.monotonic() + 10
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < limit
        time.sleep(0.01)
