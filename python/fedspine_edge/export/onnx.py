"""A (pruned) model directory -> a directory that onnxruntime's users take as it is: model.onnx, config, tokenizer.

In: a model directory of any family. Out: classifiers in float32 or with 8-bit weights, decoders with their cache in
float32 or float16; weights of more than `MAX_INLINE_BYTES` lie in `model.onnx_data`, for protobuf ends at 2 GiB.
8-bit decoders are not offered: quantising their activations dynamically loses half of the most likely tokens.

Source: ONNX specification, external data; onnxruntime.quantization; Optimum's file names.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedspine_edge.atomic import write_directory
from fedspine_edge.base_model import open_base
from fedspine_edge.checkpoint import load_pruned, read_prune_file
from fedspine_edge.errors import CheckpointError, IncompatibleError
from fedspine_edge.export.model_directory import read_json
from fedspine_edge.export.onnx_graph import quietly, trace
from fedspine_edge.export.onnx_session import DATA_FILE, METADATA_PREFIX, MODEL_FILE, optional_library
from fedspine_edge.sources import packaged_facts

PRECISIONS = {"classifier": ("fp32", "int8"), "decoder": ("fp32", "fp16")}
"""What `write_onnx` writes, by task."""

MAX_INLINE_BYTES = 1_800_000_000

_ADVICE = {
    "int8": "take fp32 or fp16, or a GGUF file: 8-bit weights lose half of a decoder's most likely tokens",
    "fp16": "take int8, which is smaller and faster, or fp32",
}

_PRODUCER = "fedspine-edge"
_QUANTIZED_OPERATIONS = ["MatMul", "Gather"]  # without Gather the embeddings, most of a small encoder, stay float32
_COPIED = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "generation_config")
_WRITTEN = ("config.json", MODEL_FILE, DATA_FILE)


@dataclass(frozen=True)
class OnnxModel:
    """A written model.

    Attributes:
        path: Its `model.onnx`.
        task: `classifier` or `decoder`.
        precision: `fp32`, `fp16` or `int8`.
        size_bytes: Size of the graph and its weights.
    """

    path: Path
    task: str
    precision: str
    size_bytes: int


def write_onnx(model_dir: Path, output: Path, *, precision: str, external_data: bool | None = None) -> OnnxModel:
    """Writes a model directory as a directory for onnxruntime, whole or not at all.

    Args:
        model_dir: Pruned or unpruned model directory of any family.
        output: Directory to write; an earlier export there is replaced.
        precision: One of `PRECISIONS` for the model's task.
        external_data: Whether the weights go into a file of their own; None = when they are too large for one file.

    Raises:
        ValueError: The precision is unknown.
        CheckpointError: The directory is damaged, `output` holds something else than an export, or the disk is full;
            nothing half-written stays.
        IncompatibleError: A precision that is not offered for this task, a model that cannot be traced, weights beyond
            the precision's range, or a package of the extra `onnx` that is missing.
    """
    known = sorted({name for names in PRECISIONS.values() for name in names})
    if precision not in known:
        raise ValueError(f"expected a precision of {', '.join(known)}, found {precision!r}")
    task = open_base(model_dir, sha256="not needed").family.task
    if precision not in PRECISIONS[task]:
        raise IncompatibleError(
            f"expected a precision of {', '.join(PRECISIONS[task])} for a {task}, found {precision}",
            hint=_ADVICE[precision],
        )
    _refuse_other_content(output)
    config = read_json(model_dir / "config.json")
    facts = _facts(model_dir, config, task=task, precision=precision)
    model = _load(model_dir)
    _check_weights(model, half=precision == "fp16")
    graph = trace(model.half() if precision == "fp16" else model, task=task)

    def fill(partial: Path) -> None:
        _write_graph(graph, partial, facts, quantized=precision == "int8", external_data=external_data)
        # The class named in auto_map stays behind: the graph is the model now.
        settings = {key: value for key, value in config.items() if key != "auto_map"}
        (partial / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        for file in model_dir.iterdir():
            if file.name.startswith(_COPIED):
                shutil.copyfile(file, partial / file.name)

    write_directory(output, fill)
    size = sum(file.stat().st_size for name in (MODEL_FILE, DATA_FILE) if (file := output / name).is_file())
    return OnnxModel(path=output / MODEL_FILE, task=task, precision=precision, size_bytes=size)


def _refuse_other_content(output: Path) -> None:
    """Raises CheckpointError where replacing `output` would remove what no export has written."""
    if not output.exists():
        return
    if not output.is_dir():
        raise CheckpointError(f"expected a directory or nothing at {output}, found a file", hint="name a directory")
    others = sorted(p.name for p in output.iterdir() if p.name not in _WRITTEN and not p.name.startswith(_COPIED))
    if others:
        raise CheckpointError(
            f"expected an earlier export or nothing in {output}, found {others[0]}", hint="name a new directory"
        )


def _load(model_dir: Path) -> Any:
    try:
        return load_pruned(model_dir)
    except (KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"expected tensors that make a whole model in {model_dir}, found them not to fit: {reason}",
            hint="write the directory again",
        ) from error


def _check_weights(model: Any, *, half: bool) -> None:
    largest = torch.finfo(torch.float16).max
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise IncompatibleError(f"expected finite weights, found NaN or infinity in {name}")
        if half and bool(parameter.abs().max() > largest):
            raise IncompatibleError(f"expected weights within float16, found larger ones in {name}", hint="take fp32")


def _facts(model_dir: Path, config: Mapping[str, Any], *, task: str, precision: str) -> dict[str, str]:
    """Returns the file's own properties: what it is and what became of which model."""
    record = read_prune_file(model_dir)
    stated = model_dir / "fedspine_base.json"
    base = record.get("base") or (read_json(stated) if stated.is_file() else packaged_facts(model_dir))
    facts = {
        "version": _version(),
        "task": task,
        "precision": precision,
        "vocab_size": config.get("vocab_size"),
        "max_tokens": _max_tokens(config) if task == "classifier" else None,
        "base_name": base.get("name"),
        "base_license": base.get("license"),
        **{key: record.get(key) for key in ("sparsity", "parent_sha256", "criterion", "mode")},
    }
    return {f"{METADATA_PREFIX}{key}": str(value) for key, value in facts.items() if value is not None}


