"""HOO: hierarchical optimistic optimisation, one tree of halves a device; the round waits for everyone.

Comes in: allowed arms and, after each round, rewards. Goes out: an arm for each device. A node is a rectangle of the
square of arms, its children are its halves across the longer side. With n pulls in all, a node of depth h with T pulls
and mean reward m has

    U = m + sqrt(2 ln n / T) + nu rho^h      B = min(U, max B of its children),  infinite where never pulled

and a round walks from the root to the child with the larger B until it leaves the tree; the node it ends in joins the
tree. Nodes are kept as paths ("01" is the second half of the first half), pulls as the nodes they were made in; equal
bounds go to the upper half.

Source: Bubeck, Munos, Stoltz, Szepesvari: X-Armed Bandits (JMLR 12, 2011), truncated at its depth for the run's length.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from fedspine_server.arms import Arm
from fedspine_server.controllers.contract import Choice, Context, ControllerState, DeviceFacts, check_options
from fedspine_server.controllers.unit_square import WHOLE, Leaf, inside, position, ranges
from fedspine_server.reward import Outcome, rewards
from fedspine_server.settings import RunSettings

DEFAULT_OPTIONS = {"nu": 1.0, "rho": 0.5}
Pull = tuple[str, float]  # the node it was made in, reward


def init(settings: RunSettings) -> ControllerState:
    """Returns the state before the first round; options `nu` and `rho`, the assumed smoothness.

    Raises:
        ValueError: An unknown option, nu not positive, rho not between 0 and 1.
    """
    check_options(settings, tuple(DEFAULT_OPTIONS))
    options = {**DEFAULT_OPTIONS, **settings.controller_options}
    if not options["nu"] > 0 or not 0 < options["rho"] < 1:
        raise ValueError(f"hoo takes nu above 0 and rho in 0..1, found {options['nu']} and {options['rho']}")
    return {**options, **ranges(settings), "rounds": settings.rounds, "agents": {}}


def propose(state: ControllerState, context: Context) -> tuple[tuple[Choice, ...], ControllerState]:
    """Returns for each device the allowed arm nearest to the middle of the node its walk ends in."""
    choices = []
    for device in context.devices:
        arm, reason = _pick(state, state["agents"].get(device.device_id, _new_agent()), device)
        choices.append(Choice(device.device_id, arm.pruning_ratio, arm.rank, context.settings.steps_per_round, reason))
    return tuple(choices), state


def observe(state: ControllerState, outcomes: Sequence[Outcome]) -> ControllerState:
    """Returns the state with each merged device's pull recorded and the node it ended in made part of its tree."""
    agents, worth = dict(state["agents"]), rewards(outcomes)
    deepest = max_depth(state["rounds"], nu=state["nu"], rho=state["rho"])
    for outcome in outcomes:
        if outcome.device_id not in worth:
            continue
        agent = agents.get(outcome.device_id, _new_agent())
        x = position(state, Arm(outcome.pruning_ratio, outcome.rank))
        leaf = leaf_of(agent["tree"], x)
        pulls = [*agent["pulls"], [leaf, worth[outcome.device_id]]]
        agents[outcome.device_id] = {"tree": grown(agent["tree"], leaf, deepest=deepest), "pulls": pulls}
    return {**state, "agents": agents}


def max_depth(rounds: int, *, nu: float, rho: float) -> int:
    """Returns the depth below which nodes of a run are not split: the regret bound gains nothing there."""
    return max(0, math.ceil((math.log(max(rounds, 1)) / 2 - math.log(1 / nu)) / math.log(1 / rho)))


def rectangle(node: str) -> Leaf:
    """Returns the rectangle of a node: for each letter the lower (0) or upper (1) half across the longer side."""
    low1, high1, low2, high2 = WHOLE
    for letter in node:
        if high1 - low1 >= high2 - low2:
            middle = (low1 + high1) / 2
            low1, high1 = (middle, high1) if letter == "1" else (low1, middle)
        else:
            middle = (low2 + high2) / 2
            low2, high2 = (middle, high2) if letter == "1" else (low2, middle)
    return low1, high1, low2, high2


def bounds(tree: Collection[str], pulls: Sequence[Pull], *, nu: float, rho: float, rounds: int) -> dict[str, float]:
    """Returns B of every node of the tree and of their children.

    Args:
        tree: Nodes that were split; empty before the first pull.
        pulls: What was played and what it brought.
        nu: Assumed range of the reward over the whole square.
        rho: What is left of it in a half.
        rounds: Pulls in all (n).
    """
    nodes = sorted({"", *(node + letter for node in tree for letter in "01")}, key=len, reverse=True)
    found: dict[str, float] = {}
    for node in nodes:
        values = [reward for leaf, reward in pulls if leaf.startswith(node)]
        if not values:
            found[node] = math.inf
            continue
        padding = math.sqrt(2 * math.log(max(rounds, 1)) / len(values))
        optimistic = float(np.mean(values)) + padding + nu * rho ** len(node)
        found[node] = min(optimistic, max((found[node + half] for half in "01" if node in tree), default=math.inf))
    return found


def walk(tree: Collection[str], found: Mapping[str, float], playable: Sequence[tuple[float, float]]) -> str:
    """Returns the node a round ends in, walking only where a playable point lies; there is at least one."""
    node = ""
    while node in tree:
        halves = [node + half for half in "01" if any(inside(rectangle(node + half), x) for x in playable)]
        node = max(halves, key=lambda half: (found[half], half))
    return node


def leaf_of(tree: Collection[str], x: tuple[float, float]) -> str:
    """Returns the node outside the tree that holds a point: where the walk that played it ended."""
    leaf = ""
    while leaf in tree:
        leaf += "0" if inside(rectangle(leaf + "0"), x) else "1"
    return leaf


def grown(tree: Sequence[str], leaf: str, *, deepest: int) -> list[str]:
    """Returns the tree with a leaf split, down to a depth."""
    return [*tree, leaf] if len(leaf) <= deepest else list(tree)


def _new_agent() -> ControllerState:
    return {"tree": [""], "pulls": []}


def _pick(state: ControllerState, agent: ControllerState, device: DeviceFacts) -> tuple[Arm, str]:
    points = {arm: position(state, arm) for arm in device.arms}
    found = bounds(agent["tree"], agent["pulls"], nu=state["nu"], rho=state["rho"], rounds=state["rounds"])
    node = walk(agent["tree"], found, list(points.values()))
    low1, high1, low2, high2 = rectangle(node)
    middle = ((low1 + high1) / 2, (low2 + high2) / 2)
    within = [arm for arm, x in points.items() if inside((low1, high1, low2, high2), x)]
    arm = min(within, key=lambda arm: (math.dist(points[arm], middle), arm))
    count = sum(leaf.startswith(node) for leaf, _ in agent["pulls"])
    bound = "unvisited" if math.isinf(found[node]) else f"bound {found[node]:.3f}, count {count}"
    return arm, f"node {node or 'root'} of {len(agent['tree'])} split: {bound}"
