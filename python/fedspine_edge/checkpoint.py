"""A pruned model's directory, and what a device remembers, on disk.

Comes in: the global adapter at a mask, or a device's state. Goes out: a directory that transformers loads (config, the
merged and shrunk weights under their usual names, tokenizer) with `fedspine_prune.json`, which tells what was kept and
how wide the model was; or one safetensors file a device and round. Written whole or not at all; no pickle.

Source: safetensors format description; docs/protocol.md, section on files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_numpy
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedspine_edge.atomic import write_bytes, write_directory
from fedspine_edge.base_model import BaseModel, base_facts, open_base
from fedspine_edge.device import DeviceState
from fedspine_edge.errors import CheckpointError
from fedspine_edge.hf.directory import unpruned_widths, write_config
from fedspine_edge.lora import merged_weight, replace_module
from fedspine_edge.masks import Keep, keep_all
from fedspine_edge.protocol import Layout
from fedspine_edge.shrink import fit_attention, shrunk_parts
from fedspine_edge.structure import layout_of
from fedspine_edge.workbench import GlobalModel

PRUNE_FORMAT = 1
PRUNE_FILE = "fedspine_prune.json"
KEPT_STATES = 2
RESIDUALS = ("residual_a/", "residual_b/")
MATRIX_DIMENSIONS = 2


def save_pruned(
    path: Path,
    base: BaseModel,
    layout: Layout,
    world: GlobalModel,
    *,
    mode: str,
    task: Mapping[str, Any] | None = None,
) -> None:
    """Writes the merged, shrunk model as a directory that `from_pretrained` loads.

    With different widths in its layers, and for an encoder that lost heads, that needs `trust_remote_code=True`.

    Args:
        path: Final name; one of that name is replaced.
        base: The unpruned model.
        layout: Its layout.
        world: The global adapter at a mask.
        mode: `uniform` or `per-layer`, for the record.
        task: What it was tuned for, for the record: `classes`, and a decoder's `prompt`.

    Raises:
        CheckpointError: The disk is full; nothing half-written stays.
    """

    def fill(partial: Path) -> None:
        tensors = merged_tensors(base, layout, world)
        lineage = _lineage(base, layout, world)
        kept = _keep_of(lineage)
        tensors |= write_config(partial, base.config, kept, tensors, [matrix.name for matrix in layout.matrices])
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        for file in base.path.iterdir():
            if file.name.startswith(("tokenizer", "vocab", "special_tokens", "chat_template", "merges")):
                shutil.copyfile(file, partial / file.name)
        document = {
            "format": PRUNE_FORMAT,
            "parent_sha256": base.sha256,
            "criterion": "LoRA-guided importance, agreed over the fleet",
            "mode": mode,
            **lineage,
        }
        if task is not None:
            document["task"] = dict(task)
        (partial / PRUNE_FILE).write_text(json.dumps(document) + "\n")

    write_directory(path, fill)


def _lineage(base: BaseModel, layout: Layout, world: GlobalModel) -> dict[str, Any]:
    """What was kept of the very first model, in its numbering, also where the base had been pruned before."""
    earlier = read_prune_file(base.path)
    groups = {}
    for group in layout.groups:
        before = earlier.get("groups", {}).get(group.name)
        members = np.arange(group.num_members) if before is None else np.asarray(before["kept"])
        total = group.num_members if before is None else before["num_members"]
        groups[group.name] = {"num_members": total, "kept": members[world.keep[group.name]].tolist()}
    return {
        "sparsity": 1 - (1 - earlier.get("sparsity", 0.0)) * (1 - world.sparsity(layout)),
        "unpruned": earlier.get("unpruned") or unpruned_widths(base.config),
        "groups": groups,
        "base": earlier.get("base") or base_facts(base.path),
    }


def merged_tensors(base: BaseModel, layout: Layout, world: GlobalModel) -> dict[str, Tensor]:
    """Returns every tensor of the merged, shrunk model under its usual name; matrices as float16."""
    factors, reader, tensors = world.kept_factors(layout), base.reader(), dict[str, Tensor]()
    shells = {f"{matrix.name}.{part}" for matrix in layout.matrices for part in ("weight", "bias")}
    stored_shells = {base.stored_name(name) for name in shells}
    for matrix in layout.matrices:
        weight, rows, columns, bias = shrunk_parts(
            layout, matrix, world.keep, base=reader, mean_input=world.mean_inputs.get(matrix.name)
        )
        kept = weight if rows is None else weight[rows]
        kept = kept if columns is None else kept[:, columns]
        lora_a, lora_b = factors[matrix.name]
        tensors[f"{matrix.name}.weight"] = merged_weight(kept, lora_a, lora_b, world.scaling)
        if bias is not None:
            tensors[f"{matrix.name}.bias"] = bias
    task_head = {name: torch.from_numpy(value) for name, value in world.task_head.items()}
    prefix = base.family.layers.split(".")[0] + "."
    whole = ("",) if base.family.task == "decoder" else (prefix, *base.family.task_head)
    for stored in base.files:
        if stored not in stored_shells:
            name = stored if stored.startswith(whole) else prefix + stored
            tensors.setdefault(name, base.read(stored))
    return {name: _as_stored(tensor) for name, tensor in (tensors | task_head).items()}


def _as_stored(tensor: Tensor) -> Tensor:
    """Matrices as float16, which F16 exports then hold to the bit; vectors and matrices beyond its range as float32."""
    fits = tensor.ndim == MATRIX_DIMENSIONS and bool(tensor.abs().max() <= torch.finfo(torch.float16).max)
    return tensor.to(torch.float16 if fits else torch.float32).contiguous()


def load_pruned(path: Path) -> nn.Module:
    """Loads a directory written by `save_pruned` (or an unpruned one) as a plain transformers model.

    Raises:
        CheckpointError: Damaged files, or a `fedspine_prune.json` of another format.
    """
    base = open_base(path)
    document = read_prune_file(path)
    tensors = {name: tensor.float() for name, tensor in load_file(path / "model.safetensors").items()}
    decoder = base.family.task == "decoder"
    auto_class = AutoModelForCausalLM if decoder else AutoModelForSequenceClassification
    with init_empty_weights(include_buffers=False):
        model = auto_class.from_config(base.config, dtype=torch.float32)
    layout = layout_of(base.config, base_sha256=base.sha256)
    for matrix in layout.matrices:
        weight, bias = tensors[f"{matrix.name}.weight"], tensors.get(f"{matrix.name}.bias")
        with init_empty_weights():
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        replace_module(model, matrix.name, linear)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise CheckpointError(f"expected tensor {empty[0]} in {path}, found none of that name")
    if document:
        # Heads are in the unpruned model's numbering unless the config, and with it the layout, knows them.
        known = hasattr(base.config, "position_bias_heads")
        fit_attention(model, layout, keep_all(layout) if known else _keep_of(document))
    loaded: nn.Module = model.requires_grad_(False).eval()
    return loaded


def read_prune_file(path: Path) -> dict[str, Any]:
    """Returns `fedspine_prune.json` of a model directory; empty when there is none.

    Raises:
        CheckpointError: It is malformed or of another format.
    """
    file = path / PRUNE_FILE
    if not file.is_file():
        return {}
    try:
        document: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"expected JSON in {file}, found: {error}") from error
    if document.get("format") != PRUNE_FORMAT:
        raise CheckpointError(
            f"{file} is format {document.get('format')}, this program reads {PRUNE_FORMAT}",
            hint="use the fedspine version that wrote it",
        )
    return document


def _keep_of(document: Mapping[str, Any]) -> Keep:
    return {name: np.asarray(group["kept"], dtype=np.int32) for name, group in document["groups"].items()}


def save_device_state(folder: Path, device_id: str, round_index: int, state: DeviceState) -> None:
    """Writes what a device remembers after a round; the newest two of a device are kept.

    Raises:
        CheckpointError: The disk is full; the last state stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    blob = save_numpy(
        {name: np.ascontiguousarray(array) for name, array in {**state.importance, **_residual_arrays(state)}.items()},
        metadata={"pruning_ratio": repr(state.pruning_ratio)},
    )
    write_bytes(folder / _state_name(device_id, round_index), blob)
    for _, old in _states(folder, device_id)[:-KEPT_STATES]:
        old.unlink(missing_ok=True)


