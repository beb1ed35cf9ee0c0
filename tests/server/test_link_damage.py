"""What a failing disk, a full one and a clock that is set leave behind on the server, and how little of it matters."""

import os
import threading
import time

import pytest
from link_world import ToyDevice, served, start_run, until
from sqlalchemy.exc import OperationalError

from fedspine_edge.agent.link import NotTakenError, UnreachableError
from fedspine_edge.errors import CheckpointError
from fedspine_server.link import runs
from fedspine_server.link.hub import steady_clock
from fedspine_server.link.tables import FINISHED


@pytest.fixture
def world(tmp_path):
    with served(tmp_path / "server") as world:
        yield world


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def closed(world, run_id="run-a"):
    return [event.detail for event in runs.events(world.hub, run_id, 0) if event.kind == "round_closed"]


def participants(world, names):
    devices = [ToyDevice(world, name) for name in names]
    for device in devices:
        device.hello()
    return devices


def test_an_answer_damaged_on_the_servers_disk_counts_as_missing_and_the_round_closes(world, settings, tmp_path):
    a, b = participants(world, "ab")
    start_run(world, settings, min_devices=2)
    task, other = a.task(), b.task()
    assert a.work(task, tmp_path)["fate"] == "kept"
    blobs = (tmp_path / "server" / "blobs").glob("??/*")
    cut(max(blobs, key=lambda path: path.stat().st_mtime_ns))
    assert b.work(other, tmp_path)["fate"] == "kept"
    (detail,) = until(lambda: closed(world))
    assert detail["merged"] == ["b"]
    assert detail["missing"] == {"a": "expected an update, found none"}


def test_a_run_whose_state_is_damaged_says_so_and_holds_up_no_other(world, settings, tmp_path):
    (device,) = participants(world, "a")
    start_run(world, settings, "run-a", min_devices=2)
    until(lambda: runs.views(world.hub, "run-a")[0].detail.startswith("waiting"))
    cut(runs.state_path(world.hub, "run-a"))
    world.hub._load.cache_clear()
    ToyDevice(world, "b").hello()
    until(lambda: "is damaged on disk" in runs.views(world.hub, "run-a")[0].detail)
    start_run(world, settings, "run-b")
    task = until(device.task)
    assert task["run_id"] == "run-b"


def test_a_task_damaged_on_the_servers_disk_is_given_up_and_written_anew(world, settings, tmp_path):
    (device,) = participants(world, "a")
    start_run(world, settings)
    task = device.task()
    path = world.hub.blobs.path(task["blob"]["sha256"])
    whole = path.read_bytes()
    cut(path)
    with pytest.raises(NotTakenError, match="damaged on the server's disk"):
        device.assignment(task, tmp_path)
    path.write_bytes(bytes(len(whole)))
    with pytest.raises(NotTakenError, match="found other bytes, from its beginning on"):
        device.assignment(task, tmp_path)
    cut(path)
    assert world.hub.blobs.put(whole) == task["blob"]["sha256"]
    assert device.work(task, tmp_path)["fate"] == "kept"


def test_what_a_power_cut_left_of_a_download_is_thrown_away_when_it_is_wrong(world, settings, tmp_path):
    (device,) = participants(world, "a")
    start_run(world, settings)
    task = device.task()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / f"{task['blob']['sha256']}.partial").write_bytes(bytes(100))
    assert device.work(task, tmp_path)["fate"] == "kept"


def test_a_database_that_cannot_be_written_is_to_be_tried_again(world, settings, monkeypatch):
    (device,) = participants(world, "a")

    def full():
        raise OperationalError("INSERT", {}, Exception("database or disk is full"))

    with monkeypatch.context() as patch:
        patch.setattr(world.hub.database, "write", full)
        with pytest.raises(UnreachableError, match="507"):
            device.hello()
    device.hello()
    start_run(world, settings)
    assert runs.views(world.hub, "run-a")[0].status != FINISHED


def test_an_upload_that_a_full_disk_cannot_take_is_sent_again_later(world, settings, tmp_path, monkeypatch):
    (device,) = participants(world, "a")
    start_run(world, settings)
    task = device.task()

    def full(*_):
        raise CheckpointError("cannot write below /var: No space left on device", hint="free some space")

    with monkeypatch.context() as patch:
        patch.setattr(world.hub.blobs, "put_chunk", full)
        with pytest.raises(UnreachableError, match="507: cannot write below /var: No space left"):
            device.work(task, tmp_path)
    assert device.work(task, tmp_path)["fate"] == "kept"


def test_an_answer_that_was_kept_counts_whatever_the_clock_of_the_process_that_closes_the_round(settings, tmp_path):
    def clock():
        return time.time() - (5.0 if threading.current_thread().name == "steward" else 0.0)

    with served(tmp_path / "server", clock=clock) as world:
        (device,) = participants(world, "a")
        start_run(world, settings)
        assert device.work(until(device.task), tmp_path)["fate"] == "kept"
        (detail,) = until(lambda: closed(world))
        assert detail["merged"] == ["a"]


def test_a_servers_clock_never_goes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1_000.0)
    clock = steady_clock(2_000_000_000.0)
    first = clock()
    assert first >= 2_000_000_000.0
    monkeypatch.setattr(time, "time", lambda: 5.0)
    assert first <= clock() < first + 60
    with served(tmp_path / "server") as world:
        device = ToyDevice(world, "a")
        world.hub.clock = lambda: 3_000_000_000.0
        device.hello()
    with served(tmp_path / "server") as world:
        assert world.hub.clock() >= 3_000_000_000.0
