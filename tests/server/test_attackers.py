import dataclasses

import numpy as np
import pytest
import toy

from fedspine_server import coordinator
from fedspine_server.attackers import attackers, falsified
from fedspine_server.device_models import DeviceSpec, FleetSettings
from fedspine_server.fleet import run_fleet
from fedspine_server.settings import RunSettings

EXAMPLES = {f"d{index}": 20 for index in range(10)}


@pytest.fixture
def trip(begin):
    assignments, _ = coordinator.assign(begin(target_sparsity=0.5, warmup_fraction=0.0, rounds=2))
    return assignments[0], toy.tune_one(toy.layout(), assignments[0], 10)


def test_an_honest_device_and_one_with_wrong_labels_send_what_they_trained(trip):
    assignment, update = trip
    assert falsified(None, toy.layout(), assignment, update) is update
    assert falsified("label-flip", toy.layout(), assignment, update) is update


@pytest.mark.parametrize("attack", ["sign-flip", "nan"])
def test_an_attacker_lies_in_integers_too(begin, attack):
    state = begin(update_dtype="int8")
    assignments, state = coordinator.assign(state)
    updates = [toy.tune_one(toy.layout(), a, n) for a, n in zip(assignments, (10, 30, 20), strict=True)]
    updates[0] = falsified(attack, toy.layout(), assignments[0], updates[0])
    results = [coordinator.DeviceResult(update.device_id, "arrived", update) for update in updates]
    record = coordinator.close_round(state, results, round_seconds=1.0).history[0]
    assert record["devices"][0]["state"] == ("rejected" if attack == "nan" else "merged")
    assert record["num_merged"] == (2 if attack == "nan" else 3)


@pytest.mark.parametrize(("attack", "times"), [("sign-flip", -1), ("scaled", 10)])
def test_an_attacker_multiplies_its_change_and_keeps_its_masks(trip, attack, times):
    assignment, update = trip
    lie = falsified(attack, toy.layout(), assignment, update)
    name = "task_head/classifier.bias"
    change = update.tensors[name] - assignment.tensors[name]
    np.testing.assert_allclose(lie.tensors[name], assignment.tensors[name] + times * change, atol=1e-6)
    for group in toy.layout().groups:
        np.testing.assert_array_equal(lie.tensors[f"keep/{group.name}"], update.tensors[f"keep/{group.name}"])
    assert {n: a.shape for n, a in lie.tensors.items()} == {n: a.shape for n, a in update.tensors.items()}
    assert not np.array_equal(lie.tensors["lora_b/layers.0.q"], update.tensors["lora_b/layers.0.q"])


def test_the_share_of_attackers_is_rounded_down_and_drawn_by_the_seed():
    assert len(attackers(16, 0.2, 0)) == 3
    assert attackers(16, 0.2, 0) == attackers(16, 0.2, 0)
    assert attackers(80, 0.2, 0) != attackers(80, 0.2, 1)
    assert attackers(80, 0.0, 0) == []


def final_loss(aggregation, attack):
    settings = RunSettings(
        rounds=6, ranks=(4,), fixed_rank=4, controller="fixed", aggregation=aggregation, target_sparsity=0.0
    )
    state = coordinator.init(settings, toy.layout(), toy.task_head())
    specs = [
        DeviceSpec(name, "TX2", 20, 8 << 30, 0, attack=attack if name in ("d1", "d4") else None) for name in EXAMPLES
    ]
    return run_fleet(state, specs, tune=toy.tuner(EXAMPLES), fleet=FleetSettings())


def test_not_a_number_is_rejected_with_a_reason_in_every_round():
    state = final_loss("spine", "nan")
    for record in state.history:
        liars = [device for device in record["devices"] if device["device_id"] in ("d1", "d4")]
        assert [device["state"] for device in liars] == ["rejected", "rejected"]
        assert all("found NaN or Inf" in device["detail"] for device in liars)
    assert toy.global_loss(state) == pytest.approx(toy.global_loss(final_loss("spine", None)), abs=0.002)


@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
def test_a_robust_rule_learns_among_scaled_attackers_as_it_does_among_honest_devices(rule):
    honest, attacked = (toy.global_loss(final_loss(rule, attack)) for attack in (None, "scaled"))
    assert attacked < 1.2 * honest
    assert toy.global_loss(final_loss("spine", "scaled")) > 2 * honest


def test_an_attack_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="attack must be one of sign-flip, scaled, nan, label-flip, found flood"):
        DeviceSpec("a", "TX2", 10, 1, 0, attack="flood")
    assert dataclasses.replace(DeviceSpec("a", "TX2", 10, 1, 0), attack="nan").attack == "nan"