def _max_tokens(config: Mapping[str, Any]) -> int:
    """Returns the longest row a classifier has positions for; some families begin to count after their padding."""
    skipped = {"roberta": int(config.get("pad_token_id") or 0) + 1, "mpnet": 2}.get(str(config["model_type"]), 0)
    return int(config["max_position_embeddings"]) - skipped


def _version() -> str:
    return importlib.metadata.version(_PRODUCER)


def _write_graph(
    graph: Any, folder: Path, facts: Mapping[str, str], *, quantized: bool, external_data: bool | None
) -> None:
    ir = optional_library("onnx_ir")
    whole = folder / "whole.onnx"
    if quantized:
        ir.save(graph, whole, external_data=f"{whole.name}_data" if _is_large(graph) else None)
        graph = _quantized(whole, folder / "quantized.onnx")
    graph.producer_name, graph.producer_version = _PRODUCER, _version()
    graph.metadata_props.clear()
    graph.metadata_props.update(facts)
    external = _is_large(graph) if external_data is None else external_data
    ir.save(graph, folder / MODEL_FILE, external_data=DATA_FILE if external else None)
    for intermediate in (*folder.glob("whole.onnx*"), *folder.glob("quantized.onnx*")):
        intermediate.unlink()


def _is_large(graph: Any) -> bool:
    weights = (value.const_value for value in graph.graph.initializers.values())
    return sum(int(weight.nbytes) for weight in weights) > MAX_INLINE_BYTES


def _quantized(source: Path, target: Path) -> Any:
    """Returns the graph with weights as int8; activations are quantised as they come.

    One scale a channel: a fifth of the divergence of one a matrix, at the same speed. Weights within 7 bits, since the
    8-bit sums of x86 processors without VNNI overflow otherwise, and a file would say something else there.
    """
    library = optional_library("onnxruntime.quantization")
    with quietly():
        library.quantize_dynamic(
            source,
            target,
            op_types_to_quantize=_QUANTIZED_OPERATIONS,
            per_channel=True,
            reduce_range=True,
            weight_type=library.QuantType.QInt8,
            use_external_data_format=source.with_name(f"{source.name}_data").is_file(),
        )
    return optional_library("onnx_ir").load(target)
