"""Rounds over real sockets with toy devices: whole runs, and everything that may come between."""

import base64
import dataclasses
import json
import os
import threading
import uuid

import numpy as np
import pytest
import toy
from link_world import ToyDevice, manifest, served, start_run, toy_layout, until

from fedspine_edge.agent.link import DismissedError, Link, NotTakenError
from fedspine_edge.agent.tasks import checked_task, inline_message
from fedspine_edge.wire_format import assignment_from_bytes, pack, to_bytes, unpack
from fedspine_server import coordinator
from fedspine_server.fleet import FleetSettings, make_specs, run_fleet
from fedspine_server.link import runs
from fedspine_server.link.devices import set_status
from fedspine_server.link.hub import LinkSettings
from fedspine_server.link.sweeping import sweep
from fedspine_server.link.tables import REVOKED
from fedspine_server.state import adapter_sha256


@pytest.fixture
def world(tmp_path):
    with served(tmp_path / "server") as world:
        yield world


def run_view(world, run_id="run-a"):
    return runs.views(world.hub, run_id)[0]


def kinds(world):
    return [event.kind for event in runs.events(world.hub, None, 0)]


def in_threads(actions):
    """Runs all at once and raises what any of them raised."""
    failures = []

    def guarded(action):
        try:
            action()
        except Exception as error:  # noqa: BLE001 - raised again below
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def participate(device, rounds, folder):
    device.hello()
    for _ in range(rounds):
        task = until(device.task)
        assert device.work(task, folder)["fate"] == "kept"


def test_a_run_of_three_devices_ends_and_counts_each_once(world, settings, tmp_path):
    settings = dataclasses.replace(settings, rounds=3)
    start_run(world, settings, min_devices=3)
    devices = [ToyDevice(world, name) for name in "abc"]
    in_threads([lambda d=device: participate(d, 3, tmp_path) for device in devices])
    until(lambda: run_view(world).status == "finished")
    state = world.hub.state(run_view(world).state_sha256)
    assert [record["num_merged"] for record in state.history] == [3, 3, 3]
    assert toy.global_loss(state) < 1.0
    assert kinds(world).count("result_kept") == 9


def test_with_recorded_timings_the_adapter_is_the_simulated_fleets(world, settings, tmp_path):
    settings = dataclasses.replace(settings, rounds=4, controller="structured")
    specs = make_specs([10, 30, 20], seed=1, rounds=4)
    counts = {spec.device_id: spec.num_examples for spec in specs}
    first = coordinator.init(settings, toy_layout(), toy.task_head())
    simulated = run_fleet(first, specs, tune=toy.tuner(counts), fleet=FleetSettings(seed=1))
    start_run(world, settings, min_devices=3, timings=json.loads(json.dumps(simulated.history)))
    devices = [
        ToyDevice(world, spec.device_id, num_examples=spec.num_examples, memory_bytes=spec.memory_bytes)
        for spec in specs
    ]
    in_threads([lambda d=device: participate(d, 4, tmp_path) for device in devices])
    until(lambda: run_view(world).status == "finished")
    view = run_view(world)
    assert view.adapter_sha256 == adapter_sha256(simulated)
    assert view.recorded_timings
    assert world.hub.state(view.state_sha256).history == simulated.history


def opened(world, settings, *devices, **options):
    """Begins a run with these devices and returns their tasks of its first round."""
    start_run(world, settings, min_devices=len(devices), **options)
    for device in devices:
        device.hello()
    return [until(device.task) for device in devices]


def merged(world, round_index):
    state = world.hub.state(run_view(world).state_sha256)
    return [d["device_id"] for d in state.history[round_index]["devices"] if d["state"] == "merged"]


def details(world, round_index):
    state = world.hub.state(run_view(world).state_sha256)
    return {d["device_id"]: d["detail"] for d in state.history[round_index]["devices"]}


