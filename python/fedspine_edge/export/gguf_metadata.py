"""The keys of a model's GGUF file: sizes, rotary embedding, tokenizer, licence and where it comes from.

In: a checked model directory. Out: a `GGUFWriter` with every key and no tensor.

Source: GGUF specification (ggml-org/ggml, docs/gguf.md), `general.*` keys; llama.cpp src/models/llama.cpp and deci.cpp.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, RopeScalingType

from fedspine_edge.base_model import open_base
from fedspine_edge.export.adapter_check import WEIGHTS_KEY
from fedspine_edge.export.gguf_tokenizer import TokenizerFields
from fedspine_edge.export.model_directory import ModelDirectory
from fedspine_edge.export.rope import Rope


def weights_sha256(model_dir: Path) -> str:
    """Returns the hash of a model directory's weights, as a run names its base."""
    return open_base(model_dir).sha256


def describe(
    model: ModelDirectory, architecture: str, rope: Rope, *, file_type: int, name: str, tokenizer: TokenizerFields
) -> GGUFWriter:
    """Returns a writer that holds every key of the file and no tensor.

    Args:
        model: The model directory.
        architecture: `llama` or `deci`.
        rope: Its rotary embedding.
        file_type: `llama_ftype` number.
        name: What people call the model.
        tokenizer: The tokenizer's keys.
    """
    logging.getLogger("gguf").setLevel(logging.WARNING)
    writer = GGUFWriter(None, architecture)
    config, layers = model.config, model.layers
    writer.add_type("model")
    writer.add_name(name)
    writer.add_size_label(_size_label(model.num_parameters))
    _describe_origin(writer, model)
    writer.add_block_count(len(layers))
    writer.add_context_length(_context_length(config))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if architecture == "deci":
        writer.add_head_count([layer.num_heads for layer in layers])
        writer.add_head_count_kv([layer.num_key_value_heads for layer in layers])
        writer.add_feed_forward_length([layer.stored_channels for layer in layers])
    else:
        writer.add_head_count(layers[0].num_heads)
        writer.add_head_count_kv(layers[0].num_key_value_heads)
        writer.add_feed_forward_length(layers[0].stored_channels)
    # Explicit, for llama.cpp would otherwise divide the hidden size by the pruned head count.
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(rope.theta)
    if rope.kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    writer.add_file_type(file_type)
    for key, (value, value_type, item_type) in tokenizer.items():
        writer.add_key_value(key, value, value_type, item_type)
    return writer


def _describe_origin(writer: GGUFWriter, model: ModelDirectory) -> None:
    record, base = model.prune_record, model.base
    if base.get("license"):
        writer.add_license(str(base["license"]))
    writer.add_string(WEIGHTS_KEY, weights_sha256(model.path))
    if not record:
        return
    sparsity = float(record.get("sparsity", 0.0))
    writer.add_finetune(f"pruned{round(100 * sparsity)}")
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, str(base.get("name", "unknown")))
    for key, add in (
        ("organization", writer.add_base_model_organization),
        ("repo_url", writer.add_base_model_repo_url),
    ):
        if base.get(key):
            add(0, str(base[key]))
    writer.add_float32("fedspine.sparsity", sparsity)
    for key in ("parent_sha256", "criterion", "mode"):
        if key in record:
            writer.add_string(f"fedspine.{key}", str(record[key]))


def _size_label(num_parameters: int) -> str:
    return f"{num_parameters / 1e9:.1f}B" if num_parameters >= 1e9 else f"{max(1, round(num_parameters / 1e6))}M"


def _context_length(config: Mapping[str, Any]) -> int:
    """Returns the longest context; with a sliding window, which these architectures lack, the window's length."""
    longest = int(config.get("max_position_embeddings", 2048))
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    return min(longest, int(window)) if window else longest
