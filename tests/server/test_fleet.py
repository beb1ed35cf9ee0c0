import dataclasses
import json

import numpy as np
import pytest
import toy

from fedspine_server import coordinator, store
from fedspine_server.fleet import DeviceSpec, FleetSettings, make_specs, run_fleet
from fedspine_server.settings import RunSettings

SPECS = make_specs([40, 90, 60, 120, 50, 80, 70, 100], seed=0, rounds=8)
EXAMPLES = {spec.device_id: spec.num_examples for spec in SPECS}
WORLD = FleetSettings(seed=0, base_step_seconds=0.5)
CONTROLLERS = [
    ("structured", {}),
    ("grid-ucb", {}),
    ("sucb", {"mode": "paper"}),
    ("sucb", {"mode": "capped"}),
    ("fixed", {}),
]


def new(**changes):
    settings = RunSettings(**{"rounds": 8, "ranks": (2, 4, 8), "fixed_rank": 8, "learning_rate": 1e-3, **changes})
    return coordinator.init(settings, toy.layout(), toy.task_head())


def run(state, specs=SPECS, *, fleet=WORLD, backwards=False, **watchers):
    return run_fleet(state, specs, tune=toy.tuner(EXAMPLES, backwards=backwards), fleet=fleet, **watchers)


def outcome(state):
    return coordinator.adapter_sha256(state), json.dumps([state.history, state.controller_state], sort_keys=True)


@pytest.mark.parametrize(("controller", "options"), CONTROLLERS)
def test_a_whole_run_learns_and_ends_at_the_target(controller, options):
    state = run(new(controller=controller, controller_options=options), evaluate=lambda s: 1 / (1 + toy.global_loss(s)))
    assert state.round_index == 8
    assert len(state.history) == 8
    assert max(record["accuracy"] for record in state.history) > 0.9
    assert {device["pruning_ratio"] for device in state.history[-1]["devices"]} == {0.5}
    assert all(len(device.kept["layers.0.ffn"]) == 8 for device in state.devices.values() if device.kept)
    ends = [record["virtual_end_seconds"] for record in state.history]
    assert ends == sorted(ends)


@pytest.mark.parametrize(("controller", "options"), CONTROLLERS)
def test_neither_repetition_nor_the_order_of_updates_changes_a_run(controller, options):
    state = new(controller=controller, controller_options=options)
    first = outcome(run(state))
    assert outcome(run(state)) == first
    assert outcome(run(state, backwards=True)) == first


@pytest.mark.parametrize(("controller", "options"), CONTROLLERS)
def test_a_run_resumed_after_any_round_ends_the_same(controller, options, tmp_path):
    fleet = dataclasses.replace(WORLD, drop_out_probability=0.2)
    saved = []

    def save(state):
        directory = tmp_path / str(state.round_index)
        store.save(directory, state)
        saved.append(directory)

    whole = outcome(run(new(controller=controller, controller_options=options), fleet=fleet, save=save))
    assert len(saved) == 8
    for directory in saved:
        assert outcome(run(store.load(directory), fleet=fleet)) == whole


def seconds_to(state, accuracy):
    return next(
        (record["virtual_end_seconds"] for record in state.history if record["accuracy"] >= accuracy), float("inf")
    )


@pytest.mark.slow
def test_structured_is_sooner_at_the_target_than_the_others():
    seconds = {}
    for controller in ("structured", "sucb", "fixed"):
        total = 0.0
        for seed in range(3):
            specs = make_specs([40, 90, 60, 120, 50, 80, 70, 100], seed=seed, rounds=10)
            state = run(
                new(controller=controller, rounds=10, seed=seed),
                specs,
                fleet=dataclasses.replace(WORLD, seed=seed),
                evaluate=lambda s: 1 / (1 + toy.global_loss(s)),
            )
            total += seconds_to(state, 0.87)
        seconds[controller] = total
    assert seconds["structured"] < seconds["fixed"]
    assert seconds["structured"] < seconds["sucb"]


def test_devices_that_drop_out_are_not_tuned():
    asked = []
    tune = toy.tuner(EXAMPLES)

    def counting(assignments):
        asked.extend((a.round_index, a.device_id) for a in assignments)
        return tune(assignments)

    state = run_fleet(
        new(controller="fixed"), SPECS, tune=counting, fleet=dataclasses.replace(WORLD, drop_out_probability=0.3)
    )
    dropped = {
        (record["round_index"], device["device_id"])
        for record in state.history
        for device in record["devices"]
        if device["state"] == "dropped"
    }
    assert 5 < len(dropped) < 40
    assert not dropped & set(asked)


@pytest.mark.parametrize("controller", ["structured", "fixed"])
def test_a_run_in_which_everyone_drops_out_ends_with_the_first_adapter(controller):
    state = new(controller=controller)
    fleet = FleetSettings(drop_out_probability=1.0, timeout_seconds=30.0)
    done = run(state, fleet=fleet)
    assert coordinator.adapter_sha256(done) == coordinator.adapter_sha256(state)
    assert done.clock_seconds == 8 * 30.0


