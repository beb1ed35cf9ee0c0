"""Discounted UCB on a grid of arms, one table for the whole fleet; the round waits for everyone.

Comes in: allowed arms and, after each round, rewards. Goes out: an arm for each device. A cell is a fifth of the ratios
at one rank. Pulls lose weight from round to round, so a cell that was good once is tried again later. Devices of one
round choose in turn and count each other's choices, so they do not all play the same cell.

Source: Garivier, Moulines: On Upper-Confidence Bound Policies for Switching Bandit Problems (ALT 2011).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedspine_server.arms import Arm
from fedspine_server.controllers.contract import Choice, Context, ControllerState, DeviceFacts, check_options
from fedspine_server.controllers.unit_square import position, ranges
from fedspine_server.reward import Outcome, rewards
from fedspine_server.settings import RunSettings

NUM_RATIO_CELLS = 5
DEFAULT_OPTIONS = {"discount": 0.95, "padding": 0.2}


def init(settings: RunSettings) -> ControllerState:
    """Returns the state before the first round; options `discount` (weight kept a round) and `padding` (of the bound).

    Raises:
        ValueError: An unknown option, a discount outside 0..1 or a negative padding.
    """
    check_options(settings, tuple(DEFAULT_OPTIONS))
    options = {**DEFAULT_OPTIONS, **settings.controller_options}
    if not 0 < options["discount"] <= 1 or options["padding"] < 0:
        raise ValueError(f"grid-ucb takes a discount in 0..1 and a padding of 0 or more, found {options}")
    return {**options, **ranges(settings), "cells": {}}


def propose(state: ControllerState, context: Context) -> tuple[tuple[Choice, ...], ControllerState]:
    """Returns for each device a random allowed arm of the cell with the highest bound."""
    pending: dict[str, float] = {}
    choices = []
    for device in context.devices:
        cell, reason = _cell(state, device, pending)
        pending[cell] = pending.get(cell, 0.0) + 1
        arms = [arm for arm in device.arms if cell_of(state, arm) == cell]
        arm = arms[int(context.generator(device.device_id).integers(len(arms)))]
        choices.append(Choice(device.device_id, arm.pruning_ratio, arm.rank, context.settings.steps_per_round, reason))
    return tuple(choices), state


def observe(state: ControllerState, outcomes: Sequence[Outcome]) -> ControllerState:
    """Returns the state with the merged devices' pulls added and older ones discounted."""
    worth = rewards(outcomes)
    cells = {
        name: [count * state["discount"], total * state["discount"]] for name, (count, total) in state["cells"].items()
    }
    for outcome in sorted(outcomes, key=lambda outcome: outcome.device_id):
        if outcome.device_id in worth:
            name = cell_of(state, Arm(outcome.pruning_ratio, outcome.rank))
            count, total = cells.get(name, (0.0, 0.0))
            cells[name] = [count + 1, total + worth[outcome.device_id]]
    return {**state, "cells": cells if worth else state["cells"]}


def cell_of(state: ControllerState, arm: Arm) -> str:
    """Returns the name of an arm's cell."""
    ratio = min(NUM_RATIO_CELLS - 1, int(position(state, arm)[0] * NUM_RATIO_CELLS))
    return f"ratio {ratio + 1}/{NUM_RATIO_CELLS} rank {arm.rank}"


def _cell(state: ControllerState, device: DeviceFacts, pending: dict[str, float]) -> tuple[str, str]:
    """The allowed cell with the highest bound; one that nobody has played or chosen yet comes first."""
    allowed = sorted({cell_of(state, arm) for arm in device.arms})
    known = {name: state["cells"].get(name, (0.0, 0.0)) for name in allowed}
    counts = {name: known[name][0] + pending.get(name, 0.0) for name in allowed}
    played = sum(counts.values())
    means = {name: known[name][1] / known[name][0] if known[name][0] > 0 else 0.0 for name in allowed}

    def bound(name: str) -> float:
        if counts[name] == 0:
            return math.inf
        return means[name] + float(state["padding"]) * math.sqrt(math.log(max(played, 1.0)) / counts[name])

    best = max(allowed, key=bound)
    found = bound(best)
    text = "unvisited" if math.isinf(found) else f"mean {means[best]:.3f}, count {counts[best]:.1f}, bound {found:.3f}"
    return best, f"{best}: {text}"
