"""A base model opened for work, and the global adapter at a mask on it.

Comes in: a model directory, the global adapter. Goes out: a model that can be tuned, judged or merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedspine_edge.base_model import BaseModel, instantiate, open_base
from fedspine_edge.batches import TokenSet
from fedspine_edge.masks import Keep, keep_all, kept_counts
from fedspine_edge.protocol import Layout
from fedspine_edge.shrink import Factors, slice_factors
from fedspine_edge.structure import measured_sparsity
from fedspine_edge.tuning import ShrunkModel, predict


@dataclass
class Workbench:
    """A base model opened for tuning; stays loaded between rounds and serves any number of them.

    Attributes:
        base: The model directory.
        model: The model; its prunable layers are replaced each round.
        layout: Its layout.
        choices: First token of each class's word for a decoder, None for a classifier.
        base_dtype: How the frozen weights are held: a name of `kernels.BASE_DTYPES`.
    """

    base: BaseModel
    model: Any
    layout: Layout
    choices: list[int] | None
    base_dtype: str = "float32"

    def fit(self, keep: Keep, factors: Factors, *, scaling: float, mean_inputs: dict[str, np.ndarray]) -> ShrunkModel:
        """Returns the model shrunk to `keep`, with the given factors."""
        shrunk = ShrunkModel(self.model, self.layout, keep, self.base.reader(self.base_dtype), scaling, mean_inputs)
        shrunk.load(factors)
        return shrunk


def open_workbench(path: Path, *, sha256: str | None, num_labels: int, choices: list[int] | None) -> Workbench:
    """Opens a base model for tuning.

    Args:
        path: Model directory.
        sha256: Its hash when already known.
        num_labels: Classes of the task.
        choices: First token of each class's word for a decoder, None for a classifier.
    """
    base = open_base(path, sha256=sha256)
    model, layout = instantiate(base, num_labels=None if choices else num_labels, seed=0)
    return Workbench(base, model, layout, choices)


@dataclass(frozen=True)
class GlobalModel:
    """The global adapter at a mask: what is judged, merged and exported.

    Attributes:
        keep: Members that stay.
        factors: LoRA factors at all rows and columns, float32: matrix name -> (lora_a [R, I], lora_b [O, R]).
        task_head: Densely trained parameters.
        mean_inputs: Matrix name -> mean input [I].
        scaling: alpha / rank.
    """

    keep: Keep
    factors: Mapping[str, tuple[np.ndarray, np.ndarray]]
    task_head: Mapping[str, np.ndarray]
    mean_inputs: Mapping[str, np.ndarray]
    scaling: float

    def kept_factors(self, layout: Layout) -> Factors:
        """Returns the factors at the rows and columns of the kept members."""
        whole = {name: (torch.from_numpy(a), torch.from_numpy(b)) for name, (a, b) in self.factors.items()}
        return slice_factors(layout, whole, keep_all(layout), self.keep)

    def sparsity(self, layout: Layout) -> float:
        """Returns the share of prunable base weights that is gone, 0..1."""
        return measured_sparsity(layout, kept_counts(self.keep))


def load_global(bench: Workbench, world: GlobalModel) -> ShrunkModel:
    """Returns the workbench's model with the global adapter at its mask."""
    shrunk = bench.fit(
        world.keep,
        world.kept_factors(bench.layout),
        scaling=world.scaling,
        mean_inputs=dict(world.mean_inputs),
    )
    parameters = dict(bench.model.named_parameters())
    with torch.no_grad():
        for name, value in world.task_head.items():
            parameters[name].copy_(torch.from_numpy(value))
    return shrunk


def num_correct(bench: Workbench, world: GlobalModel, tokens: TokenSet) -> int:
    """Returns how many rows the global model classifies rightly."""
    load_global(bench, world)
    return int((predict(bench.model, tokens, choices=bench.choices) == tokens.labels).sum())
