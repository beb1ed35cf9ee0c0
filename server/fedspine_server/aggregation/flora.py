"""FLoRA: the devices' changes are stacked, so that their sum is exact, and added to what was there.

Comes in: full-size factors of unequal ranks and masks. Goes out: factors of rank r_max. FLoRA sends the whole stack
(the sum of all ranks) to every device, which adds it to its base and begins with a fresh adapter. Here the base never
moves: the stack of the changes, weight_i (B_i A_i - what device i was given), is folded into the global product, and
the best r_max components of that are kept. So traffic does not grow with the number of devices; what is cut off is the
tail. Every device counts in every entry: unlike in `spine`, a component that few devices have moves little.

Source: FLoRA (Wang et al., NeurIPS 2024); folding and masks are ours.
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
    num_terms = len(old_a) + 2 * sum(contribution.rank for contribution in ordered)
    total = LongSum((old_b.shape[0], old_a.shape[1]), num_terms)
    for contribution in ordered:
        share = contribution.weight / mass
        lora_a, lora_b = contribution.read()
        given_a, given_b = contribution.kept_of(old_a, old_b)
        total.add(share * lora_b, lora_a)
        total.add(-share * given_b, given_a)
    total.add(old_b, old_a)
    return total.best(len(old_a), facts.generator)
