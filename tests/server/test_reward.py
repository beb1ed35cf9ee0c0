import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedspine_server.reward import Outcome, relative_improvements, rewards


def outcome(name, *, before=2.0, after=1.0, seconds=10.0, norm=1.0, ratio=0.0, last=0.0, merged=True):
    return Outcome(name, ratio, last, 8, 20, merged, seconds - 1.0, 1.0, 100, before, after, norm)


def test_two_devices_by_hand():
    # Improvements 1 and 3: median 2, relative 0.5 and 1.5. Norms 1 and 2. The first ratio grows by 0.05 of 0.1.
    result = rewards([outcome("a", seconds=5.0, ratio=0.05), outcome("b", before=4.0, seconds=15.0, norm=2.0)])
    assert result["a"] == pytest.approx((0.5 * 0.25 + 0.25 * 0.5 + 0.25 * 0.5) / 1.5)
    assert result["b"] == pytest.approx((0.5 * 0.75 + 0.25 * 0.0 + 0.25 * 1.0) / 1.5)


def test_what_was_not_merged_gets_no_reward():
    assert set(rewards([outcome("a"), outcome("b", merged=False)])) == {"a"}
    assert rewards([outcome("b", merged=False)]) == {}


def test_where_the_median_device_got_worse_any_improvement_counts_in_full():
    worse, better = outcome("a", after=3.0), outcome("b", after=1.9)
    assert relative_improvements([worse, worse, better]) == [0.0, 0.0, 2.0]


@given(
    st.lists(
        st.tuples(st.floats(0, 10), st.floats(0, 10), st.floats(1.1, 500), st.floats(0, 50), st.floats(0, 0.7)),
        min_size=1,
    )
)
def test_rewards_stay_in_their_bounds(rows):
    outcomes = [
        outcome(str(index), before=row[0], after=row[1], seconds=row[2], norm=row[3], ratio=row[4])
        for index, row in enumerate(rows)
    ]
    assert all(0 <= value <= 1 for value in rewards(outcomes).values())
