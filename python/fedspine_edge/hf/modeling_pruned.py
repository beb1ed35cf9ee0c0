# mypy: disable-error-code="misc, call-arg, attr-defined"
# (transformers' classes are untyped to mypy, which then knows neither what is subclassed nor what follows a mixin)
"""Pruned models whose layers differ in width: transformers' own classes with narrower linears.

Comes in: a config whose `pruned_linears` gives the name, rows, columns and bias of each linear. Goes out: the stock
model of that family with those linears. This file travels inside the model's directory and is loaded with
`trust_remote_code=True`; it needs nothing but torch and transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    BertForSequenceClassification,
    DistilBertForSequenceClassification,
    LlamaForCausalLM,
    MistralForCausalLM,
    MPNetForSequenceClassification,
    Qwen2ForCausalLM,
    RobertaForSequenceClassification,
)


class PrunedModel:
    """Narrows the linears of the stock class that follows it in the order of classes."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        for name, (rows, columns, biased) in config.pruned_linears.items():
            parent_path, _, leaf = name.rpartition(".")
            parent = self.get_submodule(parent_path)
            setattr(parent, leaf, nn.Linear(columns, rows, bias=biased))


class PrunedLlamaForCausalLM(PrunedModel, LlamaForCausalLM):
    """A pruned Llama."""


class PrunedMistralForCausalLM(PrunedModel, MistralForCausalLM):
    """A pruned Mistral."""


class PrunedQwen2ForCausalLM(PrunedModel, Qwen2ForCausalLM):
    """A pruned Qwen2."""


class PrunedBertForSequenceClassification(PrunedModel, BertForSequenceClassification):
    """A pruned BERT."""


class PrunedRobertaForSequenceClassification(PrunedModel, RobertaForSequenceClassification):
    """A pruned RoBERTa."""


class PrunedDistilBertForSequenceClassification(PrunedModel, DistilBertForSequenceClassification):
    """A pruned DistilBERT."""


class PrunedMPNetForSequenceClassification(PrunedModel, MPNetForSequenceClassification):
    """A pruned MPNet; its layers share one position bias, of which each takes the heads it still has."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        for layer, heads in zip(self.mpnet.encoder.layer, config.position_bias_heads, strict=True):
            attention = layer.attention.attn
            attention.all_head_size = len(heads) * attention.attention_head_size
            attention.register_forward_pre_hook(_SelectHeads(heads))


class _SelectHeads:
    """Hands a layer the position bias [1, H kept, T, T] of its heads; an object, so that the model can be copied."""

    def __init__(self, heads: list[int]) -> None:
        self.heads = heads

    def __call__(self, _module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_states, attention_mask, position_bias, *rest = arguments
        heads = torch.tensor(self.heads, device=position_bias.device)
        return (hidden_states, attention_mask, position_bias.index_select(1, heads), *rest)
