"""A (pruned) model directory -> one GGUF file that stock llama.cpp runs.

In: a model directory (see `model_directory`). Out: a file of architecture `llama` when every layer has the same widths,
else `deci`, the only Llama-mathematics architecture of llama.cpp with widths per layer. Both take biases on every
linear, so Qwen2's q/k/v biases and those of mean compensation travel; both rotate neighbouring pairs, so the rows of
q and k are permuted from transformers' halves, with that layer's own head count.

Source: GGUF specification (ggml-org/ggml, docs/gguf.md); llama.cpp src/models/llama.cpp and deci.cpp.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quant_shape_to_byte_shape, quantize

from fedspine_edge.errors import CheckpointError, IncompatibleError, UsageError
from fedspine_edge.export.decoder_shapes import CHANNEL_BLOCK
from fedspine_edge.export.gguf_metadata import describe
from fedspine_edge.export.gguf_tokenizer import read_tokenizer
from fedspine_edge.export.llama_session import quantize_file
from fedspine_edge.export.model_directory import ModelDirectory, read_model_directory, read_tensor
from fedspine_edge.export.rope import Rope, llama3_factors, rope_of

FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q6_K": LlamaFileType.MOSTLY_Q6_K,
    "Q5_K_M": LlamaFileType.MOSTLY_Q5_K_M,
    "Q4_K_M": LlamaFileType.MOSTLY_Q4_K_M,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
}
"""What `write_gguf` writes, by the name llama.cpp's own tools give it."""

_MATRIX_TYPES = {
    "F32": GGMLQuantizationType.F32,
    "F16": GGMLQuantizationType.F16,
    "BF16": GGMLQuantizationType.BF16,
}
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
        note: What was changed in shape, not in meaning; empty for nothing.
    """

    path: Path
    format: str
    quantization: str
    size_bytes: int
    note: str = ""


def write_gguf(
    model_dir: Path,
    output: Path,
    *,
    quantization: str,
    architecture: str = "auto",
    name: str,
    tokenizer_gguf: Path | None = None,
    overwrite: bool = False,
) -> GgufFile:
    """Writes a model directory as a GGUF file, whole or not at all.

    Args:
        model_dir: Pruned or unpruned model directory of the llama, mistral or qwen2 family.
        output: File to write.
        quantization: A key of `FILE_TYPES`.
        architecture: `auto`, `llama` (same widths in each layer) or `deci`.
        name: What people call the model.
        tokenizer_gguf: GGUF file to copy the tokenizer from; None converts the directory's `tokenizer.json`.
        overwrite: Whether a file of that name is replaced.

    Raises:
        ValueError: The quantisation or the architecture is unknown.
        UsageError: There is a file of that name, and it is not to be replaced.
        CheckpointError: The directory is damaged or the disk is full; nothing half-written stays.
        IncompatibleError: llama.cpp has no way to run this model, or would run it wrongly.
    """
    if quantization not in FILE_TYPES:
        raise ValueError(f"expected a quantisation of {', '.join(FILE_TYPES)}, found {quantization!r}")
    refuse_existing(output, overwrite=overwrite)
    model = read_model_directory(model_dir)
    chosen = _choose_architecture(model, architecture)
    rope = rope_of(model.config)
    tokenizer = read_tokenizer(model, tokenizer_gguf)
    with replacing(output) as partial:
        if quantization in _MATRIX_TYPES:
            writer = describe(model, chosen, rope, file_type=FILE_TYPES[quantization], name=name, tokenizer=tokenizer)
            _write(writer, model, rope, path=partial, matrices=quantization)
        else:
            with replacing(output.with_name(f"{output.name}.F16"), keep=False) as half:
                writer = describe(model, chosen, rope, file_type=FILE_TYPES["F16"], name=name, tokenizer=tokenizer)
                _write(writer, model, rope, path=half, matrices="F16")
                quantize_file(half, partial, file_type=int(FILE_TYPES[quantization]))
    size, note = output.stat().st_size, _rounding_note(model)
    return GgufFile(path=output, format=chosen, quantization=quantization, size_bytes=size, note=note)


def _rounding_note(model: ModelDirectory) -> str:
    rounded = [(i, layer) for i, layer in enumerate(model.layers) if layer.stored_channels != layer.intermediate_size]
    if not rounded:
        return ""
    index, layer = rounded[0]
    return (
        f"FFN channels of {len(rounded)} layers rounded up to multiples of {CHANNEL_BLOCK} with zeros, for quantised"
        f" rows: {layer.intermediate_size} -> {layer.stored_channels} in layer {index}"
    )


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


def refuse_existing(output: Path, *, overwrite: bool) -> None:
    """Raises UsageError when `output` is there and not to be replaced."""
    if output.exists() and not overwrite:
        raise UsageError(f"expected a new file, found that {output} exists", hint="pass --force to replace it")


@contextmanager
def replacing(output: Path, *, keep: bool = True) -> Iterator[Path]:
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


def _write(writer: GGUFWriter, model: ModelDirectory, rope: Rope, *, path: Path, matrices: str) -> None:
    """Writes keys, tensor table and tensors; one tensor at a time is in memory."""
    matrix_type = _MATRIX_TYPES[matrices]
    names = [name for name in model.shapes if not _is_zero_bias(model, name)]
    if rope.kind == "llama3":
        factors = llama3_factors(rope, model.head_dim)
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for name in names:
        shape = _stored_shape(model, name)
        stored_type = matrix_type if len(shape) > 1 else GGMLQuantizationType.F32
        num_bytes = int(np.prod(quant_shape_to_byte_shape(shape, stored_type)))
        writer.add_tensor_info(gguf_name(name), shape, np.dtype(np.float32), num_bytes, raw_dtype=stored_type)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if rope.kind == "llama3":
            writer.write_tensor_data(factors)
        for name in names:
            writer.write_tensor_data(_converted(model, name, matrix_type))
    finally:
        writer.close()


def _stored_shape(model: ModelDirectory, name: str) -> tuple[int, ...]:
    shape = list(model.shapes[name])
    axis = channel_axis(name)
    if axis is not None:
        shape[axis] = model.layers[int(name.split(".")[2])].stored_channels
    return tuple(shape)


def channel_axis(name: str) -> int | None:
    """Returns the axis of a tensor along which FFN channels lie; None where none does."""
    if ".mlp.gate_proj." in name or ".mlp.up_proj." in name:
        return 0
    return 1 if name.endswith(".mlp.down_proj.weight") else None


def fill_channels(model: ModelDirectory, name: str, tensor: np.ndarray, *, axis: int) -> np.ndarray:
    """Returns a tensor of a layer with channels of zeros up to what a file holds."""
    missing = model.layers[int(name.split(".")[2])].stored_channels - tensor.shape[axis]
    return np.pad(tensor, [(0, missing if index == axis else 0) for index in range(tensor.ndim)])


def _is_zero_bias(model: ModelDirectory, name: str) -> bool:
    """Whether a tensor is a bias of zeros: transformers' switches ask for them, llama.cpp would add them."""
    return name.endswith(".bias") and not read_tensor(model, name).any()