def test_a_result_sent_twice_counts_once_and_gets_the_same_answer(world, settings, tmp_path):
    device = ToyDevice(world, "a")
    (task,) = opened(world, settings, device)
    first = device.work(task, tmp_path)
    frame = (tmp_path / "a.update").read_bytes()
    assert device.link.result(task["task_id"], manifest(task, frame)) == first
    until(lambda: run_view(world).round_index == 1)
    assert kinds(world).count("result_kept") == 1
    assert merged(world, 0) == ["a"]


def test_small_messages_travel_within_task_and_result_and_nothing_else_is_called(tmp_path, settings):
    with served(tmp_path / "server", LinkSettings(tick_seconds=0.02)) as world:
        device = ToyDevice(world, "a")
        device.hello()
        start_run(world, settings, min_devices=1)
        reply = until(lambda: device.link.task(1.0))
        task = checked_task(reply)
        message = inline_message(reply, task)
        path = tmp_path / "a.blob"
        path.write_bytes(message)
        device.link.download = None  # neither this call nor an upload's is made
        device.link._put = None
        own = {name: task[name] for name in ("device_id", "pruning_ratio", "num_steps", "seed")}
        asked = assignment_from_bytes(unpack(message, max_bytes=task["blob"]["message_bytes"]))
        update = toy.tune_one(toy_layout(), dataclasses.replace(asked, **own), 10)
        frame = pack(to_bytes(update))
        lie = {**manifest(task, frame), "content": base64.b64encode(frame[:-1]).decode()}
        with pytest.raises(NotTakenError, match="content of the announced hash and length"):
            device.link.result(task["task_id"], lie)
        assert device.send(task, frame, tmp_path)["fate"] == "kept"
        until(lambda: run_view(world).round_index == 1)
        assert merged(world, 0) == ["a"]


def test_a_restarted_device_goes_on_with_its_task_and_the_old_boot_is_sent_away(world, settings, tmp_path):
    device = ToyDevice(world, "a")
    (task,) = opened(world, settings, device)
    old = device.link
    device.link = Link(device.identity, uuid.uuid4().hex)
    in_hand = {"task_id": task["task_id"], "attempt": task["attempt"]}
    assert device.hello(in_hand)["task"] == "continue"
    with pytest.raises(DismissedError, match="another agent of device a has taken over"):
        old.progress(task["task_id"], {"attempt": 1})
    assert device.link.progress(task["task_id"], {"attempt": 1})["cancel"] is False
    assert device.work(task, tmp_path)["fate"] == "kept"
    assert device.hello(in_hand)["task"] == "drop"


def test_a_device_that_lost_its_task_gets_it_again_as_another_attempt(world, settings, tmp_path):
    device = ToyDevice(world, "a")
    (task,) = opened(world, settings, device)
    device.reborn().hello()
    again = device.task()
    assert (again["task_id"], again["attempt"]) == (task["task_id"], 2)
    assert device.work(again, tmp_path)["fate"] == "kept"
    late = device.link.result(task["task_id"], {"attempt": 1, "failure": "I am late"})
    assert late == {"fate": "refused", "detail": "the task was done already"}
    until(lambda: run_view(world).round_index == 1)
    assert merged(world, 0) == ["a"]


def test_a_lease_that_runs_out_is_offered_again(tmp_path, settings):
    clock = Clock()
    with served(tmp_path / "server", clock=clock) as world:
        device = ToyDevice(world, "a")
        (task,) = opened(world, settings, device)
        clock.now += 61
        until(lambda: "lease_ran_out" in kinds(world))
        assert device.task()["attempt"] == task["attempt"] + 1


