"""Whether an update may become part of the global adapter: everything a wrong or lying device could get wrong.

Comes in: an update, the assignment it answers, the layout, and what the device registered. Goes out: the first reason
to refuse it, or None. Nothing of the update is used before this has passed.

Source: docs/algorithm.md, section 8 (rejections); arXiv 2501.02438 states no protection.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from fedspine_edge.protocol import Assignment, Group, Layout, Update
from fedspine_server.aggregation.hetlora import product_norm
from fedspine_server.assignments import kept_features, kept_members
from fedspine_server.opening import unusable

RATIO_TOLERANCE = 1e-6


def refusal(
    update: Update, assignment: Assignment, layout: Layout, *, num_examples: int, max_update_norm: float
) -> str | None:
    """Returns why an update is refused, None when it is fit to be merged.

    Args:
        update: What the device returned.
        assignment: What it was asked.
        layout: The base model's layout.
        num_examples: What the device registered; its weight.
        max_update_norm: Largest Frobenius norm of scaling * B @ A, and of a task-head parameter.
    """
    wrong = _wrong_identity(update, assignment) or _wrong_report(update, assignment, num_examples)
    if wrong or assignment.work == "head-statistics":
        return wrong or unusable(update, layout)
    return (
        _wrong_masks(update, assignment, layout)
        or _wrong_arrays(update, layout)
        or _wrong_values(update, assignment, layout, max_update_norm)
    )


def _wrong_identity(update: Update, assignment: Assignment) -> str | None:
    for name in ("run_id", "device_id", "round_index", "base_sha256", "rank"):
        expected, found = getattr(assignment, name), getattr(update, name)
        if type(found) is not type(expected) or found != expected:
            return f"expected {name} {expected}, found {found}"
    return None


def _wrong_report(update: Update, assignment: Assignment, num_examples: int) -> str | None:
    report = update.report
    if report.num_examples != num_examples:
        return f"expected num_examples {num_examples} as registered, found {report.num_examples}"
    if not 1 <= report.num_steps <= assignment.num_steps:
        return f"expected num_steps in 1..{assignment.num_steps}, found {report.num_steps}"
    for name in ("loss_before", "loss_after", "compute_seconds"):
        value = getattr(report, name)
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            return f"expected a finite {name} of at least 0, found {value}"
    return None


def _wrong_masks(update: Update, assignment: Assignment, layout: Layout) -> str | None:
    ratio = update.pruning_ratio
    if not isinstance(ratio, (int, float)) or not 0 <= ratio <= assignment.pruning_ratio + RATIO_TOLERANCE:
        return f"expected pruning_ratio in 0..{assignment.pruning_ratio:.4f}, found {ratio}"
    for group in layout.groups:
        reason = _wrong_members(group, update.tensors, assignment.tensors[f"keep/{group.name}"])
        if reason is not None:
            return reason
    if assignment.mask_mode == "uniform":
        buckets = [[group] for group in layout.groups]
    else:
        kinds = sorted({group.kind for group in layout.groups})
        buckets = [[group for group in layout.groups if group.kind == kind] for kind in kinds]
    for groups in buckets:
        reason = _wrong_count(groups, update, assignment)
        if reason is not None:
            return reason
    return None


def _wrong_members(group: Group, tensors: Mapping[str, np.ndarray], allowed: np.ndarray) -> str | None:
    name = f"keep/{group.name}"
    kept = tensors.get(name)
    if kept is None:
        return f"expected an array {name}, found none"
    if kept.dtype != np.int32 or kept.ndim != 1:
        return f"expected {name} int32 in one dimension, found {kept.dtype} {list(kept.shape)}"
    if len(kept) < 1:
        return f"expected at least one member in {name}, found none"
    if (np.diff(kept.astype(np.int64)) <= 0).any():
        return f"expected {name} sorted and unique"
    if not np.isin(kept, allowed).all():
        return f"expected {name} within the assigned candidates, found others"
    return None


def _wrong_count(groups: list[Group], update: Update, assignment: Assignment) -> str | None:
    """Kept counts are whole blocks; together they are within a block a group of the ratio, or all there is."""
    kept = sum(len(update.tensors[f"keep/{group.name}"]) for group in groups)
    offered = sum(len(assignment.tensors[f"keep/{group.name}"]) for group in groups)
    expected = (1 - update.pruning_ratio) * sum(group.num_members for group in groups)
    slack = sum(group.block for group in groups)
    if abs(kept - expected) >= slack + RATIO_TOLERANCE and not kept == offered < expected:
        where = groups[0].name if len(groups) == 1 else f"{len(groups)} {groups[0].kind} groups"
        return f"expected about {expected:.0f} members in {where} at ratio {update.pruning_ratio:.3f}, found {kept}"
    return None


def _wrong_arrays(update: Update, layout: Layout) -> str | None:
    expected = _expected_arrays(update, layout)
    optional = ("importance/", "mean_input/", "keep/")
    missing = [name for name in expected if name not in update.tensors and not name.startswith(optional)]
    if missing:
        return f"expected an array {missing[0]}, found none"
    for name, array in update.tensors.items():
        if name.startswith("keep/") and name[len("keep/") :] in {group.name for group in layout.groups}:
            continue
        if name not in expected:
            return f"expected no array {name}"
        dtype, shape = expected[name]
        if array.dtype != dtype or array.shape != shape:
            return f"expected {name} {dtype} {list(shape)}, found {array.dtype} {list(array.shape)}"
    return None


def _expected_arrays(update: Update, layout: Layout) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    half, single = np.dtype(np.float16), np.dtype(np.float32)
    members = kept_members(update, layout)
    expected: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    for matrix in layout.matrices:
        rows, columns = kept_features(layout, matrix, members)
        num_in = matrix.in_features if columns is None else len(columns)
        num_out = matrix.out_features if rows is None else len(rows)
        expected[f"lora_a/{matrix.name}"] = (half, (update.rank, num_in))
        expected[f"lora_b/{matrix.name}"] = (half, (num_out, update.rank))
        if matrix.in_group is not None:
            expected[f"mean_input/{matrix.name}"] = (half, (matrix.in_features,))
    for group in layout.groups:
        expected[f"importance/{group.name}"] = (half, (group.num_members,))
    return expected | {f"task_head/{name}": (single, tuple(shape)) for name, shape in layout.task_head}


def _wrong_values(update: Update, assignment: Assignment, layout: Layout, max_norm: float) -> str | None:
    for name, array in sorted(update.tensors.items()):
        measured = name.startswith(("importance/", "mean_input/"))  # NaN means "not measured" there
        fit = ~np.isinf(array) if measured else np.isfinite(array)
        if not fit.all():
            return f"expected finite values in {name}, found NaN or Inf"
        if name.startswith("importance/") and (array < 0).any():
            return f"expected importances of at least 0 in {name}, found {float(np.nanmin(array)):.3g}"
        if name.startswith("task_head/"):
            norm = float(np.linalg.norm(array.astype(np.float64)))
            if norm > max_norm:
                return f"expected {name} of norm up to {max_norm:g}, found {norm:.3g}"
    for matrix in layout.matrices:
        lora_a = update.tensors[f"lora_a/{matrix.name}"].astype(np.float64)
        lora_b = update.tensors[f"lora_b/{matrix.name}"].astype(np.float64)
        norm = assignment.scaling * product_norm(lora_b, lora_a)
        if norm > max_norm:
            return f"expected an update of {matrix.name} of norm up to {max_norm:g}, found {norm:.3g}"
    return None