def gguf_name(name: str) -> str:
    """Returns the name a tensor of a transformers decoder has in a GGUF file."""
    if name in _MODEL_NAMES:
        return _MODEL_NAMES[name]
    _, _, index, rest = name.split(".", 3)
    module, _, leaf = rest.rpartition(".")
    return f"blk.{index}.{_LAYER_NAMES[module]}.{leaf}"


def _converted(model: ModelDirectory, name: str, matrix_type: GGMLQuantizationType) -> np.ndarray:
    tensor = read_tensor(model, name)
    if ".self_attn.q_proj." in name or ".self_attn.k_proj." in name:
        layer = model.layers[int(name.split(".")[2])]
        tensor = permute_rows(tensor, layer.num_heads if ".q_proj." in name else layer.num_key_value_heads)
    axis = channel_axis(name)
    if axis is not None:
        tensor = fill_channels(model, name, tensor, axis=axis)
    if tensor.ndim > 1:
        if matrix_type == GGMLQuantizationType.F16 and np.abs(tensor).max() > np.finfo(np.float16).max:
            raise IncompatibleError(
                f"expected weights within float16, found larger ones in {name}", hint="export as F32 or BF16"
            )
        tensor = quantize(tensor, matrix_type)
    return np.ascontiguousarray(tensor)


def permute_rows(tensor: np.ndarray, num_heads: int) -> np.ndarray:
    """Returns q or k with the rows of each head reordered from halves (x0..,y0..) to neighbours (x0,y0,x1,y1..).

    Args:
        tensor: Weight [num_heads * D, I] or bias [num_heads * D], as transformers keeps it.
        num_heads: Heads this matrix has in this layer.
    """
    halves = tensor.reshape(num_heads, 2, tensor.shape[0] // num_heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)