def test_an_update_in_chunks_goes_on_where_it_broke_off(world, settings, tmp_path):
    device = ToyDevice(world, "a")
    (task,) = opened(world, settings, device)
    update = toy.tune_one(toy_layout(), device.assignment(task, tmp_path), 10)
    frame = pack(to_bytes(update))
    chunks = [frame[i : i + 1024] for i in range(0, len(frame), 1024)]
    assert len(chunks) > 1
    place = f"/v1/upload/{task['task_id']}"
    device.link._put(f"{place}/0?attempt=1", chunks[0])
    # The power went: a new boot asks where to go on, and only the rest travels.
    device.reborn().hello({"task_id": task["task_id"], "attempt": 1})
    assert device.link._call("HEAD", f"{place}?attempt=1", None)["x-chunks"] == "1"
    assert device.send(task, frame, tmp_path)["fate"] == "kept"


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"no frame at all", "expected one whole zstd frame"),
        (pack(b"\0" * (1 << 30))[:60_000], "expected a message of 0 to 76108 bytes, found one of 1073741824"),
        (pack(b"no update"), "expected one whole update as safetensors"),
    ],
    ids=["no frame", "zip bomb", "no update"],
)
def test_a_frame_that_is_no_update_is_refused_with_its_reason(world, settings, tmp_path, frame, reason):
    device = ToyDevice(world, "a")
    (task,) = opened(world, settings, device)
    reply = device.send(task, frame, tmp_path)
    assert reply["fate"] == "refused"
    assert reason in reply["detail"]
    until(lambda: run_view(world).round_index == 1)
    assert details(world, 0)["a"].startswith(f"refused: {reason}")


def test_an_upload_larger_than_any_update_is_not_taken(world, settings):
    device = ToyDevice(world, "a")
    (task,) = opened(world, settings, device)
    with pytest.raises(NotTakenError, match="413"):
        device.link._put(f"/v1/upload/{task['task_id']}/100?attempt=1", b"x")
    with pytest.raises(NotTakenError, match="413"):
        device.link._put(f"/v1/upload/{task['task_id']}/0?attempt=1", b"x" * 5000)


def lying(update, name, array):
    return dataclasses.replace(update, tensors={**update.tensors, name: array})


def with_nan(update):
    name = next(name for name in update.tensors if name.startswith("lora_a/"))
    return lying(update, name, np.full_like(update.tensors[name], np.nan))


def with_wrong_shape(update):
    name = next(name for name in update.tensors if name.startswith("lora_b/"))
    return lying(update, name, update.tensors[name][:-1].copy())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_nan, "found NaN or Inf"),
        (with_wrong_shape, "expected lora_b/"),
        (lambda update: dataclasses.replace(update, base_sha256="0" * 64), "expected base_sha256"),
        (lambda update: dataclasses.replace(update, device_id="b"), "expected device_id a, found b"),
    ],
    ids=["NaN", "shape", "base", "another's name"],
)
def test_a_lying_update_is_rejected_and_the_honest_one_merged(world, settings, tmp_path, change, reason):
    liar, honest = ToyDevice(world, "a"), ToyDevice(world, "b", num_examples=30)
    first, second = opened(world, settings, liar, honest)
    liar.work(first, tmp_path, change)
    honest.work(second, tmp_path)
    until(lambda: run_view(world).round_index == 1)
    assert merged(world, 0) == ["b"]
    assert reason in details(world, 0)["a"]
    assert "update_rejected" in kinds(world)


def test_a_round_closes_at_its_timeout_without_the_dead_device_and_takes_it_back_later(tmp_path, settings):
    clock = Clock()
    with served(tmp_path / "server", clock=clock) as world:
        alive, dead = ToyDevice(world, "a"), ToyDevice(world, "b")
        first, second = opened(world, settings, alive, dead, round_timeout_seconds=600.0)
        alive.work(first, tmp_path)
        clock.now += 601
        until(lambda: run_view(world).round_index == 1)
        assert merged(world, 0) == ["a"]
        assert details(world, 0)["b"] == "no answer"
        late = dead.work(second, tmp_path)
        assert late["fate"] == "late"
        alive.hello()
        dead.hello()
        assert until(dead.task)["round_index"] >= 1


