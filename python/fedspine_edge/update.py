"""Model state <-> the arrays of the protocol.

Comes in: an assignment's arrays, or a tuned model. Goes out: LoRA factors at the kept rows and columns, or an `Update`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fedspine_edge.errors import IncompatibleError
from fedspine_edge.masks import Keep
from fedspine_edge.protocol import Assignment, DeviceReport, Layout, Update
from fedspine_edge.shrink import Factors, slice_factors
from fedspine_edge.tuning import ShrunkModel, Tuned


def arrays(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Returns the arrays whose name starts with `prefix/`, without it."""
    start = prefix + "/"
    return {name[len(start) :]: array for name, array in tensors.items() if name.startswith(start)}


def assigned_factors(assignment: Assignment, layout: Layout, keep: Keep) -> Factors:
    """Returns the assigned LoRA factors at the rows and columns of `keep`, float32.

    Args:
        assignment: Its factors are at the rows and columns of its candidates.
        layout: The unpruned model's layout.
        keep: A subset of the candidates.

    Raises:
        IncompatibleError: The assignment is for another base or lacks arrays.
    """
    check_base(assignment, layout)
    lora_a, lora_b = arrays(assignment.tensors, "lora_a"), arrays(assignment.tensors, "lora_b")
    try:
        whole = {
            matrix.name: (
                torch.from_numpy(lora_a[matrix.name].astype(np.float32)),
                torch.from_numpy(lora_b[matrix.name].astype(np.float32)),
            )
            for matrix in layout.matrices
        }
    except KeyError as error:
        raise IncompatibleError(f"assignment lacks the factors of {error}") from error
    return slice_factors(layout, whole, arrays(assignment.tensors, "keep"), keep)


def check_base(assignment: Assignment, layout: Layout) -> None:
    """Raises IncompatibleError for an assignment that is for another base model."""
    if assignment.base_sha256 != layout.base_sha256:
        raise IncompatibleError(
            f"assignment is for base {assignment.base_sha256[:12]}, this device has {layout.base_sha256[:12]}",
            hint="give server and device the same base model",
        )


def load_task_head(model: Any, assignment: Assignment) -> None:
    """Puts the assigned values into the densely trained parameters."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in arrays(assignment.tensors, "task_head").items():
            parameters[name].copy_(torch.from_numpy(value))


def to_update(
    assignment: Assignment, shrunk: ShrunkModel, tuned: Tuned, *, pruning_ratio: float, report: DeviceReport
) -> Update:
    """Returns what the device sends back."""
    layout, keep = shrunk.layout, shrunk.keep
    tensors: dict[str, np.ndarray] = {}
    for name, (lora_a, lora_b) in shrunk.factors().items():
        tensors[f"lora_a/{name}"] = lora_a.numpy().astype(np.float16)
        tensors[f"lora_b/{name}"] = lora_b.numpy().astype(np.float16)
    for group in layout.groups:
        tensors[f"keep/{group.name}"] = keep[group.name].astype(np.int32)
        tensors[f"importance/{group.name}"] = scattered(
            tuned.importance.get(group.name), keep[group.name], group.num_members
        )
    for name, mean in tuned.mean_inputs.items():
        tensors[f"mean_input/{name}"] = mean
    parameters = dict(shrunk.model.named_parameters())
    for name, _ in layout.task_head:
        tensors[f"task_head/{name}"] = parameters[name].detach().numpy().copy()
    return Update(
        run_id=assignment.run_id,
        device_id=assignment.device_id,
        round_index=assignment.round_index,
        base_sha256=assignment.base_sha256,
        pruning_ratio=pruning_ratio,
        rank=assignment.rank,
        report=report,
        tensors=tensors,
    )


def scattered(scores: np.ndarray | None, members: np.ndarray, num_members: int) -> np.ndarray:
    """Returns scores in the original numbering, float16 [num_members], NaN where there is none."""
    whole = np.full(num_members, np.nan, dtype=np.float16)
    if scores is not None:
        whole[members] = scores
    return whole
