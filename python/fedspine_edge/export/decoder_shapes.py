"""Which tensors a decoder has, and their shapes, given the widths of its layers.

In: `config.json` and the widths of each layer. Out: nothing, or IncompatibleError for the first tensor that does not
fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedspine_edge.errors import IncompatibleError

CHANNEL_BLOCK = 32
"""Files hold FFN widths in multiples of this: quantised, other rows fall back to F16 and run 1.4-1.9 times slower."""

_ALWAYS_BIASED = {"qwen2": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}


@dataclass(frozen=True)
class LayerWidths:
    """What one layer has kept: query heads, KV heads and FFN channels."""

    num_heads: int
    num_key_value_heads: int
    intermediate_size: int

    @property
    def stored_channels(self) -> int:
        """FFN channels in a file: whole blocks, the last filled up with channels of zeros, which say nothing."""
        return -(-self.intermediate_size // CHANNEL_BLOCK) * CHANNEL_BLOCK


def head_dim(config: Mapping[str, Any]) -> int:
    """Returns the features of one head that a config means."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def total_kv_heads(config: Mapping[str, Any]) -> int:
    """Returns the KV heads that a config means."""
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def _matrix_shapes(config: Mapping[str, Any], layer: LayerWidths) -> dict[str, tuple[int, int]]:
    hidden, dim = config["hidden_size"], head_dim(config)
    queries, keys, channels = layer.num_heads * dim, layer.num_key_value_heads * dim, layer.intermediate_size
    return {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (channels, hidden),
        "mlp.up_proj": (channels, hidden),
        "mlp.down_proj": (hidden, channels),
    }


def _needs_bias(config: Mapping[str, Any], matrix: str) -> bool:
    if config["model_type"] in _ALWAYS_BIASED:
        return matrix in _ALWAYS_BIASED[config["model_type"]]
    return bool(config.get("attention_bias" if matrix.startswith("self_attn") else "mlp_bias"))


def _expected_shapes(config: Mapping[str, Any], layers: tuple[LayerWidths, ...]) -> dict[str, tuple[int, ...]]:
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    expected: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.get("tie_word_embeddings"):
        expected["lm_head.weight"] = (vocabulary, hidden)
    for index, layer in enumerate(layers):
        prefix = f"model.layers.{index}"
        expected[f"{prefix}.input_layernorm.weight"] = (hidden,)
        expected[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        for matrix, shape in _matrix_shapes(config, layer).items():
            expected[f"{prefix}.{matrix}.weight"] = shape
            if _needs_bias(config, matrix):
                expected[f"{prefix}.{matrix}.bias"] = shape[:1]
    return expected


def _optional_shapes(config: Mapping[str, Any], layers: tuple[LayerWidths, ...]) -> dict[str, tuple[int, ...]]:
    """Biases of mean compensation on any o/down, and a tied head that was stored all the same."""
    hidden = config["hidden_size"]
    optional: dict[str, tuple[int, ...]] = {
        f"model.layers.{index}.{matrix}.bias": (hidden,)
        for index in range(len(layers))
        for matrix in ("self_attn.o_proj", "mlp.down_proj")
    }
    if config.get("tie_word_embeddings"):
        optional["lm_head.weight"] = (config["vocab_size"], hidden)
    return optional


def check_shapes(
    config: Mapping[str, Any], layers: tuple[LayerWidths, ...], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises IncompatibleError where a tensor is missing, surplus or of another shape than its layer's widths say."""
    expected = _expected_shapes(config, layers)
    for name in expected:
        if name not in shapes:
            raise IncompatibleError(f"expected tensor {name}, found none")
    allowed = {**_optional_shapes(config, layers), **expected}
    for name, shape in shapes.items():
        if name not in allowed:
            raise IncompatibleError(f"expected no tensor {name}, found one of shape {list(shape)}")
        if shape != allowed[name]:
            raise IncompatibleError(f"expected shape {list(allowed[name])} for {name}, found {list(shape)}")
