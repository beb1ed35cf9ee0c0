"""HetLoRA: zero-pad the ranks, weigh devices by the norm of their product, average A and B separately.

Comes in: full-size factors of unequal ranks and masks. Goes out: factors of rank r_max. HetLoRA knows no masks: what a
device pruned counts with the old global values, as FedMP recovers residuals. Components above every rank stay as they
are.

Source: HetLoRA (Cho et al., EMNLP 2024), sparsity-weighted aggregation; FedMP (residual recovery).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedspine_server.aggregation.contribution import Contribution, Factors, RoundFacts, covered


def aggregate(old: Factors, contributions: Sequence[Contribution], facts: RoundFacts) -> Factors:
    """Returns the new global factors; devices count in proportion to the Frobenius norm of B_i A_i."""
    norms = [product_norm(*contribution.read()[::-1]) for contribution in contributions]
    return average_factors(old, contributions, norms if sum(norms) > 0 else [1.0] * len(norms), facts)


def product_norm(lora_b: np.ndarray, lora_a: np.ndarray) -> float:
    """Returns the Frobenius norm of B @ A without the product: sqrt(trace(B^T B A A^T))."""
    return float(np.sqrt(max(0.0, float(np.sum((lora_b.T @ lora_b) * (lora_a @ lora_a.T))))))


def average_factors(
    old: Factors, contributions: Sequence[Contribution], weights: Sequence[float], facts: RoundFacts
) -> Factors:
    """Returns the weighted means of the zero-padded A and B.

    Args:
        old: The global factors the round began with.
        contributions: What was merged, in any order; at least one.
        weights: Weight of each contribution.
        facts: Coverage rule.
    """
    old_a, old_b = old.wide()
    highest = max(contribution.rank for contribution in contributions)
    lora_a, lora_b = old_a.copy(), old_b.copy()
    lora_a[:highest], lora_b[:, :highest] = 0.0, 0.0
    pairs = zip(contributions, weights, strict=True)
    for contribution, weight in sorted(pairs, key=lambda pair: pair[0].device_id):
        share, rank = weight / sum(weights), contribution.rank
        own_a, own_b = contribution.read_over(old_a, old_b)
        lora_a[:rank] += share * own_a
        lora_b[:, :rank] += share * own_b
    if facts.drop_uncovered:
        lora_a *= covered(contributions, "in", lora_a.shape[1])
        lora_b *= covered(contributions, "out", lora_b.shape[0])[:, None]
    return Factors(lora_a.astype(np.float32), lora_b.astype(np.float32))