def test_devices_join_and_leave_when_their_time_has_come():
    late = DeviceSpec("late", "TX2", 50, 1 << 33, 0, join_round=3)
    early = DeviceSpec("early", "Xavier NX", 50, 1 << 33, 1, leave_round=2)
    stays = DeviceSpec("stays", "AGX Xavier", 50, 1 << 33, 2)
    tune = toy.tuner({"late": 50, "early": 50, "stays": 50})
    state = run_fleet(new(controller="structured"), [late, early, stays], tune=tune, fleet=WORLD)
    merged = [{d["device_id"] for d in record["devices"] if d["state"] != "away"} for record in state.history]
    assert merged[:2] == [{"early", "stays"}] * 2
    assert merged[2] == {"stays"}
    assert merged[3:] == [{"late", "stays"}] * 5
    assert [d["state"] for d in state.history[4]["devices"] if d["device_id"] == "early"] == ["away"]


def test_a_round_nobody_takes_part_in_costs_the_timeout():
    spec = DeviceSpec("late", "TX2", 50, 1 << 33, 0, join_round=1)
    state = run_fleet(new(rounds=2), [spec], tune=toy.tuner({"late": 50}), fleet=FleetSettings(timeout_seconds=7.0))
    assert state.history[0]["virtual_end_seconds"] == 7.0
    assert state.history[1]["num_merged"] == 1


def test_late_updates_are_not_merged_and_the_round_ends_without_them():
    state = run(new(controller="structured", deadline_slack=1.0, rounds=8))
    late = [(r, d) for r in state.history for d in r["devices"] if d["state"] == "late"]
    assert late
    for record, device in late:
        length = record["virtual_end_seconds"] - record["virtual_start_seconds"]
        took = device["download_seconds"] + device["compute_seconds"] + device["upload_seconds"]
        assert took > length >= record["deadline_seconds"] - 1e-9
        assert device["waiting_seconds"] == 0.0
        assert device["detail"].endswith("after the round's end")
    for record in state.history:
        waits = [device["waiting_seconds"] for device in record["devices"] if device["state"] == "merged"]
        assert min(waits) >= 0.0


def test_a_round_waits_for_its_quorum_past_the_deadline():
    eager = run(new(controller="structured", deadline_slack=1.0, min_quorum=0.0))
    patient = run(new(controller="structured", deadline_slack=1.0, min_quorum=1.0))
    assert all(record["num_merged"] == len(SPECS) for record in patient.history)
    assert any(record["num_merged"] < len(SPECS) for record in eager.history)


def test_a_controller_without_a_deadline_waits_for_the_slowest():
    state = run(new(controller="fixed"))
    for record in state.history:
        arrivals = [d["download_seconds"] + d["compute_seconds"] + d["upload_seconds"] for d in record["devices"]]
        assert record["virtual_end_seconds"] - record["virtual_start_seconds"] == pytest.approx(max(arrivals))
        assert record["deadline_seconds"] is None


def test_a_device_that_returns_nothing_counts_as_dropped():
    tune = toy.tuner(EXAMPLES)

    def silent(assignments):
        return (update for update in tune(assignments) if update.device_id != "device-03")

    state = run_fleet(new(rounds=2), SPECS, tune=silent, fleet=WORLD)
    device = state.history[0]["devices"][3]
    assert (device["device_id"], device["state"], device["detail"]) == ("device-03", "dropped", "no answer")


def test_an_update_nobody_asked_for_is_an_error():
    tune = toy.tuner(EXAMPLES)

    def twice(assignments):
        updates = list(tune(assignments))
        return [*updates, updates[0]]

    with pytest.raises(ValueError, match="found another of device-00"):
        run_fleet(new(rounds=2), SPECS, tune=twice, fleet=WORLD)


def test_events_tell_the_round_as_it_goes():
    events = []
    run(new(rounds=2, controller="fixed"), on_event=events.append, evaluate=lambda state: 0.5, eval_every=2)
    kinds = [event["kind"] for event in events]
    assert kinds[0] == "round_start"
    assert kinds.count("round_start") == kinds.count("round_end") == 2
    assert events[0]["rounds"] == 2
    assert {device["device_id"] for device in events[0]["devices"]} == set(EXAMPLES)
    states = [event["state"] for event in events if event["kind"] == "device"]
    assert states.count("tuning") == states.count("merged") == 16
    records = [event["record"] for event in events if event["kind"] == "round_end"]
    assert [record["accuracy"] for record in records] == [None, 0.5]
    json.dumps(events)


def test_unpruned_runs_keep_every_member():
    state = run(new(target_sparsity=0.0, controller="structured"))
    for device in state.devices.values():
        np.testing.assert_array_equal(device.kept["layers.0.heads"], np.arange(toy.HEADS))


def test_per_layer_masks_are_accepted():
    state = run(new(mask_mode="per-layer", controller="fixed", rounds=3))
    assert all(record["num_merged"] == len(SPECS) for record in state.history)


def test_a_device_does_as_many_steps_as_fit_by_its_own_clock():
    state = run(new(controller="structured", controller_options={"own_clock": True}, rounds=6))
    steps = [(d["board"], d["num_steps"]) for r in state.history[1:] for d in r["devices"]]
    assert {count for board, count in steps if board == "AGX Xavier"} != {
        count for board, count in steps if board == "TX2"
    }
    for record in state.history[1:]:
        for device in record["devices"]:
            took = device["download_seconds"] + device["compute_seconds"] + device["upload_seconds"]
            assert took <= record["deadline_seconds"] * 1.05
