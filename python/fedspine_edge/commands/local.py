"""`fedspine prune` and `fedspine tune`: a user's own model and data on one machine, without a federation.

Comes in: a model (pruned before or not), examples, how far to prune. Goes out: a model directory that transformers
loads and `fedspine export` takes, and what it scores on examples it has not seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedspine_edge.base_model import base_facts
from fedspine_edge.checkpoint import read_prune_file, save_pruned
from fedspine_edge.commands.loaders import loads_in, try_loaders
from fedspine_edge.commands.targets import Target, encoding_of, is_decoder, model_target, task_for
from fedspine_edge.data import load_examples, split
from fedspine_edge.errors import UsageError
from fedspine_edge.export.gguf import refuse_existing
from fedspine_edge.hardware import peak_memory_bytes
from fedspine_edge.solo import SoloSettings, prune_and_tune
from fedspine_edge.workbench import num_correct, open_workbench

MAX_HELD_OUT = 500
OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Learned:
    """What came of it.

    Attributes:
        path: The model directory.
        accuracy: Share of the held-out rows it gets right, 0..1.
        num_held_out: Those rows.
        sparsity: Share of the given model's prunable weights that went.
        loss_before: Training loss of the first steps.
        loss_after: Training loss of the last steps.
        seconds: Time of the steps.
        peak_memory_bytes: Peak resident memory of this process.
        loads_in: Which loaders take the directory.
    """

    path: Path
    accuracy: float
    num_held_out: int
    sparsity: float
    loss_before: float
    loss_after: float
    seconds: float
    peak_memory_bytes: int
    loads_in: str

    def record(self) -> dict[str, Any]:
        """Returns what `--json` prints."""
        return {**vars(self), "path": str(self.path)}

    def lines(self) -> str:
        """Returns what a person reads."""
        gone = f", {self.sparsity:.1%} of its prunable weights gone" if self.sparsity else ""
        return (
            f"{self.path}{gone}\n"
            f"  accuracy   {self.accuracy:.3f} on {self.num_held_out} held-out rows\n"
            f"  loss       {self.loss_before:.3f} -> {self.loss_after:.3f} in {self.seconds:.0f} s,"
            f" peak memory {self.peak_memory_bytes / 2**30:.2f} GiB\n"
            f"  loads in   {self.loads_in}"
        )


def learn(
    model: str,
    data: str,
    settings: SoloSettings,
    *,
    prompt: str | None,
    out: Path | None,
    force: bool,
    on_step: OnStep,
) -> Learned:
    """Prunes and tunes a model on one machine and saves it.

    Args:
        model: A run, a model directory or a packaged model.
        data: A packaged data set or the user's file; up to 30 % of its rows are held out to judge by.
        settings: How.
        prompt: A decoder's template with `{text}`; the one it was tuned with, or a plain one, when None.
        out: Where the directory goes; `NAME-pruned30` or `NAME-tuned` here when None.
        force: Whether a directory of that name is replaced.
        on_step: Called before each step with its number and how many there are.

    Raises:
        FedSpineError: Model or data are missing, damaged or do not fit together.
    """
    target = model_target(model)
    folder = out or Path(_default_name(target, settings))
    refuse_existing(folder, overwrite=force)
    if prompt is not None and "{text}" not in prompt:
        raise UsageError(f"expected a prompt with {{text}}, found {prompt!r}")
    examples = load_examples(data)
    task = task_for(target, examples, prompt)
    parts = split(examples, held_out=MAX_HELD_OUT, validation=1, seed=settings.seed)
    encoding = encoding_of(target.path, task)
    choices = encoding.choice_tokens() if is_decoder(target.path) else None
    bench = open_workbench(target.path, sha256=None, num_labels=len(task.classes), choices=choices)
    start = time.perf_counter()
    world, tuned = prune_and_tune(
        bench, encoding.encode(parts.train), settings, on_step=lambda step: on_step(step, settings.num_steps)
    )
    seconds = time.perf_counter() - start
    held_out = encoding.encode(parts.held_out)
    accuracy = num_correct(bench, world, held_out) / len(held_out)
    save_pruned(
        folder,
        bench.base,
        bench.layout,
        world,
        mode=settings.mask_mode,
        task={"classes": list(task.classes), "prompt": task.prompt},
    )
    return Learned(
        path=folder,
        accuracy=accuracy,
        num_held_out=len(held_out),
        sparsity=world.sparsity(bench.layout),
        loss_before=tuned.loss_before,
        loss_after=tuned.loss_after,
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(),
        loads_in=loads_in(try_loaders(Target(folder, "directory", None))),
    )


def _default_name(target: Target, settings: SoloSettings) -> str:
    base = base_facts(target.path) or read_prune_file(target.path).get("base", {})
    name = str(base.get("name") or target.name)
    return f"{name}-pruned{100 * settings.pruning_ratio:.0f}" if settings.pruning_ratio else f"{name}-tuned"
