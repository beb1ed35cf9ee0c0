"""FlexLoRA: the weighted mean of the products, cut to the global rank by singular values.

Comes in: full-size factors of unequal ranks and masks. Goes out: factors of rank r_max. FlexLoRA knows no masks: what a
device pruned counts with the old global values, as FedMP recovers residuals. A device of a small rank counts with
nothing in the components it was not given, so their energy shrinks round by round: what `spine` is there to prevent.
Components above every rank stay as they are.

Source: FlexLoRA (Bai et al., NeurIPS 2024). The SVD is of the sum of all devices, as there; a device gets its first r
components.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedspine_server.aggregation.contribution import Contribution, Factors, RoundFacts, in_order, remaining
from fedspine_server.aggregation.low_rank import LongSum


def aggregate(old: Factors, contributions: Sequence[Contribution], facts: RoundFacts) -> Factors:
    """Returns the new global factors of one matrix.

    Args:
        old: The global factors the round began with.
        contributions: What was merged, in any order; at least one.
        facts: Coverage rule and randomness.
    """
    ordered = in_order(contributions)
    old_a, old_b = remaining(old, ordered, facts)
    mass = sum(contribution.weight for contribution in ordered)
    highest = max(contribution.rank for contribution in ordered)
    num_terms = sum(contribution.rank for contribution in ordered) + len(old_a) - highest
    total = LongSum((old_b.shape[0], old_a.shape[1]), num_terms)
    total.add(old_b[:, highest:], old_a[highest:])
    for contribution in ordered:
        lora_a, lora_b = contribution.read_over(old_a, old_b)
        total.add(contribution.weight / mass * lora_b, lora_a)
    return total.best(old_a.shape[0], facts.generator)
