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

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedspine_server.arms import Arm
from fedspine_server.controllers.contract import Choice, Context, ControllerState, DeviceFacts, check_options
from fedspine_server.controllers.unit_square import WHOLE, inside, position, ranges
from fedspine_server.reward import Outcome, rewards
from fedspine_server.settings import RunSettings


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
    """Returns the state before the first round.

    Options: `mode`, `capped` (default) or `paper`; `rank`, the only one to be played (FedMP chooses ratios alone).

    Raises:
        ValueError: An unknown option or mode, or a rank that is not the run's.
    """
    check_options(settings, ("mode", "rank"))
    rank = settings.controller_options.get("rank")
    if rank is not None and rank not in settings.ranks:
        raise ValueError(f"sucb rank must be one of ranks {list(settings.ranks)}, found {rank}")
    mode = settings.controller_options.get("mode", "capped")
    if mode not in MODES:
        raise ValueError(f"sucb mode must be one of {', '.join(MODES)}, found {mode}")
    return {"mode": mode, **ranges(settings), "rank": rank, "agents": {}}


def propose(state: ControllerState, context: Context) -> tuple[tuple[Choice, ...], ControllerState]:
    """Returns for each device the allowed arm nearest to a uniform draw from its leaf with the highest bound."""
    choices = []
    for device in context.devices:
        agent = state["agents"].get(device.device_id, {"leaves": [list(WHOLE)], "pulls": []})
        arm, reason = _pick(state, agent, _playable(state, device), context)
        choices.append(Choice(device.device_id, arm.pruning_ratio, arm.rank, context.settings.steps_per_round, reason))
    return tuple(choices), state


def observe(state: ControllerState, outcomes: Sequence[Outcome]) -> ControllerState:
    """Returns the state with each merged device's pull recorded, older pulls discounted, and its leaf split."""
    mode = MODES[state["mode"]]
    agents, worth = dict(state["agents"]), rewards(outcomes)
    for outcome in outcomes:
        reward = worth.get(outcome.device_id)
        if reward is None:
            continue
        agent = agents.get(outcome.device_id, {"leaves": [list(WHOLE)], "pulls": []})
        x1, x2 = position(state, Arm(outcome.pruning_ratio, outcome.rank))
        pulls = [[a, b, value, weight * mode.discount] for a, b, value, weight in agent["pulls"]]
        pulls.append([x1, x2, reward, 1.0])
        agents[outcome.device_id] = {"leaves": _split(mode, agent["leaves"], pulls, (x1, x2)), "pulls": pulls}
    return {**state, "agents": agents}


def _playable(state: ControllerState, device: DeviceFacts) -> DeviceFacts:
    arms = tuple(arm for arm in device.arms if state.get("rank") in (None, arm.rank))
    return dataclasses.replace(device, arms=arms or device.arms)  # a device too small for that rank plays what it can


def _pick(state: ControllerState, agent: ControllerState, device: DeviceFacts, context: Context) -> tuple[Arm, str]:
    mode = MODES[state["mode"]]
    generator = context.generator(device.device_id)
    positions = [(arm, position(state, arm)) for arm in device.arms]
    # A leaf without an allowed arm cannot be played; the allowed arms always lie in some leaf.
    leaves = [leaf for leaf in agent["leaves"] if any(inside(leaf, x) for _, x in positions)]
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
    allowed = [(arm, x) for arm, x in positions if inside(leaf, x)]
    arm = min(allowed, key=lambda item: (math.dist(item[1], drawn), item[0]))[0]
    bound_text = "unvisited" if math.isinf(best) else f"mean {mean:.3f}, count {count:.1f}, bound {best:.3f}"
    return arm, f"leaf {index + 1} of {len(agent['leaves'])}: {bound_text}"


def _statistics(leaf: Sequence[float], pulls: Sequence[Sequence[float]]) -> tuple[float, float]:
    within = [(reward, weight) for x1, x2, reward, weight in pulls if inside(leaf, (x1, x2))]
    count = sum(weight for _, weight in within)
    return count, sum(reward * weight for reward, weight in within) / count if count > 0 else 0.0


def _split(
    mode: Mode, leaves: list[list[float]], pulls: Sequence[Sequence[float]], x: tuple[float, float]
) -> list[list[float]]:
    index = next(i for i, leaf in enumerate(leaves) if inside(leaf, x))
    low1, high1, low2, high2 = leaf = leaves[index]
    num_pulls = sum(inside(leaf, (pull[0], pull[1])) for pull in pulls)
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
