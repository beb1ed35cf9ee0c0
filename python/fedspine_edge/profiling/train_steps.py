"""A tuning step as a device runs it, at pruning ratios and ranks: seconds, energy, and memory by class.

Comes in: a model directory, what a step is, and which arms. Goes out: one `StepRow` an arm, with every sample. A pass
times a few steps of each arm; passes go forwards and backwards in turn, so that a slow minute of the machine hits all
arms alike. The steps run in this process, as those of `fedspine tune` and of a device's rounds do.
"""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fedspine_edge.base_model import open_base
from fedspine_edge.batches import Batch, TokenSet, training_batches
from fedspine_edge.errors import IncompatibleError
from fedspine_edge.hardware import peak_memory_bytes, reset_peak_memory, usable_cores
from fedspine_edge.lora import fresh_factors, trainable_parameters
from fedspine_edge.masks import choose, keep_all
from fedspine_edge.profiling.energy import Energy, energy_of
from fedspine_edge.profiling.memory import process_memory
from fedspine_edge.profiling.noise import Quiet, QuietWatch, cpu_times
from fedspine_edge.profiling.watch import BoardWatch, Seen
from fedspine_edge.shrink import slice_factors
from fedspine_edge.tuning import IMPORTANCE_EVERY, MEAN_INPUT_EVERY, ShrunkModel, tune
from fedspine_edge.workbench import Workbench, open_workbench

TIMED_STEPS = IMPORTANCE_EVERY * MEAN_INPUT_EVERY // 2
"""Of a pass: importance and mean inputs, which a round measures every so many steps, come as often as in a round."""

WARM_UP_STEPS = 1  # of each pass: the allocator meets new shapes
ANSWER_TOKENS = 2  # a class word and the end of sequence, which a decoder learns
SCALING = 2.0
LEARNING_RATE = 1e-4
MODE = "per-layer"


class StepArm(NamedTuple):
    """What a step is measured at."""

    pruning_ratio: float
    rank: int


@dataclass(frozen=True)
class StepShape:
    """What a step is.

    Attributes:
        batch_size: Examples.
        num_tokens: Tokens of each.
        num_threads: Threads.
    """

    batch_size: int
    num_tokens: int
    num_threads: int


@dataclass(frozen=True)
class StepMemory:
    """Resident memory at the peak of the steps, by class; bytes. The classes add up to the peak.

    Attributes:
        runtime: What the process held before it opened the model: interpreter and libraries.
        weights: What opening and shrinking the model added.
        adapter: LoRA factors and the task head.
        gradients: Their gradients.
        moments: AdamW's two moments of each.
        activations: The rest of the peak: what the backward pass needs, buffers, what the allocator keeps.
    """

    runtime: int
    weights: int
    adapter: int
    gradients: int
    moments: int
    activations: int

    @property
    def peak(self) -> int:
        """Their sum."""
        return self.runtime + self.weights + self.adapter + self.gradients + self.moments + self.activations


