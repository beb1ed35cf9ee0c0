"""Joules of a stretch of time from raw samples: trapezoids over watts, differences of a counter, less the idle draw.

Comes in: samples in order of time, None where a sensor gave nothing. Goes out: joules, or None where the samples do not
cover the stretch: a made-up number would be worse.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_GAP_SECONDS = 1.0
"""Wider holes between readings are not bridged."""


@dataclass
class PowerTrace:
    """Samples of one meter.

    Attributes:
        counts_joules: Whether the values are joules counted up; else watts.
        seconds: Time of each sample that could be read.
        values: The sample.
    """

    counts_joules: bool
    seconds: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, seconds: float, value: float | None) -> None:
        """Takes one sample; None is left out, which leaves a hole."""
        if value is not None:
            self.seconds.append(seconds)
            self.values.append(value)

    def joules(self, start: float, end: float) -> float | None:
        """Returns the energy from `start` to `end`; None where the samples leave a hole or do not reach."""
        if not _covered(self.seconds, start, end):
            return None
        if self.counts_joules:
            return _value_at(self.seconds, self.values, end) - _value_at(self.seconds, self.values, start)
        return _trapezoids(self.seconds, self.values, start, end)

    def watts(self, start: float, end: float) -> float | None:
        """Returns the mean power from `start` to `end`; None as for `joules`, or when no time passes."""
        joules = self.joules(start, end)
        return None if joules is None or end <= start else joules / (end - start)


@dataclass(frozen=True)
class Energy:
    """Energy of some runs.

    Attributes:
        joules: All the board drew; None without a meter.
        idle_watts: What it drew before, doing nothing; None where it was not measured.
        seconds: How long the runs took.
    """

    joules: float | None
    idle_watts: float | None
    seconds: float

    @property
    def net_joules(self) -> float | None:
        """What the work added to the idle draw, at least 0; None where either is unknown."""
        if self.joules is None or self.idle_watts is None:
            return None
        return max(0.0, self.joules - self.idle_watts * self.seconds)

    @property
    def watts(self) -> float | None:
        """Mean power over the runs."""
        return None if self.joules is None or self.seconds <= 0 else self.joules / self.seconds


def energy_of(trace: PowerTrace | None, windows: Sequence[tuple[float, float]], idle_watts: float | None) -> Energy:
    """Returns the energy of several runs together; joules are None as soon as one run is not covered.

    Args:
        trace: Samples; None without a meter.
        windows: Start and end of each run, seconds.
        idle_watts: Mean power of the idle board.
    """
    seconds = sum(end - start for start, end in windows)
    parts = [] if trace is None else [trace.joules(start, end) for start, end in windows]
    whole = [part for part in parts if part is not None]
    complete = bool(whole) and len(whole) == len(windows)
    return Energy(sum(whole) if complete else None, idle_watts, seconds)


def _covered(seconds: Sequence[float], start: float, end: float) -> bool:
    if len(seconds) < 2 or end < start or seconds[0] > start or seconds[-1] < end:
        return False
    first, last = bisect.bisect_right(seconds, start) - 1, bisect.bisect_left(seconds, end)
    inside = seconds[first : last + 1]
    return all(after - before <= MAX_GAP_SECONDS for before, after in itertools.pairwise(inside))


def _trapezoids(seconds: Sequence[float], watts: Sequence[float], start: float, end: float) -> float:
    first, last = bisect.bisect_right(seconds, start), bisect.bisect_left(seconds, end)
    times = [start, *seconds[first:last], end]
    powers = [_value_at(seconds, watts, start), *watts[first:last], _value_at(seconds, watts, end)]
    points = itertools.pairwise(zip(times, powers, strict=True))
    return sum((later - earlier) * (one + other) / 2 for (earlier, one), (later, other) in points)


def _value_at(seconds: Sequence[float], values: Sequence[float], at: float) -> float:
    """Returns the value at a time within the samples, on the line between its neighbours."""
    after = min(max(bisect.bisect_left(seconds, at), 1), len(seconds) - 1)
    before = after - 1
    span = seconds[after] - seconds[before]
    share = 0.0 if span <= 0 else (at - seconds[before]) / span
    return values[before] + share * (values[after] - values[before])