def test_a_late_update_is_merged_once_in_the_next_closing(tmp_path, settings):
    clock = Clock()
    with served(tmp_path / "server", clock=clock) as world:
        quick, slow = ToyDevice(world, "a"), ToyDevice(world, "b", num_examples=30)
        first, second = opened(world, settings, quick, slow, round_timeout_seconds=600.0)
        quick.work(first, tmp_path)
        clock.now += 601
        until(lambda: run_view(world).round_index == 1)
        assert slow.work(second, tmp_path)["fate"] == "late"
        sent = (tmp_path / "b.update").read_bytes()
        assert slow.link.result(second["task_id"], manifest(second, sent))["fate"] == "late"
        for round_index in (1, 2):
            quick.hello()
            slow.hello()
            quick.work(until(quick.task), tmp_path)
            clock.now += 601
            until(lambda over=round_index + 1: run_view(world).round_index == over)
        history = world.hub.state(run_view(world).state_sha256).history
        late = [[(entry["device_id"], entry["state"]) for entry in record["late"]] for record in history]
        assert late == [[], [("b", "merged")], []]


def test_a_device_that_joins_in_mid_run_takes_part_in_the_next_round(world, settings, tmp_path):
    first = ToyDevice(world, "a")
    (task,) = opened(world, settings, first)
    second = ToyDevice(world, "b")
    second.hello()
    assert second.task(0.05) is None
    first.work(task, tmp_path)
    assert until(second.task)["round_index"] == 1


def test_a_revoked_device_in_mid_round_is_shut_out_and_the_round_goes_on_without_it(world, settings, tmp_path):
    first, second = ToyDevice(world, "a"), ToyDevice(world, "b")
    task, other = opened(world, settings, first, second)
    set_status(world.hub, ["a"], REVOKED)
    with pytest.raises(DismissedError, match="401"):
        first.work(task, tmp_path)
    second.work(other, tmp_path)
    until(lambda: run_view(world).round_index == 1)
    assert merged(world, 0) == ["b"]
    until(lambda: run_view(world).detail == "waiting for 2 devices with this base model, found 1")


def test_a_device_with_another_base_model_is_never_asked(world, settings):
    start_run(world, settings)
    device = ToyDevice(world, "a")
    device.hello(base="1" * 64)
    until(lambda: run_view(world).detail)
    assert run_view(world).detail == "waiting for 1 devices with this base model, found 0"


def test_a_stopped_run_hands_nothing_out_and_resumes_with_the_same_assignments(world, settings, tmp_path):
    device = ToyDevice(world, "a")
    (task,) = opened(world, settings, device)
    runs.set_status(world.hub, "run-a", "stopped")
    assert device.link.progress(task["task_id"], {"attempt": 1})["cancel"] is True
    assert device.task(0.05) is None
    runs.set_status(world.hub, "run-a", "running")
    again = until(device.task)
    assert (again["task_id"], again["seed"]) == (task["task_id"], task["seed"])
    assert device.work(again, tmp_path)["fate"] == "kept"


def test_a_restarted_server_goes_on_with_the_open_round(tmp_path, settings):
    with served(tmp_path / "server") as world:
        device = ToyDevice(world, "a")
        (task,) = opened(world, settings, device)
        device.link.close()
    with served(tmp_path / "server") as world:
        device.identity = dataclasses.replace(device.identity, url=world.url)
        device.reborn()
        assert device.hello({"task_id": task["task_id"], "attempt": 1})["task"] == "continue"
        assert device.work(task, tmp_path)["fate"] == "kept"
        until(lambda: run_view(world).round_index == 1)
        assert merged(world, 0) == ["a"]


def test_a_blob_nobody_needs_is_swept_and_a_young_one_stays(world, settings, tmp_path):
    device = ToyDevice(world, "a")
    (task,) = opened(world, settings, device)
    device.work(task, tmp_path)
    until(lambda: run_view(world).round_index == 1)
    stray = world.hub.blobs.put(b"nobody's")
    assert sweep(world.hub) == 0
    os.utime(world.hub.blobs.path(stray), (0, 0))
    assert sweep(world.hub) == 1
    assert world.hub.state(run_view(world).state_sha256).round_index == 1


class Clock:
    """The server's clock, moved by hand; it never stands still for a test that waits."""

    def __init__(self):
        self.now = 1_800_000_000.0

    def __call__(self):
        return self.now