def _residual_arrays(state: DeviceState) -> dict[str, np.ndarray]:
    return {
        side + name: array
        for name, pair in state.residuals.items()
        for side, array in zip(RESIDUALS, pair, strict=True)
    }


def load_device_state(folder: Path, device_id: str, before_round: int) -> DeviceState:
    """Returns what a device remembered when a round began: the newest whole state of an earlier round."""
    for round_index, file in reversed(_states(folder, device_id)):
        if round_index >= before_round:
            continue
        try:
            with safe_open(file, framework="np") as opened:
                arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                importance = {name: array for name, array in arrays.items() if not name.startswith(RESIDUALS)}
                residuals = {
                    name[len(RESIDUALS[0]) :]: (array, arrays[RESIDUALS[1] + name[len(RESIDUALS[0]) :]])
                    for name, array in arrays.items()
                    if name.startswith(RESIDUALS[0])
                }
                return DeviceState(float(opened.metadata()["pruning_ratio"]), importance, residuals)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            continue
    return DeviceState()


def _state_name(device_id: str, round_index: int) -> str:
    return f"{device_id}.round-{round_index:06d}.safetensors"


def _states(folder: Path, device_id: str) -> list[tuple[int, Path]]:
    found = folder.glob(f"{device_id}.round-*.safetensors")
    return sorted((int(file.name.rsplit(".round-", 1)[1].split(".")[0]), file) for file in found)
