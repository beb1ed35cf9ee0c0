"""S-UCB after FedSpine/FedMP: one agent a device, a discounted UCB over a partition of the square of arms that refines.

Comes in: allowed arms and, after each round, rewards. Goes out: an arm for each device; the round waits for everyone.
The square is x = (ratio / max ratio, log rank from smallest to largest); each leaf is a rectangle of it. Pulls are kept
and the discounted counts and means of a leaf computed from them, so a split needs no bookkeeping.

Two modes: `paper` splits at every pull without a cap; `capped` waits for three pulls and keeps at most 24 leaves. In a
model of the fleet the uncapped form returns to near random play after about 100 pulls: counts of ever finer leaves
shrink and their bounds grow.

Source: FedSpine (arXiv 2501.02438), ingredients; FedMP's discounted form; the second dimension and the caps are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedspine_server.arms import Arm
from fedspine_server.controllers.contract import Choice, Context, ControllerState, DeviceFacts, check_options
from fedspine_server.reward import Outcome, rewards
from fedspine_server.settings import RunSettings

Leaf = tuple[float, float, float, float]  # low x1, high x1, low x2, high x2
WHOLE: Leaf = (0.0, 1.0, 0.0, 1.0)


@dataclass(frozen=True)
class Mode:
    """The constants of one mode.

    Attributes:
        discount: Weight of a pull falls by this a round (lambda).
        min_diameter: Leaves no wider than this are not split (theta).
        padding: Width of the confidence bound (c).
        min_pulls: Pulls a leaf needs before it is split.
        max_leaves: Leaves an agent has at most; None for no limit.
    """

    discount: float
    min_diameter: float
    padding: float
    min_pulls: int
    max_leaves: int | None


MODES = {
    "paper": Mode(discount=0.98, min_diameter=0.12, padding=math.sqrt(2), min_pulls=1, max_leaves=None),
    "capped": Mode(discount=0.98, min_diameter=0.12, padding=0.05, min_pulls=3, max_leaves=24),
}


def init(settings: RunSettings) -> ControllerState:
    """Returns the state before the first round; option `mode` is `capped` (default) or `paper`.

    Raises:
        ValueError: An unknown option or mode.
    """
    check_options(settings, ("mode",))
    mode = settings.controller_options.get("mode", "capped")
    if mode not in MODES:
        raise ValueError(f"sucb mode must be one of {', '.join(MODES)}, found {mode}")
    return {"mode": mode, "max_ratio": settings.max_pruning_ratio, "ranks": list(settings.ranks), "agents": {}}


def propose(state: ControllerState, context: Context) -> tuple[tuple[Choice, ...], ControllerState]:
    """Returns for each device the allowed arm nearest to a uniform draw from its leaf with the highest bound."""
    choices = []
    for device in context.devices:
        agent = state["agents"].get(device.device_id, {"leaves": [list(WHOLE)], "pulls": []})
        arm, reason = _pick(state, agent, device, context)
        choices.append(Choice(device.device_id, arm.pruning_ratio, arm.rank, context.settings.steps_per_round, reason))
    return tuple(choices), state


def observe(state: ControllerState, outcomes: Sequence[Outcome]) -> ControllerState:
    """Returns the state with each merged device's pull recorded, older pulls discounted, and its leaf split."""
    mode = MODES[state["mode"]]
    agents = dict(state["agents"])
    for outcome in outcomes:
        reward = rewards(outcomes).get(outcome.device_id)
        if reward is None:
            continue
        agent = agents.get(outcome.device_id, {"leaves": [list(WHOLE)], "pulls": []})
        x1, x2 = _position(state, Arm(outcome.pruning_ratio, outcome.rank))
        pulls = [[a, b, value, weight * mode.discount] for a, b, value, weight in agent["pulls"]]
        pulls.append([x1, x2, reward, 1.0])
        agents[outcome.device_id] = {"leaves": _split(mode, agent["leaves"], pulls, (x1, x2)), "pulls": pulls}
    return {**state, "agents": agents}


def _pick(state: ControllerState, agent: ControllerState, device: DeviceFacts, context: Context) -> tuple[Arm, str]:
    mode = MODES[state["mode"]]
    generator = context.generator(device.device_id)
    positions = [(arm, _position(state, arm)) for arm in device.arms]
    # A leaf without an allowed arm cannot be played; the allowed arms always lie in some leaf.
    leaves = [leaf for leaf in agent["leaves"] if any(_inside(leaf, x) for _, x in positions)]
    statistics = [_statistics(leaf, agent["pulls"]) for leaf in leaves]
    total = sum(count for count, _ in statistics)
    bounds = [
        mean + mode.padding * math.sqrt(math.log(max(total, 1.0)) / count) if count > 0 else math.inf
        for count, mean in statistics
    ]
    best = max(bounds)
    index = int(generator.choice([i for i, bound in enumerate(bounds) if bound == best]))
    leaf, (count, mean) = leaves[index], statistics[index]
    drawn = (generator.uniform(leaf[0], leaf[1]), generator.uniform(leaf[2], leaf[3]))
    inside = [(arm, x) for arm, x in positions if _inside(leaf, x)]
    arm = min(inside, key=lambda item: (math.dist(item[1], drawn), item[0]))[0]
    bound_text = "unvisited" if math.isinf(best) else f"mean {mean:.3f}, count {count:.1f}, bound {best:.3f}"
    return arm, f"leaf {index + 1} of {len(agent['leaves'])}: {bound_text}"


def _position(state: ControllerState, arm: Arm) -> tuple[float, float]:
    smallest, largest = state["ranks"][0], state["ranks"][-1]
    span = math.log(largest / smallest)
    x2 = math.log(arm.rank / smallest) / span if span > 0 else 0.0
    return (arm.pruning_ratio / state["max_ratio"] if state["max_ratio"] > 0 else 0.0, x2)


def _inside(leaf: Sequence[float], x: tuple[float, float]) -> bool:
    """Half-open rectangles that close at 1, so that each point lies in exactly one leaf."""
    return all(
        low <= value and (value < high or high >= 1.0)
        for value, low, high in ((x[0], leaf[0], leaf[1]), (x[1], leaf[2], leaf[3]))
    )


def _statistics(leaf: Sequence[float], pulls: Sequence[Sequence[float]]) -> tuple[float, float]:
    inside = [(reward, weight) for x1, x2, reward, weight in pulls if _inside(leaf, (x1, x2))]
    count = sum(weight for _, weight in inside)
    return count, sum(reward * weight for reward, weight in inside) / count if count > 0 else 0.0


def _split(
    mode: Mode, leaves: list[list[float]], pulls: Sequence[Sequence[float]], x: tuple[float, float]
) -> list[list[float]]:
    index = next(i for i, leaf in enumerate(leaves) if _inside(leaf, x))
    low1, high1, low2, high2 = leaf = leaves[index]
    num_pulls = sum(_inside(leaf, (pull[0], pull[1])) for pull in pulls)
    full = mode.max_leaves is not None and len(leaves) >= mode.max_leaves
    if full or num_pulls < mode.min_pulls or math.hypot(high1 - low1, high2 - low2) <= mode.min_diameter:
        return leaves
    if high1 - low1 >= high2 - low2:
        halves = [[low1, x[0], low2, high2], [x[0], high1, low2, high2]]
    else:
        halves = [[low1, high1, low2, x[1]], [low1, high1, x[1], high2]]
    if any(half[0] == half[1] or half[2] == half[3] for half in halves):
        return leaves  # the pull lies on the leaf's edge: one half would be empty
    return [*leaves[:index], *halves, *leaves[index + 1 :]]
