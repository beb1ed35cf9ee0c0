"""The square of arms that the bandits refine: ratio along one side, the logarithm of the rank along the other.

Comes in: arms and a run's ranges. Goes out: points of [0, 1] x [0, 1], and rectangles of it.

Source: docs/algorithm.md, section 6.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedspine_server.arms import Arm
from fedspine_server.settings import RunSettings

Leaf = tuple[float, float, float, float]  # low x1, high x1, low x2, high x2
WHOLE: Leaf = (0.0, 1.0, 0.0, 1.0)


def ranges(settings: RunSettings) -> dict[str, Any]:
    """Returns what `position` needs to know of a run, JSON-ready."""
    return {"max_ratio": settings.max_pruning_ratio, "ranks": list(settings.ranks)}


def position(state: Mapping[str, Any], arm: Arm) -> tuple[float, float]:
    """Returns where an arm lies: (ratio / largest ratio, log rank from smallest to largest)."""
    smallest, largest = state["ranks"][0], state["ranks"][-1]
    span = math.log(largest / smallest)
    x2 = math.log(arm.rank / smallest) / span if span > 0 else 0.0
    return (arm.pruning_ratio / state["max_ratio"] if state["max_ratio"] > 0 else 0.0, x2)


def inside(leaf: Sequence[float], x: Sequence[float]) -> bool:
    """Half-open rectangles that close at 1, so that each point lies in exactly one of a partition."""
    return all(
        low <= value and (value < high or high >= 1.0)
        for value, low, high in ((x[0], leaf[0], leaf[1]), (x[1], leaf[2], leaf[3]))
    )