@dataclass(frozen=True)
class StepRow:
    """What steps of one arm took; samples are in the order they were taken, one a pass.

    Attributes:
        arm: The arm.
        shape: What a step was.
        seconds: Seconds of a step.
        energy: Energy of all timed steps.
        memory: Peak memory of the first pass.
        quiet: Whether the machine was.
        seen: What was seen of the board.
    """

    arm: StepArm
    shape: StepShape
    seconds: tuple[float, ...]
    energy: Energy
    memory: StepMemory
    quiet: Quiet
    seen: Seen

    @property
    def median_seconds(self) -> float:
        """The middle one of the passes."""
        return statistics.median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Tokens through a step in a second, at its median time."""
        return self.shape.batch_size * self.shape.num_tokens / self.median_seconds

    @property
    def joules_per_step(self) -> float | None:
        """Energy of one step; None without a meter."""
        return None if self.energy.joules is None else self.energy.joules / (TIMED_STEPS * len(self.seconds))


@dataclass
class _Arm:
    """One arm while it is measured."""

    windows: list[tuple[float, float]] = field(default_factory=list)
    memory: StepMemory | None = None
    quiet: QuietWatch = field(default_factory=lambda: QuietWatch(usable_cores()))


def measure_steps(
    model_dir: Path,
    arms: Sequence[StepArm],
    shape: StepShape,
    *,
    passes: int,
    watch: BoardWatch,
    tell: Callable[[str], None] = lambda _: None,
) -> list[StepRow]:
    """Times steps of each arm.

    Args:
        model_dir: An unpruned or pruned model directory.
        arms: Pruning ratios, of the directory's own members, and ranks.
        shape: What a step is.
        passes: Samples of each arm.
        watch: A running watch of the board.
        tell: Called with what is going on, for a progress line.

    Returns:
        One row an arm, in their order.

    Raises:
        IncompatibleError: The model takes no rows of that length.
        CheckpointError: The directory is damaged.
    """
    torch.set_num_threads(shape.num_threads)
    gc.collect()
    runtime = process_memory(os.getpid()).rss_bytes or 0
    tell(f"{model_dir.name}: loading")
    bench, examples = _opened(model_dir, shape)
    count = WARM_UP_STEPS + TIMED_STEPS
    batches = list(training_batches(examples, batch_size=shape.batch_size, num_batches=count, seed=0))
    found = [_Arm() for _ in arms]
    _pass(bench, arms[0], batches, _Arm(), watch, runtime)  # threads start, pages of the embeddings are read
    for number in range(passes):
        order = range(len(arms)) if number % 2 == 0 else reversed(range(len(arms)))
        for index in order:
            arm = arms[index]
            tell(f"ratio {arm.pruning_ratio:g}, rank {arm.rank}: pass {number + 1} of {passes}")
            _pass(bench, arm, batches, found[index], watch, runtime)
    return [_row(arm, shape, one, watch) for arm, one in zip(arms, found, strict=True)]


def _opened(model_dir: Path, shape: StepShape) -> tuple[Workbench, TokenSet]:
    """The model, and rows of random tokens for it."""
    base = open_base(model_dir, sha256="not needed")
    decoder = base.family.task == "decoder"
    longest = getattr(base.config, "max_position_embeddings", None)
    if longest is not None and shape.num_tokens > longest:
        raise IncompatibleError(
            f"expected rows of at most {longest} tokens for {model_dir.name}, found {shape.num_tokens}",
            hint="choose a smaller --seq",
        )
    num_labels = 1 if decoder else int(base.config.num_labels)
    bench = open_workbench(model_dir, sha256="not needed", num_labels=num_labels, choices=[0] if decoder else None)
    generator = np.random.default_rng(0)
    # The last token of a decoder's row is only predicted.
    rows = generator.integers(0, base.config.vocab_size, (shape.batch_size, shape.num_tokens + decoder))
    answers = np.full(shape.batch_size, min(ANSWER_TOKENS, shape.num_tokens) if decoder else 0)
    return bench, TokenSet(tuple(rows), answers, generator.integers(0, num_labels, shape.batch_size))


def _pass(
    bench: Workbench, arm: StepArm, batches: Sequence[Batch], found: _Arm, watch: BoardWatch, runtime: int
) -> None:
    shrunk = _shrunk(bench, arm)
    _give_back()
    rest = process_memory(os.getpid()).rss_bytes or 0
    reset_peak_memory()
    marks: list[float] = []
    own, before = time.process_time(), cpu_times()
    tune(
        shrunk,
        _clocked(batches, watch, marks),
        learning_rate=LEARNING_RATE,
        prune_interval=len(batches) + 1,
        narrower=lambda done, meter: None,
    )
    took = marks[-1] - marks[0]
    found.quiet.add(before, cpu_times(), seconds=took, own_seconds=time.process_time() - own)
    found.windows.append((marks[WARM_UP_STEPS], marks[-1]))
    if found.memory is None:
        adapter = sum(parameter.nbytes for parameter in trainable_parameters(shrunk.model))
        held = rest + adapter + 2 * adapter
        found.memory = StepMemory(
            runtime=runtime,
            weights=max(0, rest - runtime - adapter),
            adapter=adapter,
            gradients=adapter,
            moments=2 * adapter,
            activations=max(0, peak_memory_bytes() - held),
        )


def _shrunk(bench: Workbench, arm: StepArm) -> ShrunkModel:
    layout, generator = bench.layout, np.random.default_rng(0)
    scores = {group.name: generator.random(group.num_members) for group in layout.groups}
    keep = choose(layout, scores, pruning_ratio=arm.pruning_ratio, mode=MODE)
    seed = torch.Generator().manual_seed(0)
    whole = {m.name: fresh_factors(m.out_features, m.in_features, arm.rank, seed) for m in layout.matrices}
    factors = slice_factors(layout, whole, keep_all(layout), keep)
    return bench.fit(keep, factors, scaling=SCALING, mean_inputs={})


def _clocked(batches: Sequence[Batch], watch: BoardWatch, marks: list[float]) -> Iterator[Batch]:
    """Yields the batches and notes when each step begins and the last one ends; power is sampled around them."""
    watch.sample()
    for batch in batches:
        marks.append(time.perf_counter())
        yield batch
    marks.append(time.perf_counter())
    watch.sample()


def _give_back() -> None:
    """Returns freed memory to the system, so that one arm's is not counted as the next one's."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _row(arm: StepArm, shape: StepShape, found: _Arm, watch: BoardWatch) -> StepRow:
    seconds = tuple((end - start) / TIMED_STEPS for start, end in found.windows)
    spread = statistics.stdev(seconds) / statistics.fmean(seconds) if len(seconds) > 1 else None
    seen = watch.seen(found.windows)
    assert found.memory is not None
    return StepRow(
        arm=arm,
        shape=shape,
        seconds=seconds,
        energy=energy_of(watch.trace, found.windows, None),
        memory=found.memory,
        quiet=found.quiet.quiet(clock_kept=seen.clock_kept, held_back=seen.held_back or (), spread=spread),
        seen=seen,
    )
