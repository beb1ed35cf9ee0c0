"""FedAvg on LoRA factors: the mean of A and the mean of B, for equal ranks only.

Comes in: full-size factors of one rank. Goes out: their weighted means. What a device pruned counts with the old global
values, as FedMP recovers residuals.

Source: FedAvg (McMahan et al., AISTATS 2017) on LoRA factors, as in FedIT.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedspine_server.aggregation.contribution import Contribution, Factors, RoundFacts
from fedspine_server.aggregation.hetlora import average_factors


def aggregate(old: Factors, contributions: Sequence[Contribution], facts: RoundFacts) -> Factors:
    """Returns the new global factors.

    Raises:
        ValueError: The ranks differ.
    """
    ranks = sorted({contribution.rank for contribution in contributions})
    if len(ranks) > 1:
        raise ValueError(f"fedavg takes one rank, found ranks {ranks}: use aggregation spine")
    return average_factors(old, contributions, [contribution.weight for contribution in contributions], facts)
