"""Rules that stand a minority of lying devices: coordinate-wise trimmed mean and median, and clipped norms.

Comes in: full-size factors of unequal ranks and masks. Goes out: factors of rank r_max. Factors cannot be compared
number by number (B Q and Q^-1 A are the same update), products can: the change each device made to the product is
rebuilt block by block, each entry is trimmed over the devices that kept it, and the result is added to the old product.
Devices count alike, whatever number of examples they claim.

Clipping goes before any rule: a device that moved farther than a multiple of the median device is drawn back on the
line from where it began.

Source: trimmed mean and median as in Yin et al. (ICML 2018), norm clipping as in Sun et al. (arXiv 1911.07963).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from fedspine_server.aggregation.averages import trimmed_mean
from fedspine_server.aggregation.contribution import Contribution, Factors, Pair, RoundFacts, in_order, remaining
from fedspine_server.aggregation.hetlora import product_norm
from fedspine_server.aggregation.low_rank import best_factors

MEDIAN = 0.5
SMALLEST_STEP = 1e-6
HALVING = 0.9
BLOCK_ENTRIES = 1 << 22  # changes rebuilt at a time, over all devices: 16 MiB in float32


def aggregate(old: Factors, contributions: Sequence[Contribution], facts: RoundFacts) -> Factors:
    """Returns the new global factors by the trimmed mean with `facts.trim_share` left out at either end."""
    return _trimmed(old, contributions, facts, facts.trim_share)


def aggregate_median(old: Factors, contributions: Sequence[Contribution], facts: RoundFacts) -> Factors:
    """Returns the new global factors by the median."""
    return _trimmed(old, contributions, facts, MEDIAN)


def _trimmed(old: Factors, contributions: Sequence[Contribution], facts: RoundFacts, share: float) -> Factors:
    ordered = in_order(contributions)
    old_a, old_b = remaining(old, ordered, facts)
    product = old_b @ old_a
    pairs = [_change(contribution, old_a, old_b) for contribution in ordered]
    rows = max(1, BLOCK_ENTRIES // (product.shape[1] * len(ordered)))
    for begin in range(0, len(product), rows):
        here = slice(begin, begin + rows)
        changes = np.stack([_block(pair, c, here) for pair, c in zip(pairs, ordered, strict=True)])
        product[here] += np.nan_to_num(trimmed_mean(changes, share))
    return best_factors(product, None, len(old_a), facts.generator)


def _change(contribution: Contribution, old_a: np.ndarray, old_b: np.ndarray) -> Pair:
    """A and B of what a device changed of the product, float32."""
    lora_a, lora_b = contribution.read()
    given_a, given_b = contribution.kept_of(old_a, old_b)
    both_a, both_b = np.concatenate([lora_a, given_a]), np.concatenate([lora_b, -given_b], axis=1)
    return both_a.astype(np.float32), both_b.astype(np.float32)


def _block(pair: Pair, contribution: Contribution, rows: slice) -> np.ndarray:
    """Some rows of a device's change, NaN where it kept nothing."""
    lora_a, lora_b = pair
    change = lora_b[rows] @ lora_a
    if contribution.keep_out is not None:
        change[~contribution.keep_out[rows]] = np.nan
    if contribution.keep_in is not None:
        change[:, ~contribution.keep_in] = np.nan
    return change


def clipped(old: Factors, contributions: Sequence[Contribution], factor: float) -> list[Contribution]:
    """Returns the contributions, none farther from where it began than `factor` times the median one.

    Args:
        old: The global factors the round began with.
        contributions: What was merged.
        factor: Positive.
    """
    old_a, old_b = old.wide()
    moved = [_distance(c.read(), c.kept_of(old_a, old_b)) for c in contributions]
    limit = factor * float(np.median(moved))
    return [
        c if distance <= limit else dataclasses.replace(c, read=_drawn_back(c, c.kept_of(old_a, old_b), limit))
        for c, distance in zip(contributions, moved, strict=True)
    ]


def _drawn_back(contribution: Contribution, begin: Pair, limit: float) -> Callable[[], Pair]:
    def read() -> Pair:
        end, share = contribution.read(), 1.0
        while True:
            pair = (begin[0] + share * (end[0] - begin[0]), begin[1] + share * (end[1] - begin[1]))
            distance = _distance(pair, begin)
            if distance <= limit or share < SMALLEST_STEP:
                return pair if distance <= limit else begin
            share *= min(HALVING, limit / distance)

    return read


def _distance(pair: Pair, begin: Pair) -> float:
    """Frobenius norm of the change of the product."""
    lora_b = np.concatenate([pair[1], -begin[1]], axis=1)
    return product_norm(lora_b, np.concatenate([pair[0], begin[0]]))
