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

from fedspine_server.aggregation.contribution import Contribution, Factors, RoundFacts, covered
from fedspine_server.aggregation.low_rank import best_factors


def aggregate(old: Factors, contributions: Sequence[Contribution], facts: RoundFacts) -> Factors:
    """Returns the new global factors of one matrix.

    Args:
        old: The global factors the round began with.
        contributions: What was merged, in any order; at least one.
        facts: Coverage rule and randomness.
    """
    ordered = sorted(contributions, key=lambda contribution: contribution.device_id)
    old_a, old_b = old.lora_a.astype(np.float64), old.lora_b.astype(np.float64)
    if facts.drop_uncovered:
        old_a *= covered(ordered, "in", old_a.shape[1])
        old_b *= covered(ordered, "out", old_b.shape[0])[:, None]
    if all(contribution.keep_in is None for contribution in ordered):
        shares = _shares([c.keep_out for c in ordered], ordered, (old_b.shape[0], old_b.shape[1]))
        b_parts = [c.lora_b * share for c, share in zip(ordered, shares[:-1], strict=True)]
        b_stack, a_stack = [*b_parts, old_b * shares[-1]], [*(c.lora_a for c in ordered), old_a]
    elif all(contribution.keep_out is None for contribution in ordered):
        shares = _shares([c.keep_in for c in ordered], ordered, (old_a.shape[1], old_a.shape[0]))
        a_parts = [c.lora_a * share.T for c, share in zip(ordered, shares[:-1], strict=True)]
        b_stack, a_stack = [*(c.lora_b for c in ordered), old_b], [*a_parts, old_a * shares[-1].T]
    else:
        product = _dense_product(old_a, old_b, ordered)
        b_stack, a_stack = [product], [np.eye(product.shape[1])]
    rank = old_a.shape[0]
    return best_factors(np.concatenate(b_stack, axis=1), np.concatenate(a_stack, axis=0), rank, facts.generator)


def _shares(
    keeps: Sequence[np.ndarray | None], contributions: Sequence[Contribution], shape: tuple[int, int]
) -> list[np.ndarray]:
    """Returns each device's share of each (feature, component) it has, [features, r_i], and last the old factors'."""
    weights = [np.zeros((shape[0], contribution.rank)) for contribution in contributions]
    total = np.zeros(shape)
    for weight, keep, contribution in zip(weights, keeps, contributions, strict=True):
        weight[slice(None) if keep is None else keep] = contribution.weight
        total[:, : contribution.rank] += weight
    divisor = np.where(total > 0, total, 1.0)
    shares = [weight / divisor[:, : weight.shape[1]] for weight in weights]
    return [*shares, np.asarray(total == 0, dtype=np.float64)]


def _dense_product(old_a: np.ndarray, old_b: np.ndarray, contributions: Sequence[Contribution]) -> np.ndarray:
    """Returns the coverage-normalised product, [out, in], summed densely over the partitions of the ranks."""
    result = np.zeros((old_b.shape[0], old_a.shape[1]))
    begin = 0
    for end in sorted({*(contribution.rank for contribution in contributions), old_a.shape[0]}):
        part, total = np.zeros_like(result), np.zeros_like(result)
        for c in (c for c in contributions if c.rank >= end):
            part += c.weight * (c.lora_b[:, begin:end] @ c.lora_a[begin:end])
            rows = np.ones(result.shape[0]) if c.keep_out is None else c.keep_out.astype(np.float64)
            columns = np.ones(result.shape[1]) if c.keep_in is None else c.keep_in.astype(np.float64)
            total += c.weight * np.outer(rows, columns)
        kept_old = old_b[:, begin:end] @ old_a[begin:end]
        result += np.where(total > 0, part / np.where(total > 0, total, 1.0), kept_old)
        begin = end
    return result
