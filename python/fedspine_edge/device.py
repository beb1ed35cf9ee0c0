"""One round on a device: assignment -> update. Knows nothing of how either travels.

Comes in: an assignment, the device's own examples and what it remembers. Goes out: an update, and what to remember.

Source: FedSpine (arXiv 2501.02438), the workflow of a round on the device.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from fedspine_edge.batches import TokenSet, training_batches
from fedspine_edge.hardware import available_memory_bytes, peak_memory_bytes, reset_peak_memory
from fedspine_edge.head_statistics import head_statistics
from fedspine_edge.importance import ImportanceMeter
from fedspine_edge.masks import Keep, blend, choose, kept_counts
from fedspine_edge.memory_plan import StepShape, check_memory
from fedspine_edge.protocol import Assignment, DeviceReport, Layout, Update
from fedspine_edge.quantized import Pair, as_float16, packed
from fedspine_edge.tuning import tune
from fedspine_edge.update import arrays, assigned_factors, check_base, load_task_head, to_update
from fedspine_edge.workbench import Workbench

FROZEN_AGREEMENT = 1.0


@dataclass(frozen=True)
class DeviceState:
    """What a device remembers from one round to the next.

    Attributes:
        pruning_ratio: The ratio it was pruned to when its last round ended.
        importance: Group name -> the importance it measured itself, [num_members], NaN where never.
        residuals: Matrix name -> what rounding took from its last update (`quantized`); empty for float16.
    """

    pruning_ratio: float = 0.0
    importance: Mapping[str, np.ndarray] = field(default_factory=dict)
    residuals: Mapping[str, Pair] = field(default_factory=dict)


def run_round(
    bench: Workbench,
    assignment: Assignment,
    examples: TokenSet,
    state: DeviceState,
    *,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[Update, DeviceState]:
    """Does one round.

    Args:
        bench: The base model, opened.
        assignment: What the server asks.
        examples: The device's own examples, at least one.
        state: What the device remembers.
        on_step: Called after each step with how many are done and its loss; may wait, or end the round by an exception.

    Raises:
        IncompatibleError: The assignment is for another base model, or its arrays are not of its layout.
        MemoryLimitError: A step at the ratio it begins with does not fit.
        TuningError: The loss is not finite.
    """
    if assignment.work == "head-statistics":
        return _sum_for_head(bench, assignment, examples), state
    reset_peak_memory()
    start = time.perf_counter()
    assignment = as_float16(assignment, assignment.update_dtype, bench.layout)
    pruner = _Pruner(assignment, bench.layout, state)
    keep = pruner.mask(0)
    longest = max(map(len, examples.rows))
    shape = StepShape(assignment.batch_size, longest, assignment.rank, assignment.base_dtype)
    check_memory(bench.model, bench.layout, kept_counts(keep), shape, available_bytes=available_memory_bytes())
    mean_inputs = arrays(assignment.tensors, "mean_input")
    factors = assigned_factors(assignment, bench.layout, keep)
    fit = dataclasses.replace(bench, base_dtype=assignment.base_dtype).fit
    shrunk = fit(keep, factors, scaling=assignment.scaling, mean_inputs=mean_inputs)
    load_task_head(bench.model, assignment)
    batches = training_batches(
        examples, batch_size=assignment.batch_size, num_batches=assignment.num_steps, seed=assignment.seed
    )
    tuned = tune(
        shrunk,
        batches,
        learning_rate=assignment.learning_rate,
        prune_interval=assignment.prune_interval,
        narrower=lambda done, meter: pruner.narrower(done + 1, meter, shrunk.keep),
        measure=assignment.mask_agreement < FROZEN_AGREEMENT,
        importance=assignment.importance,
        dropout=assignment.lora_dropout,
        seed=assignment.seed,
        on_step=on_step,
        enough=_budget(assignment, time.perf_counter),
    )
    report = DeviceReport(
        num_examples=len(examples),
        num_steps=tuned.num_steps,
        loss_before=tuned.loss_before,
        loss_after=tuned.loss_after,
        compute_seconds=time.perf_counter() - start,
        peak_memory_bytes=peak_memory_bytes(),
    )
    update = to_update(assignment, shrunk, tuned, pruning_ratio=pruner.ratio, report=report)
    remembered = pruner.remembered(tuned.importance, shrunk.keep)
    if assignment.update_dtype == "float16":
        return update, remembered
    tensors, residuals = packed(update.tensors, bench.layout, assignment.update_dtype, state.residuals)
    return dataclasses.replace(update, tensors=tensors), dataclasses.replace(remembered, residuals=residuals)


def _sum_for_head(bench: Workbench, assignment: Assignment, examples: TokenSet) -> Update:
    reset_peak_memory()
    start = time.perf_counter()
    check_base(assignment, bench.layout)
    bench = dataclasses.replace(bench, base_dtype=assignment.base_dtype)
    tensors, loss, num_batches = head_statistics(bench, assignment, examples)
    return Update(
        run_id=assignment.run_id,
        device_id=assignment.device_id,
        round_index=assignment.round_index,
        base_sha256=assignment.base_sha256,
        pruning_ratio=0.0,
        rank=assignment.rank,
        report=DeviceReport(
            num_examples=len(examples),
            num_steps=num_batches,
            loss_before=loss,
            loss_after=loss,
            compute_seconds=time.perf_counter() - start,
            peak_memory_bytes=peak_memory_bytes(),
        ),
        tensors=tensors,
    )


def _budget(assignment: Assignment, clock: Callable[[], float]) -> Callable[[int], bool]:
    """Returns whether, after so many steps, another would pass the assignment's budget; its time starts now."""
    start, budget = clock(), assignment.budget_seconds

    def enough(steps: int) -> bool:
        if budget is None or steps < assignment.min_steps:
            return False
        return (clock() - start) * (steps + 1) / steps > budget

    return enough


