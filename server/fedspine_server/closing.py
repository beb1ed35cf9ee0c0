"""When a round ends: one rule for the simulated fleet and for real devices.

Comes in: when answers came, and how many may still come. Goes out: a moment. A round ends with the last answer, or at
its deadline, but never before a quorum has answered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def round_end(arrivals: Sequence[float], *, num_waiting: int, limit: float, quorum: int) -> float:
    """Returns when a round ends, from what is known so far; infinite while that cannot be said.

    Args:
        arrivals: Seconds from the round's start to each answer.
        num_waiting: Devices that may still answer.
        limit: The deadline, seconds; infinite without one.
        quorum: Answers without which the deadline does not count; fewer when fewer can come.
    """
    ordered = sorted(arrivals)
    needed = min(max(quorum, 1), len(ordered) + num_waiting)
    if needed > len(ordered):
        return math.inf
    heard = ordered[needed - 1] if needed else 0.0
    last = ordered[-1] if ordered and not num_waiting else math.inf
    return max(heard, min(limit, last))
