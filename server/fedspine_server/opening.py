"""The opening round: every device sums its features once, and the task head is solved instead of learnt from nothing.

Comes in: the state before the first round, later the devices' sums. Goes out: what each device is asked, whether an
answer can be used, and the task head. A head of random weights tells the factors nothing for the first rounds; a linear
discriminant on the base model's own features costs each device a few forward passes, and tuning begins with it.

Source: closed-form heads of federated learning, FedNCM (Legate et al., NeurIPS 2023) and Fed3R (Fani et al., ICML
2024); a linear discriminant instead of ridge regression, because its outputs are logarithms of probabilities, is ours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from fedspine_edge.protocol import MAX_HEAD_EXAMPLES, Assignment, HeadLinear, Layout, Update, head_linear
from fedspine_server.aggregation.averages import trimmed_mean, weighted_mean
from fedspine_server.controllers.contract import Choice
from fedspine_server.reward import Outcome
from fedspine_server.settings import RunSettings
from fedspine_server.state import DeviceState

SHRINKAGE = 0.1  # of the covariance to a multiple of the identity
# Few examples against many dimensions make a discriminant too sure of itself: half its logits had the lower loss on
# TREC-6 and R8 (MiniLM, 40 devices: 1.13 and 1.00; .25 and .17).
SURENESS = 0.5
SMALLEST_PRIOR = 1e-4
FORWARD_SHARE = 0.56  # of a step's time, from a profile of MiniLM on our kernels: 47 % forward, 37 % backward
TOLERANCE = 0.01  # half precision
REASON = "opening: sums its features once, so that the task head begins with a closed form"
COUNTS, SUMS, PRODUCTS = (f"head_statistics/{name}" for name in ("counts", "sums", "products"))


def is_opening(settings: RunSettings, layout: Layout, round_index: int) -> bool:
    """Returns whether a round is the opening: the first, where a task head is to be solved and there is one."""
    return settings.head_start == "closed-form" and round_index == 0 and head_linear(layout) is not None


def opening_choices(settings: RunSettings, devices: Sequence[DeviceState]) -> dict[str, Choice]:
    """Returns what the devices are asked: all that are there, for it costs them little.

    A device's steps are the batches it will sum: those of its examples, at most `MAX_HEAD_EXAMPLES` of them.
    """
    used = {device.device_id: min(device.num_examples, MAX_HEAD_EXAMPLES) for device in devices}
    steps = {name: math.ceil(used[name] / settings.batch_size) for name in sorted(used)}
    return {name: Choice(name, 0.0, settings.ranks[0], steps[name], REASON) for name in steps}


def as_opening(assignment: Assignment, task_head: Mapping[str, np.ndarray]) -> Assignment:
    """Returns a device's assignment as one to sum: the task head is all it needs, and its sums are of float16."""
    arrays = {f"task_head/{name}": value for name, value in task_head.items()}
    return dataclasses.replace(assignment, tensors=arrays, work="head-statistics", update_dtype="float16")