class _Pruner:
    """Which members stay after each pruning of a round, on the way from the last round's ratio to this one's."""

    def __init__(self, assignment: Assignment, layout: Layout, state: DeviceState) -> None:
        self._assignment = assignment
        self._layout = layout
        self._state = state
        self._server = arrays(assignment.tensors, "importance")
        self._candidates = arrays(assignment.tensors, "keep")
        self.ratio = 0.0  # of the last mask
        # A device that stops by its own clock has pruned everything by the steps it does all the same.
        certain = assignment.num_steps if assignment.budget_seconds is None else assignment.min_steps
        self._num_prunings = max(1, -(-certain // assignment.prune_interval))

    def mask(self, index: int, measured: Mapping[str, np.ndarray] | None = None, current: Keep | None = None) -> Keep:
        """Returns what stays after pruning number `index`, of what is there now or else of the candidates."""
        first, last = min(self._state.pruning_ratio, self._assignment.pruning_ratio), self._assignment.pruning_ratio
        ratio = first + (last - first) * min(1.0, (index + 1) / self._num_prunings)
        self.ratio = ratio
        own = self._own(measured or {}, current or {})
        scores = {
            group.name: blend(self._server[group.name], own.get(group.name), self._assignment.mask_agreement)
            for group in self._layout.groups
        }
        return choose(
            self._layout,
            scores,
            pruning_ratio=ratio,
            mode=self._assignment.mask_mode,
            candidates=current or self._candidates,
        )

    def narrower(self, index: int, meter: ImportanceMeter, current: Keep) -> Keep | None:
        """Returns what stays after pruning number `index`; None when nothing more has to go."""
        keep = self.mask(index, meter.scores, current)
        return None if kept_counts(keep) == kept_counts(current) else keep

    def _own(self, measured: Mapping[str, np.ndarray], keep: Keep) -> dict[str, np.ndarray]:
        """The device's own importance: what it just measured, where it did; else what it remembers."""
        own = {name: np.asarray(scores, dtype=np.float32) for name, scores in self._state.importance.items()}
        for name, scores in measured.items():
            fresh = own.get(name, np.full(self._layout.group(name).num_members, np.nan, dtype=np.float32)).copy()
            fresh[keep[name]] = scores
            own[name] = fresh
        return own

    def remembered(self, measured: Mapping[str, np.ndarray], keep: Keep) -> DeviceState:
        """Returns what the device remembers of this round."""
        return DeviceState(self.ratio, self._own(measured, keep))
