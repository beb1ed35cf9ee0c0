"""Figures with what is known about them: means, percentiles and ratios, each with its 95 % interval.

Comes in: samples. Goes out: `Estimate`s; a bound is None where there are too few samples to state one.

Source: Student's t for means; order statistics (binomial) for percentiles, which assume no shape of the distribution.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

CONFIDENCE = 0.95
_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_Z_975 = 1.959964


class Estimate(NamedTuple):
    """A figure and its 95 % interval; a bound is None where the samples are too few for one."""

    value: float
    low: float | None
    high: float | None


def mean_interval(samples: Sequence[float]) -> Estimate:
    """Returns the mean of at least one sample."""
    mean = statistics.fmean(samples)
    if len(samples) < 2:
        return Estimate(mean, None, None)
    half = student_t(len(samples) - 1) * statistics.stdev(samples) / math.sqrt(len(samples))
    return Estimate(mean, mean - half, mean + half)


def speed_interval(samples: Sequence[float]) -> Estimate:
    """Returns the mean of quantities that cannot be negative, nor can its lower bound."""
    value, low, high = mean_interval(samples)
    return Estimate(value, None if low is None else max(0.0, low), high)


def percentile_interval(samples: Sequence[float], share: float) -> Estimate:
    """Returns the percentile at `share` (0 to 1) of at least one sample.

    The bounds are the two samples between which the true percentile lies with 95 % probability, each side missed with
    at most 2.5 %: the median takes 6 samples, the 95th percentile 73, the 99th 368 for an upper bound.
    """
    ordered = sorted(samples)
    low, high = _bound_ranks(len(ordered), share)
    value = percentile(ordered, share)
    # Of two samples, the 99th percentile lies above both with 98 %: the bound stays below the figure all the same.
    return Estimate(
        value,
        None if low is None else min(value, ordered[low]),
        None if high is None else max(value, ordered[high]),
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """Returns the percentile of sorted samples, on the line between neighbours."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Returns the geometric mean of ratios of neighbours in time; all values are above 0."""
    logs = [math.log(above / below) for above, below in zip(numerators, denominators, strict=True)]
    value, low, high = mean_interval(logs)
    return Estimate(math.exp(value), None if low is None else math.exp(low), None if high is None else math.exp(high))


def student_t(degrees: int) -> float:
    """Returns the 97.5th percentile of Student's t with at least one degree of freedom."""
    if degrees <= len(_T_975):
        return _T_975[degrees - 1]
    # Cornish-Fisher expansion around the normal distribution; right to 3 digits from 16 degrees on.
    z = _Z_975
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def _bound_ranks(count: int, share: float) -> tuple[int | None, int | None]:
    """Returns the indices of the order statistics that bound the percentile, None on a side with too few samples."""
    tail = (1 - CONFIDENCE) / 2
    low = high = None
    cumulative = 0.0
    for successes in range(count):
        cumulative += _binomial(count, successes, share)
        if cumulative <= tail:
            low = successes
        if high is None and cumulative >= 1 - tail:
            high = successes
    return low, high


def _binomial(count: int, successes: int, share: float) -> float:
    if share in (0.0, 1.0):
        return float(successes == count * share)
    log = math.lgamma(count + 1) - math.lgamma(successes + 1) - math.lgamma(count - successes + 1)
    return math.exp(log + successes * math.log(share) + (count - successes) * math.log(1 - share))
