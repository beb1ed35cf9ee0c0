"""HOO and the grid's bandit: laws of any play, and what they find."""

import dataclasses
import math

import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspine_server.arms import Arm, cost_law
from fedspine_server.controllers import CONTROLLERS, Context, DeviceFacts, grid_ucb, hoo
from fedspine_server.controllers.unit_square import inside, position, ranges
from fedspine_server.reward import Outcome
from fedspine_server.settings import RunSettings

RANKS = (2, 8, 32)
ARMS = tuple(Arm(ratio, rank) for ratio in (0.0, 0.2, 0.35, 0.5, 0.7) for rank in RANKS)
SETTINGS = RunSettings(rounds=40, ranks=RANKS)
points = st.tuples(st.floats(0, 1), st.floats(0, 1))
pulls = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)), max_size=12)
BANDITS = [("grid-ucb", {}), ("sucb", {"mode": "paper"}), ("sucb", {"mode": "capped"})]


def grown_by(played, deepest=6):
    """The tree and the pulls, as nodes, after points were played."""
    tree, made = [""], []
    for x1, x2, reward in played:
        leaf = hoo.leaf_of(tree, (x1, x2))
        made.append((leaf, reward))
        tree = hoo.grown(tree, leaf, deepest=deepest)
    return tree, made


def leaves(tree):
    return [node + letter for node in tree for letter in "01" if node + letter not in tree]


@given(pulls, points)
@settings(max_examples=50)
def test_hoo_leaves_hold_every_point_once(played, point):
    assert sum(inside(hoo.rectangle(leaf), point) for leaf in leaves(grown_by(played)[0])) == 1


@given(pulls)
@settings(max_examples=50)
def test_hoo_bounds_never_exceed_the_optimism_of_a_node_nor_its_best_child(played):
    tree, made = grown_by(played)
    found = hoo.bounds(tree, made, nu=1.0, rho=0.5, rounds=100)
    for node in tree:
        children = max(found[node + "0"], found[node + "1"])
        values = [reward for leaf, reward in made if leaf.startswith(node)]
        assert found[node] <= children or not values
        if values:
            optimism = np.mean(values) + math.sqrt(2 * math.log(100) / len(values)) + 0.5 ** len(node)
            assert found[node] <= optimism + 1e-12
        else:
            assert math.isinf(found[node])


@given(pulls, st.lists(points, min_size=1, max_size=5))
@settings(max_examples=50)
def test_hoo_ends_in_a_leaf_that_holds_a_playable_point(played, playable):
    tree, made = grown_by(played)
    node = hoo.walk(tree, hoo.bounds(tree, made, nu=1.0, rho=0.5, rounds=50), playable)
    assert node not in tree
    assert any(inside(hoo.rectangle(node), x) for x in playable)


def test_hoo_halves_the_longer_side_and_the_first_side_of_a_square():
    assert hoo.rectangle("1") == (0.5, 1.0, 0.0, 1.0)
    assert hoo.rectangle("10") == (0.5, 1.0, 0.0, 0.5)
    assert hoo.rectangle("101") == (0.75, 1.0, 0.0, 0.5)


def test_hoo_bounds_by_hand():
    # Two pulls in the lower half, none in the upper: n = 4, so the padding is sqrt(2 ln 4 / 2) = 1.1774.
    found = hoo.bounds([""], [("0", 0.4), ("0", 0.6)], nu=1.0, rho=0.5, rounds=4)
    assert math.isinf(found["1"])
    assert found["0"] == pytest.approx(0.5 + math.sqrt(math.log(4)) + 0.5)
    assert found[""] == pytest.approx(0.5 + math.sqrt(math.log(4)) + 1.0)


@given(st.lists(st.tuples(st.sampled_from(ARMS), st.floats(0, 3)), max_size=8))
@settings(max_examples=30)
def test_grid_counts_are_discounted_pulls(played):
    state = grid_ucb.init(dataclasses.replace(SETTINGS, controller_options={"discount": 0.5}))
    for arm, gain in played:
        state = grid_ucb.observe(state, [outcome("a", arm, gain)])
    total = sum(count for count, _ in state["cells"].values())
    assert total == pytest.approx(sum(0.5**age for age in range(len(played))))
    assert all(0 <= value <= count + 1e-9 for count, value in state["cells"].values())


def test_grid_cells_are_fifths_of_the_ratios_at_one_rank():
    state = grid_ucb.init(SETTINGS)
    assert grid_ucb.cell_of(state, Arm(0.7, 8)) == "ratio 5/5 rank 8"
    assert grid_ucb.cell_of(state, Arm(0.13, 2)) == "ratio 1/5 rank 2"


