import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st

from fedspine_server.arms import (
    Arm,
    allowed_arms,
    cost_law,
    in_cooldown,
    may_revive,
    num_warmup_rounds,
    ratio_band,
    schedule_ratio,
)
from fedspine_server.settings import RunSettings

PLENTY = 1 << 40


def test_the_schedule_is_cubic_between_warmup_and_cooldown():
    settings = RunSettings(rounds=6, target_sparsity=0.5, warmup_fraction=0.1, cooldown_fraction=0.2)
    # One round of warm-up, one of cool-down, x = 0.2, 0.4, 0.6, 0.8 in between: 0.5 * (1 - (1 - x)^3).
    expected = [0.0, 0.244, 0.392, 0.468, 0.496, 0.5]
    assert [schedule_ratio(settings, t) for t in range(6)] == pytest.approx(expected)


def test_a_run_without_a_target_never_prunes():
    settings = RunSettings(rounds=9, target_sparsity=0.0)
    assert {schedule_ratio(settings, t) for t in range(9)} == {0.0}
    arms = allowed_arms(settings, cost_law(toy.layout(), "float16"), 5, last_ratio=0.0, memory_bytes=PLENTY)
    assert {arm.pruning_ratio for arm in arms} == {0.0}


@given(rounds=st.integers(1, 40), target=st.floats(0.01, 0.7), data=st.data())
def test_the_schedule_only_grows_and_ends_at_its_target(rounds, target, data):
    settings = RunSettings(rounds=rounds, target_sparsity=target)
    ratios = [schedule_ratio(settings, t) for t in range(rounds)]
    assert ratios == sorted(ratios)
    assert ratios[-1] == target
    assert num_warmup_rounds(settings) >= 0
    t = data.draw(st.integers(0, rounds - 1))
    low, high = ratio_band(settings, t, last_ratio=data.draw(st.floats(0, 0.7)))
    assert 0 <= low <= high <= 0.7


def test_the_ratio_grows_by_a_tenth_a_round_at_most():
    settings = RunSettings(rounds=40, target_sparsity=0.5)
    assert schedule_ratio(settings, 6) == pytest.approx(0.5 * (1 - (26 / 29) ** 3))
    assert ratio_band(settings, 6, last_ratio=0.12) == pytest.approx((0.0, 0.22))


def test_a_short_run_reaches_its_target_even_where_a_tenth_a_round_would_not():
    settings = RunSettings(rounds=4, target_sparsity=0.7)
    low, high = ratio_band(settings, 2, last_ratio=0.0)
    assert schedule_ratio(settings, 2) == pytest.approx(0.7 * (1 - (1 / 3) ** 3))
    assert low == high == pytest.approx(schedule_ratio(settings, 2) - 0.15) or high > low


def test_a_device_that_was_away_is_measured_against_last_rounds_schedule():
    settings = RunSettings(rounds=20, target_sparsity=0.5)
    assert ratio_band(settings, 8, last_ratio=0.0)[1] == pytest.approx(schedule_ratio(settings, 7) + 0.1)


def test_members_come_back_until_seventy_percent_of_the_rounds_and_in_cooldown():
    settings = RunSettings(rounds=20, cooldown_fraction=0.2)
    assert [t for t in range(20) if not may_revive(settings, t)] == [14, 15]
    assert [t for t in range(20) if in_cooldown(settings, t)] == [16, 17, 18, 19]


def test_masks_only_shrink_while_members_may_not_come_back():
    settings = RunSettings(rounds=20, target_sparsity=0.5)
    assert ratio_band(settings, 14, last_ratio=0.55)[0] == 0.55


def test_cooldown_has_the_target_alone():
    settings = RunSettings(rounds=20, target_sparsity=0.5, ranks=(2, 8))
    arms = allowed_arms(settings, cost_law(toy.layout(), "float16"), 19, last_ratio=0.65, memory_bytes=PLENTY)
    assert arms == (Arm(0.5, 2), Arm(0.5, 8))


def test_the_schedules_own_ratio_is_among_the_arms():
    settings = RunSettings(rounds=20, target_sparsity=0.5)
    arms = allowed_arms(settings, cost_law(toy.layout(), "float16"), 5, last_ratio=0.2, memory_bytes=PLENTY)
    assert schedule_ratio(settings, 5) in {arm.pruning_ratio for arm in arms}
    assert list(arms) == sorted(set(arms))


def test_a_device_gets_only_what_fits_its_memory_and_at_least_the_cheapest():
    settings, law = RunSettings(rounds=20, ranks=(2, 64)), cost_law(toy.layout(), "float16")
    limit = int(law.memory_bytes(Arm(0.0, 2)))
    arms = allowed_arms(settings, law, 0, last_ratio=0.0, memory_bytes=limit)
    assert arms == (Arm(0.0, 2),)
    assert allowed_arms(settings, law, 0, last_ratio=0.0, memory_bytes=1) == (Arm(0.0, 2),)


def test_transfer_bytes_are_those_of_the_messages():
    law = cost_law(toy.layout(), "float16")
    # A rank: in + out of each matrix, 2 * (q 24 + o 24 + up 28 + down 28) = 208, of which 2 * (12 + 12 + 16 + 16) = 112
    # can go.
    # Constant: importances and keep 6 * 40, mean inputs 2 * 2 * 28, classifier 4 * 3.
    constant = 240 + 112 + 12
    assert law.transfer_bytes(Arm(0.5, 2), revive=True) == 2 * 2 * (96 + 56) + 2 * 2 * 208 + 2 * constant
    assert law.transfer_bytes(Arm(0.5, 2), revive=False) == 2 * 2 * 2 * (96 + 56) + 2 * constant


@pytest.mark.parametrize(("dtype", "up"), [("int8", 1 + 2 / 64), ("int4", 0.5 + 2 / 64)])
def test_messages_of_integers_have_fewer_bytes_a_parameter_and_a_bit_a_member(dtype, up):
    law = cost_law(toy.layout(), dtype)
    constant = (2 + 1 / 8) * 40 + 112 + 12
    assert law.transfer_bytes(Arm(0.5, 2), revive=True) == 2 * up * (96 + 56) + 2 * (1 + 2 / 64) * 208 + 2 * constant


def test_one_shot_prunes_nothing_before_cool_down_and_everything_then():
    settings = RunSettings(rounds=10, schedule="one-shot", cooldown_fraction=0.3)
    assert [schedule_ratio(settings, t) for t in range(10)] == [0.0] * 7 + [0.5] * 3
    assert ratio_band(settings, 6, last_ratio=0.0) == (0.0, 0.0)
