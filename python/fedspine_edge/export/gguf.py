"""A (pruned) model directory -> one GGUF file that stock llama.cpp runs.

In: a model directory (see `model_directory`). Out: a file of architecture `llama` when every layer has the same widths,
else `deci`, the only Llama-mathematics architecture of llama.cpp with widths per layer. Both take biases on every
linear, so Qwen2's q/k/v biases and those of mean compensation travel; both rotate neighbouring pairs, so the rows of
q and k are permuted from transformers' halves, with that layer's own head count.

Source: GGUF specification (ggml-org/ggml, docs/gguf.md); llama.cpp src/models/llama.cpp and deci.cpp.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, LlamaFileType, RopeScalingType

from fedspine_edge.errors import CheckpointError, IncompatibleError
from fedspine_edge.export.gguf_tokenizer import TokenizerFields, read_tokenizer
from fedspine_edge.export.llama_session import quantize_file
from fedspine_edge.export.model_directory import ModelDirectory, read_model_directory, read_tensor
from fedspine_edge.export.rope import Rope, llama3_factors, rope_of

FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q6_K": LlamaFileType.MOSTLY_Q6_K,
    "Q5_K_M": LlamaFileType.MOSTLY_Q5_K_M,
    "Q4_K_M": LlamaFileType.MOSTLY_Q4_K_M,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
}
"""What `write_gguf` writes, by the name llama.cpp's own tools give it."""

_UNQUANTIZED = ("F32", "F16")
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_MODEL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


@dataclass(frozen=True)
class GgufFile:
    """A written file.

    Attributes:
        path: Where it is.
        format: `llama` or `deci`.
        quantization: A key of `FILE_TYPES`.
        size_bytes: Its size.
    """

    path: Path
    format: str
    quantization: str
    size_bytes: int


def write_gguf(
    model_dir: Path,
    output: Path,
    *,
    quantization: str,
    architecture: str = "auto",
    name: str,
    tokenizer_gguf: Path | None = None,
) -> GgufFile:
    """Writes a model directory as a GGUF file, whole or not at all.

    Args:
        model_dir: Pruned or unpruned model directory of the llama, mistral or qwen2 family.
        output: File to write; replaced if there.
        quantization: A key of `FILE_TYPES`.
        architecture: `auto`, `llama` (same widths in each layer) or `deci`.
        name: What people call the model.
        tokenizer_gguf: GGUF file to copy the tokenizer from; None converts the directory's `tokenizer.json`.

    Raises:
        ValueError: The quantisation or the architecture is unknown.
        CheckpointError: The directory is damaged or the disk is full; nothing half-written stays.
        IncompatibleError: llama.cpp has no way to run this model, or would run it wrongly.
    """
    if quantization not in FILE_TYPES:
        raise ValueError(f"expected a quantisation of {', '.join(FILE_TYPES)}, found {quantization!r}")
    model = read_model_directory(model_dir)
    chosen = _choose_architecture(model, architecture)
    rope = rope_of(model.config)
    tokenizer = read_tokenizer(model, tokenizer_gguf)
    with _replacing(output) as partial:
        if quantization in _UNQUANTIZED:
            writer = _describe(model, chosen, rope, file_type=FILE_TYPES[quantization], name=name, tokenizer=tokenizer)
            _write(writer, model, rope, path=partial)
        else:
            with _replacing(output.with_name(f"{output.name}.F16"), keep=False) as half:
                writer = _describe(model, chosen, rope, file_type=FILE_TYPES["F16"], name=name, tokenizer=tokenizer)
                _write(writer, model, rope, path=half)
                quantize_file(half, partial, file_type=int(FILE_TYPES[quantization]))
    return GgufFile(path=output, format=chosen, quantization=quantization, size_bytes=output.stat().st_size)


def _choose_architecture(model: ModelDirectory, architecture: str) -> str:
    if architecture not in ("auto", "llama", "deci"):
        raise ValueError(f"expected architecture auto, llama or deci, found {architecture!r}")
    if architecture == "llama" and not model.is_uniform:
        raise IncompatibleError(
            "expected the same widths in every layer for architecture llama, found different ones",
            hint="use architecture deci, or prune with mode uniform",
        )
    if architecture == "auto":
        return "llama" if model.is_uniform else "deci"
    return architecture


@contextmanager
def _replacing(output: Path, *, keep: bool = True) -> Iterator[Path]:
    """Yields a path beside `output`; on success it is synced and renamed (or dropped), on failure nothing is left."""
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        yield partial
        if keep:
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            partial.replace(output)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {output}: {error.strerror or error}", hint="free some space, or choose another folder"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _describe(
    model: ModelDirectory, architecture: str, rope: Rope, *, file_type: int, name: str, tokenizer: TokenizerFields
) -> GGUFWriter:
    """Returns a writer that holds every key of the file and no tensor."""
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
        writer.add_feed_forward_length([layer.intermediate_size for layer in layers])
    else:
        writer.add_head_count(layers[0].num_heads)
        writer.add_head_count_kv(layers[0].num_key_value_heads)
        writer.add_feed_forward_length(layers[0].intermediate_size)
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


def _write(writer: GGUFWriter, model: ModelDirectory, rope: Rope, *, path: Path) -> None:
    """Writes keys, tensor table and tensors; one tensor at a time is in memory."""
    half = writer.kv_data[0]["general.file_type"].value != LlamaFileType.ALL_F32
    names = list(model.shapes)
    if rope.kind == "llama3":
        factors = llama3_factors(rope, model.head_dim)
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for name in names:
        shape = model.shapes[name]
        dtype = np.dtype(np.float16 if half and len(shape) > 1 else np.float32)
        writer.add_tensor_info(_gguf_name(name), shape, dtype, int(np.prod(shape)) * dtype.itemsize)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if rope.kind == "llama3":
            writer.write_tensor_data(factors)
        for name in names:
            writer.write_tensor_data(_converted(model, name, half=half))
    finally:
        writer.close()


def _gguf_name(name: str) -> str:
    if name in _MODEL_NAMES:
        return _MODEL_NAMES[name]
    _, _, index, rest = name.split(".", 3)
    module, _, leaf = rest.rpartition(".")
    return f"blk.{index}.{_LAYER_NAMES[module]}.{leaf}"


def _converted(model: ModelDirectory, name: str, *, half: bool) -> np.ndarray:
    tensor = read_tensor(model, name)
    if ".self_attn.q_proj." in name or ".self_attn.k_proj." in name:
        layer = model.layers[int(name.split(".")[2])]
        tensor = permute_rows(tensor, layer.num_heads if ".q_proj." in name else layer.num_key_value_heads)
    if half and tensor.ndim > 1:
        if np.abs(tensor).max() > np.finfo(np.float16).max:
            raise IncompatibleError(
                f"expected weights within float16, found larger ones in {name}", hint="export as F32"
            )
        tensor = tensor.astype(np.float16)
    return np.ascontiguousarray(tensor)


def permute_rows(tensor: np.ndarray, num_heads: int) -> np.ndarray:
    """Returns q or k with the rows of each head reordered from halves (x0..,y0..) to neighbours (x0,y0,x1,y1..).

    Args:
        tensor: Weight [num_heads * D, I] or bias [num_heads * D], as transformers keeps it.
        num_heads: Heads this matrix has in this layer.
    """
    halves = tensor.reshape(num_heads, 2, tensor.shape[0] // num_heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)
