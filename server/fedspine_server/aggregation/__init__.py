"""Aggregation rules by name: how unequal LoRA updates become the global adapter. One file a rule."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from fedspine_server.aggregation import fedavg, hetlora, spine
from fedspine_server.aggregation.contribution import Contribution, Factors, RoundFacts, Rule

AGGREGATIONS: Mapping[str, Rule] = MappingProxyType(
    {"spine": spine.aggregate, "hetlora": hetlora.aggregate, "fedavg": fedavg.aggregate}
)

__all__ = ["AGGREGATIONS", "Contribution", "Factors", "RoundFacts", "Rule"]