def as_timings(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Returns what the opening's forward passes say of the devices' steps; of worth they say nothing."""
    return [
        dataclasses.replace(
            outcome,
            merged=False,
            compute_seconds=None if outcome.compute_seconds is None else outcome.compute_seconds / FORWARD_SHARE,
        )
        for outcome in outcomes
    ]


def unusable(update: Update, layout: Layout) -> str | None:
    """Returns why a device's sums cannot be used, None when they can."""
    head = _head(layout)
    expected = {
        COUNTS: (np.dtype(np.int32), (head.num_classes,)),
        SUMS: (np.dtype(np.float16), (head.num_classes, head.width)),
        PRODUCTS: (np.dtype(np.float16), (head.width * (head.width + 1) // 2,)),
    }
    if set(update.tensors) != set(expected):
        return f"expected the arrays {', '.join(sorted(expected))}, found {', '.join(sorted(update.tensors)) or 'none'}"
    for name, (dtype, shape) in expected.items():
        array = update.tensors[name]
        if array.dtype != dtype or array.shape != shape:
            return f"expected {name} {dtype} {list(shape)}, found {array.dtype} {list(array.shape)}"
        if not np.isfinite(array).all():
            return f"expected finite values in {name}, found NaN or Inf"
    counts = update.tensors[COUNTS].astype(np.int64)
    if (counts < 0).any() or not 1 <= counts.sum() <= update.report.num_examples:
        return f"expected counts of 1 to {update.report.num_examples} examples, found {counts.tolist()}"
    energy = float(update.tensors[PRODUCTS][_diagonal(head.width)].astype(np.float64).sum())
    norms = np.square(update.tensors[SUMS].astype(np.float64)).sum(axis=1)
    if (norms > (1 + TOLERANCE) * counts / counts.sum() * energy).any():  # Jensen: no mean is longer than its vectors
        return f"expected sums of the inputs whose products have the trace {energy:.3g}, found longer ones"
    return None


def opened_head(
    layout: Layout, task_head: Mapping[str, np.ndarray], updates: Sequence[Update], trim_share: float | None
) -> dict[str, np.ndarray]:
    """Returns the task head solved from what the devices summed.

    Args:
        layout: The base model's layout.
        task_head: Its parameters, float32.
        updates: What came back, at least one.
        trim_share: None for the sums of all examples, else the devices' trimmed mean (`averages.trimmed_mean`).
    """
    used = [float(update.tensors[COUNTS].sum()) for update in updates]

    def pooled(name: str) -> np.ndarray:
        values = [update.tensors[name].astype(np.float64) for update in updates]
        if name == COUNTS:
            values = [value / count for value, count in zip(values, used, strict=True)]
        return weighted_mean(values, used) if trim_share is None else trimmed_mean(np.stack(values), trim_share)

    return solved_head(layout, task_head, *(pooled(name) for name in (COUNTS, SUMS, PRODUCTS)))


def _head(layout: Layout) -> HeadLinear:
    head = head_linear(layout)
    assert head is not None, "is_opening says that there is one"
    return head


def _diagonal(width: int) -> np.ndarray:
    """Places of the diagonal in a lower triangle."""
    rows = np.arange(width)
    return np.asarray(rows * (rows + 3) // 2)


def solved_head(
    layout: Layout, task_head: Mapping[str, np.ndarray], counts: np.ndarray, sums: np.ndarray, products: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns the task head with its last linear layer solved; the rest stays.

    Args:
        layout: The base model's layout.
        task_head: Its parameters, float32.
        counts: Share of each class, [C].
        sums: Sum of each class's inputs over the number of examples, [C, d].
        products: Mean outer product of the inputs, lower triangle, [d (d + 1) / 2].
    """
    head = _head(layout)
    name, width = head.name, head.width
    shares = counts / counts.sum()
    means = np.where(shares[:, None] > 0, sums / np.where(shares, shares, 1.0)[:, None], 0.0)
    second = np.zeros((width, width))
    second[np.tril_indices(width)] = products
    second = second + np.tril(second, -1).T
    within = second - (means * shares[:, None]).T @ means
    energy = max(float(np.trace(within)) / width, float(np.finfo(np.float32).tiny))
    within = (1 - SHRINKAGE) * within + SHRINKAGE * energy * np.eye(width)
    values, vectors = np.linalg.eigh(within)
    floor = SHRINKAGE * energy  # what rounding to half precision and liars leave below it is no covariance
    weight = (means @ vectors / np.maximum(values, floor)) @ vectors.T
    bias = np.log(np.maximum(shares, SMALLEST_PRIOR)) - 0.5 * (weight * means).sum(axis=1)
    solved = {f"{name}.weight": weight - weight.mean(axis=0), f"{name}.bias": bias - bias.mean()}
    return {
        parameter: (SURENESS * solved[parameter]).astype(np.float32) if parameter in solved else value
        for parameter, value in task_head.items()
    }
