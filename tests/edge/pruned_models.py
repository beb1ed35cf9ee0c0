"""Tiny models at a mask with random factors, saved as a run saves them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fedspine_edge.base_model import instantiate, open_base
from fedspine_edge.checkpoint import save_pruned
from fedspine_edge.masks import Keep, keep_all
from fedspine_edge.protocol import Layout
from fedspine_edge.workbench import GlobalModel

RANK = 3
SCALING = 2.0


def uniform_keep(layout: Layout, *, heads: bool = True) -> Keep:
    """Keeps the later half of the heads and two thirds of the channels of each layer, from different places."""
    keep = keep_all(layout)
    for group in layout.groups:
        layer, members = int(group.name.split(".")[1]), group.num_members
        if group.kind == "heads" and heads:
            keep[group.name] = keep[group.name][members // 2 :] if layer == 0 else keep[group.name][: members // 2]
        elif group.kind == "ffn":
            dropped = group.block * (layer % (members // group.block))
            gone = np.arange(dropped, dropped + members // 3 // group.block * group.block)
            keep[group.name] = np.setdiff1d(keep[group.name], gone).astype(np.int32)
    return keep


def mixed_keep(layout: Layout) -> Keep:
    """Keeps one head and all channels of layer 0, all heads and the last block of channels of layer 1."""
    keep = keep_all(layout)
    keep["layers.0.heads"] = keep["layers.0.heads"][1:]
    keep["layers.1.ffn"] = keep["layers.1.ffn"][-layout.group("layers.1.ffn").block :]
    return keep


def world_at(layout: Layout, keep: Keep, *, compensated: bool = False, tuned: bool = True) -> GlobalModel:
    """Returns random factors (zero ones when not tuned) at a mask, all the same for one layout."""
    generator = np.random.default_rng(3)
    factors, mean_inputs = {}, {}
    for matrix in layout.matrices:
        lora_a = generator.normal(0, 0.2, (RANK, matrix.in_features)).astype(np.float32)
        lora_b = generator.normal(0, 0.1, (matrix.out_features, RANK)).astype(np.float32)
        factors[matrix.name] = (lora_a, lora_b if tuned else np.zeros_like(lora_b))
        mean = generator.normal(0.3, 0.2, matrix.in_features).astype(np.float32)
        if compensated and matrix.in_group:
            mean_inputs[matrix.name] = mean
    task_head = {name: generator.normal(0, 0.5, shape).astype(np.float32) for name, shape in layout.task_head}
    return GlobalModel(keep=keep, factors=factors, task_head=task_head, mean_inputs=mean_inputs, scaling=SCALING)


def save_world(
    folder: Path,
    base_dir: Path,
    chooser: Callable[[Layout], Keep],
    *,
    compensated: bool = False,
    tuned: bool = True,
    task_head: bool = True,
) -> Path:
    """Saves a base at a mask as `save_pruned` does, with a random task head or its own, and returns the folder."""
    base = open_base(base_dir)
    decoder = base.family.task == "decoder"
    _, layout = instantiate(base, num_labels=None if decoder else 2, seed=0)
    keep = chooser(layout)
    mode = "uniform" if len({len(members) for members in keep.values()}) <= 2 else "per-layer"
    world = world_at(layout, keep, compensated=compensated, tuned=tuned)
    save_pruned(folder, base, layout, world if task_head else replace(world, task_head={}), mode=mode)
    return folder


def kept_factors(base_dir: Path, chooser: Callable[[Layout], Keep]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Returns the factors of `world_at` at the rows and columns of a mask."""
    base = open_base(base_dir)
    _, layout = instantiate(base, num_labels=None if base.family.task == "decoder" else 2, seed=0)
    return world_at(layout, chooser(layout)).kept_factors(layout)
