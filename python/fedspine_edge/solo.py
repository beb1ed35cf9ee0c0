"""Pruning and tuning on one machine, without a federation: a base model and examples -> a smaller, tuned model.

Comes in: an opened base model, tokens, how far to prune. Goes out: the tuned adapter at its mask, ready to be merged.
The pruning follows the federated schedule: nothing for the first tenth of the steps (LoRA's B begins at zero and says
nothing of importance), then a cubic approach, and the last fifth of the steps to recover.

Source: LoRAPrune (arXiv 2305.18403) for the cubic schedule; FLAP (arXiv 2312.11983) for the mean compensation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from fedspine_edge.batches import Batch, TokenSet, training_batches
from fedspine_edge.dtypes import BASE_DTYPES
from fedspine_edge.errors import UsageError
from fedspine_edge.hardware import available_memory_bytes
from fedspine_edge.importance import ImportanceMeter
from fedspine_edge.lora import fresh_factors
from fedspine_edge.masks import MODES, Keep, choose, keep_all, kept_counts
from fedspine_edge.memory_plan import StepShape, check_memory
from fedspine_edge.protocol import Layout
from fedspine_edge.shrink import kept_features
from fedspine_edge.tuning import ShrunkModel, Tuned, tune, updated_means
from fedspine_edge.workbench import GlobalModel, Workbench

WARM_UP = 0.1
COOL_DOWN = 0.2
FEWEST_WARM_UP_STEPS = 10


@dataclass(frozen=True)
class SoloSettings:
    """How a model is pruned and tuned on one machine.

    Attributes:
        pruning_ratio: Share of the heads and FFN channels to go, in [0, 0.9]; 0 tunes only.
        num_steps: Optimiser steps.
        batch_size: Examples a step.
        learning_rate: AdamW step size.
        rank: LoRA rank.
        scaling: alpha / rank.
        prune_interval: Steps between two prunings.
        mask_mode: `uniform` (stock loaders take the model) or `per-layer` (better accuracy).
        seed: Seed of the LoRA factors and of the order of the examples.
        base_dtype: How the frozen weights are held: `float32`, `bfloat16` or `int8`.
        lora_dropout: Share of the low-rank values that is dropped in a step, in [0, 1).
    """

    pruning_ratio: float = 0.0
    num_steps: int = 100
    batch_size: int = 8
    learning_rate: float = 1e-3
    rank: int = 16
    scaling: float = 2.0
    prune_interval: int = 5
    mask_mode: str = "per-layer"
    seed: int = 0
    base_dtype: str = "float32"
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.pruning_ratio <= 0.9:
            raise UsageError(f"expected a pruning ratio in [0, 0.9], found {self.pruning_ratio}")
        for name in ("num_steps", "batch_size", "rank", "prune_interval"):
            if getattr(self, name) < 1:
                raise UsageError(f"expected {name} of at least 1, found {getattr(self, name)}")
        if not 0 <= self.lora_dropout < 1:
            raise UsageError(f"expected a dropout of at least 0 and below 1, found {self.lora_dropout}")
        if self.mask_mode not in MODES:
            raise UsageError(f"expected mask mode {' or '.join(MODES)}, found {self.mask_mode!r}")
        if self.base_dtype not in BASE_DTYPES:
            raise UsageError(f"expected a base dtype of {', '.join(BASE_DTYPES)}, found {self.base_dtype!r}")
        fewest = round(FEWEST_WARM_UP_STEPS / (1 - COOL_DOWN)) + self.prune_interval
        if self.pruning_ratio > 0 and self.num_steps < fewest:
            raise UsageError(
                f"expected at least {fewest} steps to prune in, found {self.num_steps}",
                hint="the first ten tell which members matter, and the last ones recover what was lost",
            )

    def ratio_at(self, step: int) -> float:
        """Returns the share that has to be gone after `step` steps."""
        begin = max(FEWEST_WARM_UP_STEPS, WARM_UP * self.num_steps)
        end = (1 - COOL_DOWN) * self.num_steps
        if step < begin:
            return 0.0
        if step + self.prune_interval > end:
            return self.pruning_ratio
        return self.pruning_ratio * (1 - (1 - (step - begin) / (end - begin)) ** 3)


def prune_and_tune(
    bench: Workbench, examples: TokenSet, settings: SoloSettings, *, on_step: Callable[[int], None] = lambda step: None
) -> tuple[GlobalModel, Tuned]:
    """Tunes a model, pruning it on the way.

    Args:
        bench: The base model, opened.
        examples: Tokens to learn from, at least one row.
        settings: How.
        on_step: Called before each step with its number.

    Returns:
        The adapter at its mask, and what was measured.

    Raises:
        MemoryLimitError: A step on the whole model does not fit; nothing was started.
        TuningError: The loss is not finite.
    """
    layout = bench.layout
    shape = StepShape(settings.batch_size, max(map(len, examples.rows)), settings.rank, settings.base_dtype)
    kept = kept_counts(keep_all(layout))
    check_memory(bench.model, layout, kept, shape, available_bytes=available_memory_bytes())
    generator = torch.Generator().manual_seed(settings.seed)
    factors = {m.name: fresh_factors(m.out_features, m.in_features, settings.rank, generator) for m in layout.matrices}
    bench = dataclasses.replace(bench, base_dtype=settings.base_dtype)
    shrunk = bench.fit(keep_all(layout), factors, scaling=settings.scaling, mean_inputs={})
    batches = training_batches(
        examples, batch_size=settings.batch_size, num_batches=settings.num_steps, seed=settings.seed
    )

    def narrower(done: int, meter: ImportanceMeter) -> Keep | None:
        ratio = settings.ratio_at((done + 1) * settings.prune_interval)
        return _narrower(layout, shrunk.keep, meter, ratio, settings.mask_mode) if ratio > 0 else None

    tuned = tune(
        shrunk,
        _announced(batches, on_step),
        learning_rate=settings.learning_rate,
        prune_interval=settings.prune_interval,
        narrower=narrower,
        measure=settings.pruning_ratio > 0,
        own_mean_inputs=True,
        dropout=settings.lora_dropout,
        seed=settings.seed,
    )
    task_head = dict(bench.model.named_parameters())
    world = GlobalModel(
        keep=shrunk.keep,
        factors=_at_full_size(layout, shrunk),
        task_head={name: task_head[name].detach().numpy().copy() for name, _ in layout.task_head},
        mean_inputs=updated_means(shrunk.mean_inputs, tuned.mean_inputs),
        scaling=settings.scaling,
    )
    return world, tuned


def _announced(batches: Iterator[Batch], on_step: Callable[[int], None]) -> Iterator[Batch]:
    for step, batch in enumerate(batches):
        on_step(step)
        yield batch


def _narrower(layout: Layout, keep: Keep, meter: ImportanceMeter, ratio: float, mode: str) -> Keep | None:
    scores = {group.name: np.full(group.num_members, np.nan, dtype=np.float32) for group in layout.groups}
    for name, measured in meter.scores.items():
        scores[name][keep[name]] = measured
    narrow = choose(layout, scores, pruning_ratio=ratio, mode=mode, candidates=keep)
    return None if kept_counts(narrow) == kept_counts(keep) else narrow


def _at_full_size(layout: Layout, shrunk: ShrunkModel) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The factors in the base's own numbering, zero where members are gone."""
    whole = {}
    for matrix in layout.matrices:
        rows, columns = kept_features(layout, matrix, shrunk.keep)
        linear = shrunk.linears[matrix.name]
        lora_a = np.zeros((linear.rank, matrix.in_features), dtype=np.float32)
        lora_b = np.zeros((matrix.out_features, linear.rank), dtype=np.float32)
        lora_a[:, slice(None) if columns is None else columns.numpy()] = linear.lora_a.detach().numpy()
        lora_b[slice(None) if rows is None else rows.numpy()] = linear.lora_b.detach().numpy()
        whole[matrix.name] = (lora_a, lora_b)
    return whole