def test_grid_devices_of_a_round_do_not_all_play_one_cell():
    choices, _ = grid_ucb.propose(grid_ucb.init(SETTINGS), context([f"d{i}" for i in range(9)]))
    assert len({(choice.pruning_ratio, choice.rank) for choice in choices}) > 4


@pytest.mark.parametrize(("name", "options"), BANDITS)
def test_bandits_come_to_play_the_arms_that_pay(name, options):
    run = dataclasses.replace(SETTINGS, controller=name, controller_options=options)
    controller, played = CONTROLLERS[name], []
    state = controller.init(run)
    for round_index in range(40):
        choices, state = controller.propose(state, context(["a", "b"], run, round_index))
        assert all(choice.reason for choice in choices)
        outcomes = [outcome(c.device_id, Arm(c.pruning_ratio, c.rank), paid(c)) for c in choices]
        state = controller.observe(state, outcomes)
        played += [(round_index, paid(choice)) for choice in choices]
    late = np.mean([gain for when, gain in played if when >= 20])
    everything = np.mean([paid(arm) for arm in ARMS])
    assert late > everything + (0.05 if options != {"mode": "paper"} else -0.3)  # paper mode plays nearly at random


def test_hoo_comes_to_play_the_arms_that_pay():
    tree, made, rewards = [""], [], []
    grid = [(a / 8, b / 8) for a in range(9) for b in range(9)]
    for _ in range(160):
        node = hoo.walk(tree, hoo.bounds(tree, made, nu=0.3, rho=0.5, rounds=160), grid)
        low1, high1, low2, high2 = hoo.rectangle(node)
        rewards.append((1 - abs((low1 + high1) / 2 - 0.3)) * ((low2 + high2) / 2))
        made.append((node, rewards[-1]))
        tree = hoo.grown(tree, node, deepest=hoo.max_depth(160, nu=0.3, rho=0.5))
    assert np.mean(rewards[100:]) > np.mean(rewards[:60]) + 0.03


def paid(arm):
    x1, x2 = position(ranges(SETTINGS), Arm(arm.pruning_ratio, arm.rank))
    return 2 * max(0.0, 1 - 0.7 * abs(x1 - 0.3) - 0.7 * abs(x2 - 1.0))


def context(names, run=SETTINGS, round_index=0):
    facts = tuple(DeviceFacts(name, 10, 1 / len(names), ARMS) for name in names)
    return Context(run, round_index, 0.2, True, cost_law(toy.layout(), "float16"), facts)


def outcome(name, arm, gain):
    return Outcome(name, arm.pruning_ratio, arm.pruning_ratio, arm.rank, 10, True, 1.0, 0.1, 100, 3.0, 3.0 - gain, 1.0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hoo", {"rho": 1.5}, "hoo takes nu above 0 and rho in 0..1"),
        ("grid-ucb", {"discount": 0}, "grid-ucb takes a discount in 0..1"),
        ("hoo", {"mode": "paper"}, "controller hoo has no option mode"),
        ("sucb", {"rank": 3}, r"sucb rank must be one of ranks \[2, 8, 32\], found 3"),
    ],
)
def test_options_that_cannot_be_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        CONTROLLERS[name].init(dataclasses.replace(SETTINGS, controller=name, controller_options=options))


def test_sucb_with_a_rank_plays_that_rank_alone():
    run = dataclasses.replace(SETTINGS, controller="sucb", controller_options={"rank": 8})
    choices, _ = CONTROLLERS["sucb"].propose(CONTROLLERS["sucb"].init(run), context(["a", "b", "c"], run))
    assert {choice.rank for choice in choices} == {8}


def test_fixed_gives_ranks_by_memory_and_ranks_that_grow():
    run = dataclasses.replace(SETTINGS, controller="fixed", controller_options={"memory_per_rank": 8})
    facts = tuple(DeviceFacts(str(gib), 10, 0.25, ARMS, gib << 30) for gib in (2, 8, 16, 32))
    choices, _ = CONTROLLERS["fixed"].propose({}, dataclasses.replace(context(["a"], run), devices=facts))
    assert [choice.rank for choice in choices] == [2, 8, 8, 32]
    grow = dataclasses.replace(SETTINGS, controller="fixed", fixed_rank=32, controller_options={"grow_from": 2})
    grown = [CONTROLLERS["fixed"].propose({}, context(["a"], grow, when))[0][0].rank for when in (0, 16, 32, 39)]
    assert grown == [2, 8, 32, 32]
