"""Aggregation rules by name: how unequal LoRA updates become the global adapter. One file a rule."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from fedspine_server.aggregation import fedavg, flexlora, flora, hetlora, robust, spine
from fedspine_server.aggregation.contribution import Contribution, Factors, RoundFacts, Rule

AGGREGATIONS: Mapping[str, Rule] = MappingProxyType(
    {
        "spine": spine.aggregate,
        "hetlora": hetlora.aggregate,
        "flexlora": flexlora.aggregate,
        "flora": flora.aggregate,
        "fedavg": fedavg.aggregate,
        "trimmed-mean": robust.aggregate,
        "median": robust.aggregate_median,
    }
)

__all__ = ["AGGREGATIONS", "Contribution", "Factors", "RoundFacts", "Rule"]
