"""`fedspine plan`: what a training step will take of the memory, and, when asked, what it did take.

Comes in: a model and the shape of a step. Goes out: bytes by class, predicted from the config before anything is
loaded; measured beside them by a real step in a process of its own.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from fedspine_edge.base_model import open_base, skeleton, skeleton_layout
from fedspine_edge.batches import Batch
from fedspine_edge.commands.targets import is_decoder, model_target
from fedspine_edge.errors import FedSpineError, UsageError
from fedspine_edge.hardware import available_memory_bytes, peak_memory_bytes, reset_peak_memory
from fedspine_edge.lora import fresh_factors, trainable_parameters
from fedspine_edge.masks import choose, keep_all
from fedspine_edge.memory_plan import ANSWER_TOKENS, MemoryPlan, StepShape, counts_at, other_parameters, plan_step
from fedspine_edge.memory_plan import tensor_bytes as bytes_of_tensors
from fedspine_edge.shrink import slice_factors
from fedspine_edge.tuning import MAX_PART_TOKENS, loss_of
from fedspine_edge.workbench import open_workbench

CLASSES = ("base", "lora", "optimizer", "activations", "workspace", "runtime", "total")
STEPS = 3
_NO_HASH = "0" * 64  # nothing is written, so the weights need not be read for their hash


@dataclass(frozen=True)
class Forecast:
    """Bytes by class: predicted and, when it was asked for, measured."""

    predicted: dict[str, int]
    measured: dict[str, int] | None
    available_bytes: int

    def record(self) -> dict[str, Any]:
        """Returns what `--json` prints."""
        return dataclasses.asdict(self)

    def lines(self) -> str:
        """Returns what a person reads."""
        rows = [f"{'':<12}{'predicted':>12}" + (f"{'measured':>12}" if self.measured else "")]
        for name in CLASSES:
            row = f"{name:<12}{self.predicted[name] / 2**20:>8.1f} MiB"
            rows.append(row + (f"{self.measured[name] / 2**20:>8.1f} MiB" if self.measured else ""))
        return "\n".join([*rows, f"{'available':<12}{self.available_bytes / 2**20:>8.1f} MiB"])


def plan(model: str, shape: StepShape, *, pruning_ratio: float, measure: bool) -> Forecast:
    """Returns the plan of one step.

    Args:
        model: A run, a model directory or a packaged model.
        shape: The step's batch, tokens and rank.
        pruning_ratio: Share of the heads and FFN channels that are gone, in [0, 0.9].
        measure: Whether a real step is run too, in a process of its own.

    Raises:
        FedSpineError: There is no such model, or the measured step failed.
    """
    if not 0 <= pruning_ratio <= 0.9:
        raise UsageError(f"expected a pruning ratio in [0, 0.9], found {pruning_ratio}")
    path = model_target(model).path
    foreseen = forecast(path, shape, pruning_ratio)
    runtime = psutil.Process().memory_info().rss
    predicted = {**dataclasses.asdict(foreseen), "runtime": runtime, "total": foreseen.total + runtime}
    return Forecast(
        predicted=predicted,
        measured=_in_own_process(path, shape, pruning_ratio) if measure else None,
        available_bytes=available_memory_bytes(),
    )


def forecast(path: Path, shape: StepShape, pruning_ratio: float) -> MemoryPlan:
    """Returns the plan of a step on a model directory, of which no weight is read."""
    base = open_base(path, sha256=_NO_HASH)
    empty = skeleton(base, num_labels=None if is_decoder(path) else base.config.num_labels)
    layout = skeleton_layout(base, empty)
    kept = counts_at(layout, pruning_ratio)
    return plan_step(base.config, layout, kept, shape, other_parameters=other_parameters(empty, layout))


def _in_own_process(path: Path, shape: StepShape, pruning_ratio: float) -> dict[str, int]:
    request = json.dumps([str(path), dataclasses.asdict(shape), pruning_ratio, torch.get_num_threads()])
    done = subprocess.run([sys.executable, "-m", __name__, request], capture_output=True, text=True, check=False)
    if done.returncode:
        raise FedSpineError(f"the measured step ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measured_step(path: Path, shape: StepShape, pruning_ratio: float) -> dict[str, int]:
    """Returns what some real steps took in this process, by class.

    Base, LoRA and optimiser are the sizes of their tensors; activations are what the C allocator gave out in a forward
    and had not got back; the workspace is the rest of the peak.
    """
    runtime = psutil.Process().memory_info().rss
    decoder, num_labels = is_decoder(path), open_base(path, sha256=_NO_HASH).config.num_labels
    bench = open_workbench(path, sha256=_NO_HASH, num_labels=num_labels, choices=[0] if decoder else None)
    bench = dataclasses.replace(bench, base_dtype=shape.base_dtype)
    layout = bench.layout
    scores = {g.name: np.arange(g.num_members, dtype=np.float32) for g in layout.groups}
    keep = choose(layout, scores, pruning_ratio=pruning_ratio, mode="uniform")
    generator = torch.Generator().manual_seed(0)
    factors = {m.name: fresh_factors(m.out_features, m.in_features, shape.rank, generator) for m in layout.matrices}
    narrow = slice_factors(layout, factors, keep_all(layout), keep)
    del factors
    model = bench.fit(keep, narrow, scaling=2.0, mean_inputs={}).model
    parameters = trainable_parameters(model)
    trained = sum(parameter.nbytes for parameter in parameters)
    base = bytes_of_tensors(model) - trained
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    reset_peak_memory()
    for _ in range(STEPS):
        activations = 0  # of the last step: the first one fills caches too
        optimizer.zero_grad(set_to_none=True)
        for part in _batch(shape, decoder=decoder).parts(MAX_PART_TOKENS):
            before = held_bytes()
            loss = loss_of(model, part)
            activations = max(activations, held_bytes() - before)
            torch.autograd.backward(loss)
        optimizer.step()
    gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
    moments = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    parts = {"base": base, "lora": trained + gradients, "optimizer": moments, "activations": activations}
    peak = peak_memory_bytes()
    return {**parts, "workspace": peak - runtime - sum(parts.values()), "runtime": runtime, "total": peak}


def _batch(shape: StepShape, *, decoder: bool) -> Batch:
    """A batch of full rows; a decoder learns the last tokens of each."""
    rows, none = shape.batch_size, torch.zeros(0, dtype=torch.int64)
    num_answers = min(ANSWER_TOKENS, shape.tokens)
    columns = torch.arange(shape.tokens - num_answers, shape.tokens).repeat(rows)
    return Batch(
        input_ids=torch.ones(rows, shape.tokens, dtype=torch.int64),
        valid=torch.ones(rows, shape.tokens, dtype=torch.bool),
        labels=torch.zeros(rows, dtype=torch.int64),
        answer_rows=torch.arange(rows).repeat_interleave(num_answers) if decoder else none,
        answer_columns=columns if decoder else none,
        answer_ids=torch.ones(rows * num_answers, dtype=torch.int64) if decoder else none,
    )


def held_bytes() -> int:
    """Returns what the C allocator has given out and not got back (glibc's mallinfo2)."""
    counts = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")

    class Mallinfo2(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in counts]

    function = ctypes.CDLL(None).mallinfo2
    function.restype = Mallinfo2
    found = function()
    return int(found.uordblks + found.hblkhd)


if __name__ == "__main__":
    where, sizes, ratio, threads = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    print(json.dumps(measured_step(Path(where), StepShape(**sizes), ratio)))  # noqa: T201
