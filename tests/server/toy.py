"""A task for a fleet without a neural network: fit low-rank targets by gradient descent on LoRA factors, in numpy.

Two layers of one head group and one FFN group each. Device i wants each matrix to be a low-rank target shared by all
plus its own deviation; its loss is the squared distance on what it keeps, relative to where it started, plus a price
for what it pruned. Members differ in importance, so masks matter.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fedspine_edge.protocol import Assignment, DeviceReport, Group, Layout, Matrix, Update, expand_members
from fedspine_edge.quantized import packed
from fedspine_server.state import RunState

HIDDEN, HEADS, FFN = 12, 4, 16
LEARNING_RATE = 0.02


def layout() -> Layout:
    groups, matrices = [], []
    for layer in range(2):
        heads, ffn = f"layers.{layer}.heads", f"layers.{layer}.ffn"
        groups += [Group(heads, "heads", HEADS, 1, 4 * 3 * HIDDEN), Group(ffn, "ffn", FFN, 2, 2 * HIDDEN)]
        matrices += [
            Matrix(f"layers.{layer}.q", HIDDEN, HIDDEN, heads, None),
            Matrix(f"layers.{layer}.o", HIDDEN, HIDDEN, None, heads),
            Matrix(f"layers.{layer}.up", FFN, HIDDEN, ffn, None),
            Matrix(f"layers.{layer}.down", HIDDEN, FFN, None, ffn),
        ]
    return Layout("ba5e", tuple(groups), tuple(matrices), (("classifier.bias", (3,)),))


def task_head() -> dict[str, np.ndarray]:
    return {"classifier.bias": np.zeros(3, dtype=np.float32)}


def target(matrix: Matrix, device_id: str = "") -> np.ndarray:
    """The product a device wants; with no device the one all share."""
    shared = np.random.default_rng(zlib.crc32(matrix.name.encode()))
    wanted = shared.standard_normal((matrix.out_features, 3)) @ shared.standard_normal((3, matrix.in_features)) / 3
    wanted *= np.linspace(1.5, 0.2, matrix.out_features)[:, None]
    if device_id:
        own = np.random.default_rng(zlib.crc32(f"{device_id}/{matrix.name}".encode()))
        wanted = wanted + 0.1 * own.standard_normal(wanted.shape)
    return wanted


def keep_of(assignment: Assignment, model: Layout) -> dict[str, np.ndarray]:
    """The candidates the server ranks highest, whole blocks rounded down; early members where it has no opinion."""
    keep = {}
    for group in model.groups:
        allowed = assignment.tensors[f"keep/{group.name}"]
        scores = np.nan_to_num(assignment.tensors[f"importance/{group.name}"].astype(np.float64))[allowed]
        count = max(
            group.block, int(group.num_members * (1 - assignment.pruning_ratio) / group.block + 1e-6) * group.block
        )
        keep[group.name] = np.sort(allowed[np.argsort(-scores, kind="stable")[:count]]).astype(np.int32)
    return keep


def tune_one(model: Layout, assignment: Assignment, num_examples: int) -> Update:
    keep = keep_of(assignment, model)
    tensors: dict[str, np.ndarray] = {f"keep/{name}": members for name, members in keep.items()}
    importance = {group.name: np.full(group.num_members, np.nan) for group in model.groups}
    before = after = 0.0
    for matrix in model.matrices:
        rows, here_rows = _side(model, matrix.out_group, matrix.out_features, assignment, keep)
        columns, here_columns = _side(model, matrix.in_group, matrix.in_features, assignment, keep)
        lora_a = assignment.tensors[f"lora_a/{matrix.name}"].astype(np.float64)[:, here_columns]
        lora_b = assignment.tensors[f"lora_b/{matrix.name}"].astype(np.float64)[here_rows]
        whole = target(matrix, assignment.device_id)
        wanted = whole[np.ix_(rows, columns)]
        pruned = float(np.sum(whole**2) - np.sum(wanted**2))
        before += pruned + float(np.sum((assignment.scaling * lora_b @ lora_a - wanted) ** 2))
        for _ in range(assignment.num_steps):
            error = assignment.scaling * lora_b @ lora_a - wanted
            lora_b, lora_a = lora_b - LEARNING_RATE * error @ lora_a.T, lora_a - LEARNING_RATE * lora_b.T @ error
        after += pruned + float(np.sum((assignment.scaling * lora_b @ lora_a - wanted) ** 2))
        tensors[f"lora_a/{matrix.name}"] = lora_a.astype(np.float16)
        tensors[f"lora_b/{matrix.name}"] = lora_b.astype(np.float16)
        if matrix.out_group is not None:
            energy = np.sum(wanted**2, axis=1).reshape(len(keep[matrix.out_group]), -1).sum(axis=1)
            importance[matrix.out_group][keep[matrix.out_group]] = energy / np.linalg.norm(energy)
        else:
            mean = np.full(matrix.in_features, np.nan)
            mean[columns] = 0.5
            tensors[f"mean_input/{matrix.name}"] = mean.astype(np.float16)
    tensors |= {f"importance/{name}": values.astype(np.float16) for name, values in importance.items()}
    tensors["task_head/classifier.bias"] = assignment.tensors["task_head/classifier.bias"] + np.float32(0.01)
    if assignment.update_dtype != "float16":
        tensors, _ = packed(tensors, model, assignment.update_dtype, {})
    return answer(assignment, tensors, num_examples=num_examples, losses=(before, after))


def answer(
    assignment: Assignment,
    tensors: dict[str, np.ndarray],
    *,
    num_examples: int = 10,
    losses: tuple[float, float] = (1.0, 0.5),
) -> Update:
    """What a device returns that did exactly as it was asked."""
    return Update(
        run_id=assignment.run_id,
        device_id=assignment.device_id,
        round_index=assignment.round_index,
        base_sha256=assignment.base_sha256,
        pruning_ratio=assignment.pruning_ratio,
        rank=assignment.rank,
        report=DeviceReport(num_examples, assignment.num_steps, *losses, 0.5, 1 << 20),
        tensors=tensors,
    )


def tuner(
    num_examples: dict[str, int], *, backwards: bool = False
) -> Callable[[Sequence[Assignment]], Iterator[Update]]:
    model = layout()

    def tune(assignments: Sequence[Assignment]) -> Iterator[Update]:
        for assignment in reversed(assignments) if backwards else assignments:
            yield tune_one(model, assignment, num_examples[assignment.device_id])

    return tune


def global_loss(state: RunState) -> float:
    """Squared distance of the global product to the shared target, relative to the zero adapter's."""
    distance = energy = 0.0
    for matrix in state.layout.matrices:
        factors, wanted = state.adapter[matrix.name], target(matrix)
        distance += float(np.sum((state.settings.scaling * factors.lora_b @ factors.lora_a - wanted) ** 2))
        energy += float(np.sum(wanted**2))
    return distance / energy


def _side(
    model: Layout, group_name: str | None, features: int, assignment: Assignment, keep: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Feature indices in the unpruned matrix, and in the assigned factors."""
    if group_name is None:
        everything = np.arange(features)
        return everything, everything
    num_members = model.group(group_name).num_members
    offered = expand_members(assignment.tensors[f"keep/{group_name}"], num_members, features)
    kept = expand_members(keep[group_name], num_members, features)
    return kept, np.searchsorted(offered, kept)
