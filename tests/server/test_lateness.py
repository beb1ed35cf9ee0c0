"""Updates that come after their round: once, with less weight, and the controller hears of their seconds."""

import dataclasses

import numpy as np
import pytest
import toy

from fedspine_server import coordinator
from fedspine_server.coordinator import DeviceResult, LateResult
from fedspine_server.lateness import staleness_weight

EXAMPLES = {"a": 10, "b": 30, "c": 20}


def arrived(updates):
    return [DeviceResult(update.device_id, "arrived", update, 3.0, 1.0, 2.0) for update in updates]


def late_result(assignment, update, seconds=3.0):
    return LateResult(assignment, DeviceResult(update.device_id, "late", update, seconds, 1.0, 2.0))


def with_one_late(begin, **changes):
    """One closed round that missed device c, the next one opened, and c's update to the first."""
    first, state = coordinator.assign(begin(**changes))
    updates = {update.device_id: update for update in toy.tuner(EXAMPLES)(first)}
    late = late_result(next(a for a in first if a.device_id == "c"), updates.pop("c"))
    state = coordinator.close_round(state, arrived(updates.values()), round_seconds=6.0)
    second, state = coordinator.assign(state)
    return state, second, late


def close(state, assignments, late, without=()):
    fresh = [update for update in toy.tuner(EXAMPLES)(assignments) if update.device_id not in without]
    return coordinator.close_round(state, arrived(fresh), round_seconds=6.0, late=late)


def test_an_update_counts_less_with_every_round_it_is_late():
    assert [staleness_weight(staleness) for staleness in (0, 1, 3)] == pytest.approx([1.0, 0.5**0.5, 0.5])


def test_a_late_update_is_merged_in_the_next_closing_with_its_falling_weight(begin):
    state, second, late = with_one_late(begin)
    head = "classifier.bias"
    heads = {a.device_id: a.tensors[f"task_head/{head}"] + np.float32(0.01) for a in second}
    after = close(state, second, [late], without=("c",))
    (record,) = after.history[1]["late"]
    assert (record["device_id"], record["round_index"], record["staleness"]) == ("c", 0, 1)
    assert (record["state"], record["weight"]) == ("merged", pytest.approx(0.5**0.5))
    weights = [10.0, 30.0, 20.0 * 0.5**0.5]
    values = [heads["a"], heads["b"], late.result.update.tensors[f"task_head/{head}"]]
    np.testing.assert_allclose(after.task_head[head], np.average(values, axis=0, weights=weights), rtol=1e-6)
    assert after.history[1]["num_merged"] == 2
    assert after.devices["c"].kept


def test_a_device_counts_once_in_a_closing_and_its_newer_update_wins(begin):
    state, second, late = with_one_late(begin)
    both, fresh = close(state, second, [late]), close(state, second, [])
    assert both.history[1]["late"][0]["state"] == "superseded"
    assert coordinator.adapter_sha256(both) == coordinator.adapter_sha256(fresh)


def test_a_late_update_is_judged_against_what_was_asked_then(begin):
    state, second, late = with_one_late(begin)
    lying = dataclasses.replace(late.result.update, rank=late.assignment.rank // 2)
    after = close(state, second, [late_result(late.assignment, lying)], without=("c",))
    (record,) = after.history[1]["late"]
    assert (record["state"], record["weight"]) == ("rejected", 0.0)
    assert record["detail"].startswith("expected rank")
    unmerged = close(state, second, [], without=("c",))
    assert coordinator.adapter_sha256(after) == coordinator.adapter_sha256(unmerged)
    assert after.controller_state == unmerged.controller_state


def test_an_update_from_before_the_final_structure_is_not_merged_into_it(begin):
    state, second, late = with_one_late(begin, rounds=2, cooldown_fraction=0.5, warmup_fraction=0.0)
    after = close(state, second, [late], without=("c",))
    assert after.history[1]["late"][0]["detail"] == "made before the final structure was settled"


def always_late(state, rounds, *, told):
    """Steps that c is asked for in each round when it takes four times as long as there is time for."""
    steps, late = [], []
    for _ in range(rounds):
        assignments, state = coordinator.assign(state)
        asked = next(a for a in assignments if a.device_id == "c")
        steps.append(asked.num_steps)
        updates = {update.device_id: update for update in toy.tuner(EXAMPLES)(assignments)}
        came = late_result(asked, updates.pop("c"), seconds=12.0 * asked.num_steps)
        results = [
            DeviceResult(u.device_id, "arrived", u, 3.0 * u.report.num_steps, 1.0, 2.0) for u in updates.values()
        ]
        state = coordinator.close_round(state, results, round_seconds=30.0, late=late if told else ())
        late = [came]
    return steps


def test_a_device_that_is_always_late_is_asked_for_less(begin):
    state = begin(controller="structured")
    told, untold = always_late(state, 6, told=True), always_late(state, 6, told=False)
    assert told[-1] < min(untold[-1], untold[1])
