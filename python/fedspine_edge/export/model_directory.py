"""A model directory as an exporter sees it: every name, shape and width checked before a byte is written.

In: `config.json` (with the widths of the unpruned model or of every layer), `*.safetensors` (shrunk shapes), optionally
`fedspine_prune.json`. Out: a `ModelDirectory`, whose tensors are read one at a time from the mapped file.
No model is built, so a 7B model is exported in the memory of its largest matrix.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from fedspine_edge.errors import CheckpointError, IncompatibleError
from fedspine_edge.export.decoder_shapes import CHANNEL_BLOCK, LayerWidths, check_shapes, head_dim, total_kv_heads

FAMILIES = ("llama", "mistral", "qwen2")
ENCODERS = ("bert", "roberta", "distilbert", "mpnet")
PRUNE_FORMAT = 1

_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "rms_norm_eps",
    "vocab_size",
)


@dataclass(frozen=True)
class ModelDirectory:
    """A checked model directory.

    Attributes:
        path: Where it is.
        config: `config.json`; its widths are not those of the layers where these differ.
        layers: Widths of each layer, from the tensors' shapes.
        shapes: Shape of each tensor, by its transformers name.
        files: The file that holds each tensor.
        prune_record: `fedspine_prune.json`, empty for an unpruned model.
        base: What is known of the unpruned model's origin: name, license, tokenizer_gguf, ...
    """

    path: Path
    config: Mapping[str, Any] = field(repr=False)
    layers: tuple[LayerWidths, ...]
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    files: Mapping[str, Path] = field(repr=False)
    prune_record: Mapping[str, Any] = field(repr=False)
    base: Mapping[str, Any] = field(repr=False)

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return head_dim(self.config)

    @property
    def is_uniform(self) -> bool:
        """Whether every layer has the same widths."""
        return len(set(self.layers)) == 1

    @property
    def num_parameters(self) -> int:
        """Weights in the file, a tied head counted once."""
        return sum(int(np.prod(shape)) for shape in self.shapes.values())


def read_model_directory(path: Path) -> ModelDirectory:
    """Returns a model directory after every check an export needs.

    Args:
        path: Directory with `config.json`, `*.safetensors` and, for a pruned model, `fedspine_prune.json`.

    Raises:
        CheckpointError: A file is missing, truncated or not JSON.
        IncompatibleError: The family is unknown, a tensor is missing, surplus or of a wrong shape, a width is one that
            engines cannot run, or `fedspine_prune.json` does not describe these tensors.
    """
    config = read_json(path / "config.json")
    _check_config(config)
    record, facts = (
        read_json(path / name) if (path / name).exists() else {}
        for name in ("fedspine_prune.json", "fedspine_base.json")
    )
    shapes, files = _read_shapes(path)
    layers = tuple(_layer_widths(index, config, shapes) for index in range(config["num_hidden_layers"]))
    check_shapes(config, layers, shapes)
    if record:
        _check_record(record, config, layers)
    if config.get("tie_word_embeddings"):
        shapes = {name: shape for name, shape in shapes.items() if name != "lm_head.weight"}
    return ModelDirectory(
        path=path,
        config=config,
        layers=layers,
        shapes=shapes,
        files=files,
        prune_record=record,
        base=record.get("base") or facts,
    )


def read_tensor(model: ModelDirectory, name: str) -> np.ndarray:
    """Returns one tensor as float32, read from the mapped file.

    Raises:
        IncompatibleError: It holds NaN or infinity.
    """
    with safe_open(model.files[name], framework="pt") as file:
        tensor: np.ndarray = file.get_tensor(name).to(torch.float32).numpy()
    if not np.isfinite(tensor).all():
        raise IncompatibleError(f"expected finite weights, found NaN or infinity in {name}")
    return tensor


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; raises CheckpointError when it is missing or damaged."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"expected a readable {path.name} in {path.parent}: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"expected an object in {path}, found {type(document).__name__}")
    return document


def _read_shapes(directory: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, Path]]:
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"expected *.safetensors in {directory}, found none")
    shapes: dict[str, tuple[int, ...]] = {}
    files: dict[str, Path] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 not a dict
                    shapes[name], files[name] = tuple(file.get_slice(name).get_shape()), path
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"expected a whole {path.name} in {directory}: {error}", hint="copy the file again"
            ) from error
    return shapes, files


def _check_config(config: Mapping[str, Any]) -> None:
    family = config.get("model_type")
    if family not in FAMILIES:
        raise IncompatibleError(
            f"expected a model of family {', '.join(FAMILIES)}, found {family!r}",
            hint="export an encoder as ONNX: llama.cpp's encoders cannot lose heads" if family in ENCODERS else None,
        )
    missing = [key for key in _REQUIRED if key not in config]
    if missing:
        raise IncompatibleError(f"expected {', '.join(missing)} in config.json, found none")
    if config.get("hidden_act", "silu") != "silu":
        raise IncompatibleError(f"expected the silu activation, found {config['hidden_act']!r}")
    rope = config.get("rope_parameters") or {}
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise IncompatibleError("expected rotary embeddings over whole heads, found a partial_rotary_factor")


def _layer_widths(index: int, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> LayerWidths:
    """Returns the widths of one layer from its tensors; raises IncompatibleError for widths engines cannot run."""
    dim = head_dim(config)
    rows = {}
    for matrix in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"):
        name = f"model.layers.{index}.{matrix}.weight"
        if name not in shapes:
            raise IncompatibleError(f"expected tensor {name}, found none")
        rows[matrix] = shapes[name][0]
    num_heads, num_kv_heads = rows["self_attn.q_proj"] // dim, rows["self_attn.k_proj"] // dim
    if num_heads == 0 or num_kv_heads == 0:
        raise IncompatibleError(
            f"expected at least one head in each layer, found none in layer {index}", hint="keep one KV group"
        )
    per_group = config["num_attention_heads"] // total_kv_heads(config)
    if num_heads != per_group * num_kv_heads:
        raise IncompatibleError(
            f"expected {per_group} query heads per KV head, found {num_heads} for {num_kv_heads} in layer {index}",
            hint="prune whole KV groups",
        )
    channels = rows["mlp.up_proj"]
    if channels == 0:
        raise IncompatibleError(
            f"expected FFN channels in each layer, found none in layer {index}",
            hint=f"keep {CHANNEL_BLOCK} of them: without any, llama.cpp drops the layer's attention too",
        )
    return LayerWidths(num_heads=num_heads, num_key_value_heads=num_kv_heads, intermediate_size=channels)


def _check_record(record: Mapping[str, Any], config: Mapping[str, Any], layers: tuple[LayerWidths, ...]) -> None:
    """Raises IncompatibleError where `fedspine_prune.json` and the tensors disagree on what was kept."""
    if record.get("format") != PRUNE_FORMAT:
        raise IncompatibleError(
            f"fedspine_prune.json is format {record.get('format')}, this program reads {PRUNE_FORMAT}",
            hint="upgrade the older side",
        )
    unpruned = {**config, **record.get("unpruned", {})}
    totals = {"heads": total_kv_heads(unpruned), "ffn": int(unpruned["intermediate_size"])}
    groups = record.get("groups", {})
    for index, layer in enumerate(layers):
        for kind, found in (("heads", layer.num_key_value_heads), ("ffn", layer.intermediate_size)):
            group = groups.get(f"layers.{index}.{kind}")
            kept = len(group["kept"]) if group else totals[kind]
            if kept != found:
                raise IncompatibleError(
                    f"fedspine_prune.json keeps {kept} {kind} in layer {index}, the tensors have {found}",
                    hint="the directory mixes two models: write it again",
                )
