import math

import pytest

from fedspine_server.device_models import (
    BANDWIDTH_RANGE,
    BOARDS,
    DeviceSpec,
    FleetSettings,
    compute_seconds,
    conditions_of,
    make_specs,
)
from fedspine_server.step_law import StepLaw

SPEC = DeviceSpec("a", "AGX Xavier", 10, 1 << 30, 3)


def test_the_same_device_meets_the_same_in_the_same_round():
    fleet = FleetSettings(seed=3)
    assert conditions_of(SPEC, 5, fleet) == conditions_of(SPEC, 5, fleet)
    assert conditions_of(SPEC, 5, fleet) != conditions_of(SPEC, 6, fleet)
    assert conditions_of(SPEC, 5, fleet) != conditions_of(SPEC, 5, FleetSettings(seed=4))


def test_power_modes_hold_for_twenty_rounds():
    modes = [conditions_of(SPEC, t, FleetSettings(seed=1)).power_mode for t in range(200)]
    assert all(len(set(modes[start : start + 20])) == 1 for start in range(0, 200, 20))
    assert len(set(modes)) > 1


def test_loads_and_bandwidths_stay_in_their_ranges():
    conditions = [conditions_of(SPEC, t, FleetSettings()) for t in range(300)]
    multipliers = BOARDS["AGX Xavier"].mode_multipliers
    loads = [c.slowdown / multipliers[c.power_mode] for c in conditions]
    assert 1.0 * math.exp(-0.4) < min(loads) < 1.1
    assert 1.5 < max(loads) < 1.6 * math.exp(0.4)
    rates = [c.bits_per_second for c in conditions]
    assert BANDWIDTH_RANGE[0] <= min(rates)
    assert max(rates) <= BANDWIDTH_RANGE[1]
    assert sum(rates) / len(rates) == pytest.approx(4e6, rel=0.1)


def test_drop_outs_and_dips_come_as_often_as_asked():
    fleet = FleetSettings(drop_out_probability=0.2, bandwidth_dip_probability=0.5)
    conditions = [conditions_of(SPEC, t, fleet) for t in range(500)]
    assert sum(c.dropped for c in conditions) / 500 == pytest.approx(0.2, abs=0.06)
    assert sum(c.bits_per_second < 1e6 for c in conditions) / 500 == pytest.approx(0.5, abs=0.08)
    assert not any(conditions_of(SPEC, t, FleetSettings()).dropped for t in range(100))


def test_seconds_of_work_by_hand():
    fleet = FleetSettings(base_step_seconds=2.0)
    conditions = conditions_of(SPEC, 0, fleet)
    seconds = compute_seconds(SPEC, conditions, num_steps=10, pruning_ratio=0.5, rank=32, fleet=fleet)
    assert seconds == pytest.approx(10 * 2.0 * 0.25 * conditions.slowdown * (0.15 + 0.39 + 0.14))


def test_a_measured_law_takes_the_place_of_the_assumed_one():
    fleet = FleetSettings(step_law=StepLaw(0.5, 0.4, 0.1))
    conditions = conditions_of(SPEC, 0, fleet)
    seconds = compute_seconds(SPEC, conditions, num_steps=1, pruning_ratio=0.5, rank=32, fleet=fleet)
    assert seconds == pytest.approx(0.25 * conditions.slowdown * (0.5 + 0.2 + 0.2))


def test_a_fleet_has_the_papers_mix_of_boards():
    boards = [spec.board for spec in make_specs([5] * 80, seed=0, rounds=10)]
    assert {name: boards.count(name) for name in BOARDS} == {"TX2": 30, "Xavier NX": 40, "AGX Xavier": 10}


def test_a_fleet_may_have_boards_of_its_own():
    boards = ["TX2", "TX2", "AGX Xavier"]
    specs = make_specs([5, 6, 7], seed=0, rounds=10, boards=boards)
    assert sorted(spec.board for spec in specs) == sorted(boards)


@pytest.mark.parametrize("num_devices", [1, 2, 3, 7, 97])
def test_a_fleet_of_any_size_has_distinct_devices(num_devices):
    specs = make_specs(list(range(1, num_devices + 1)), seed=1, rounds=10)
    assert [spec.num_examples for spec in specs] == list(range(1, num_devices + 1))
    assert len({spec.device_id for spec in specs}) == num_devices


def test_churn_makes_devices_join_late_or_leave_early_but_never_the_first():
    specs = make_specs([5] * 40, seed=2, rounds=10, churn=0.5)
    joins = [spec for spec in specs if spec.join_round > 0]
    leaves = [spec for spec in specs if spec.leave_round is not None]
    assert joins
    assert leaves
    assert specs[0].present(0)
    assert specs[0].present(9)
    assert not joins[0].present(joins[0].join_round - 1)
    assert not leaves[0].present(leaves[0].leave_round)
    assert all(spec.join_round == 0 and spec.leave_round is None for spec in make_specs([5] * 40, seed=2, rounds=10))


def test_an_unknown_board_or_distance_is_refused():
    with pytest.raises(ValueError, match="board must be one of TX2, Xavier NX, AGX Xavier, found Nano"):
        DeviceSpec("a", "Nano", 1, 1, 0)
    with pytest.raises(ValueError, match=r"bandwidth_group must be in 0..3, found 4"):
        DeviceSpec("a", "TX2", 1, 1, 4)


def test_impossible_worlds_are_refused():
    with pytest.raises(ValueError, match=r"drop_out_probability must be in 0..1, found 2"):
        FleetSettings(drop_out_probability=2)
    with pytest.raises(ValueError, match="base_step_seconds must be positive, found 0"):
        FleetSettings(base_step_seconds=0)
