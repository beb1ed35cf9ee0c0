"""Our default rule: the exact product of what the devices trained, each entry over those who covered it.

Comes in: full-size factors of unequal ranks and masks. Goes out: factors of rank r_max. Component h of entry (j, l) is
the weighted mean of B_i[j,h] A_i[h,l] over the devices whose rank reaches h and who kept row j and column l:

    dW[j,l] = sum_h ( sum_i w_i covers_i(j,l,h) B_i[j,h] A_i[h,l] ) / ( sum_i w_i covers_i(j,l,h) )

Where nobody covers, the old global component stays: it equals adding the covered devices' mean change to the old
product. Dividing by everyone instead would shrink the ranks above the smallest and the masked entries a little every
round.

A matrix pruned on one side has coverage that depends on the row alone (or the column alone), so the division goes into
B (or A) and the sum keeps its factored form. Only a matrix pruned on both sides is summed densely.

Source: docs/algorithm.md, section 8; rank-wise coverage as in raFLoRA, masks and the old product are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedspine_server.aggregation.contribution import Contribution, Factors, RoundFacts, in_order, remaining
from fedspine_server.aggregation.low_rank import LongSum, best_factors


def aggregate(old: Factors, contributions: Sequence[Contribution], facts: RoundFacts) -> Factors:
    """Returns the new global factors of one matrix.

    Args:
        old: The global factors the round began with.
        contributions: What was merged, in any order; at least one.
        facts: Coverage rule and randomness.
    """
    ordered = in_order(contributions)
    old_a, old_b = remaining(old, ordered, facts)
    shape, rank = (old_b.shape[0], old_a.shape[1]), old_a.shape[0]
    if any(c.keep_out is not None for c in ordered) and any(c.keep_in is not None for c in ordered):
        product = _dense_product(old_a, old_b, ordered)
        return best_factors(product, None, rank, facts.generator)
    total = LongSum(shape, rank + sum(contribution.rank for contribution in ordered))
    if any(c.keep_in is not None for c in ordered):
        mass = _mass([c.keep_in for c in ordered], ordered, (shape[1], rank))
        for c in ordered:
            lora_a, lora_b = c.read()
            total.add(lora_b, lora_a * _share(c, c.keep_in, mass).T)
        total.add(old_b, old_a * (mass == 0).T)
    else:
        mass = _mass([c.keep_out for c in ordered], ordered, (shape[0], rank))
        for c in ordered:
            lora_a, lora_b = c.read()
            total.add(lora_b * _share(c, c.keep_out, mass), lora_a)
        total.add(old_b * (mass == 0), old_a)
    return total.best(rank, facts.generator)


def _mass(
    keeps: Sequence[np.ndarray | None], contributions: Sequence[Contribution], shape: tuple[int, int]
) -> np.ndarray:
    """Returns the weight of all devices that cover each (feature, component), [features, r_max]."""
    total = np.zeros(shape)
    for keep, contribution in zip(keeps, contributions, strict=True):
        total[slice(None) if keep is None else keep, : contribution.rank] += contribution.weight
    return total


def _share(contribution: Contribution, keep: np.ndarray | None, mass: np.ndarray) -> np.ndarray:
    """Returns a device's share of each (feature, component) it has, [features, r_i]."""
    own = np.full(mass.shape[0], contribution.weight) if keep is None else np.where(keep, contribution.weight, 0.0)
    mass = mass[:, : contribution.rank]
    return np.asarray(own[:, None] / np.where(mass > 0, mass, 1.0))


def _dense_product(old_a: np.ndarray, old_b: np.ndarray, contributions: Sequence[Contribution]) -> np.ndarray:
    """Returns the coverage-normalised product, [out, in], summed densely over the partitions of the ranks."""
    result = np.zeros((old_b.shape[0], old_a.shape[1]))
    begin = 0
    for end in sorted({*(contribution.rank for contribution in contributions), old_a.shape[0]}):
        part, total = np.zeros_like(result), np.zeros_like(result)
        for c in (c for c in contributions if c.rank >= end):
            lora_a, lora_b = c.read()
            part += c.weight * (lora_b[:, begin:end] @ lora_a[begin:end])
            rows = np.ones(result.shape[0]) if c.keep_out is None else c.keep_out.astype(np.float64)
            columns = np.ones(result.shape[1]) if c.keep_in is None else c.keep_in.astype(np.float64)
            total += c.weight * np.outer(rows, columns)
        kept_old = old_b[:, begin:end] @ old_a[begin:end]
        result += np.where(total > 0, part / np.where(total > 0, total, 1.0), kept_old)
        begin = end
    return result
