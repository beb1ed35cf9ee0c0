"""A choice -> the assignment with its arrays, and a device's arrays -> full-size ones.

Comes in: the run's state and what the controller chose. Goes out: an `Assignment` whose factors are the global ones cut
to the rank and to the candidates' rows and columns. It is a pure function of the state, so it can be made again after a
restart, and when its answer is checked.

Source: FedSpine (arXiv 2501.02438), the server's side of a round; docs/algorithm.md, sections 2 and 5.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedspine_edge.protocol import Assignment, Layout, Matrix, Update, expand_members
from fedspine_edge.quantized import ASSIGNMENT_DTYPE, DecodedArrays, packed_once
from fedspine_server.aggregation.contribution import Contribution
from fedspine_server.arms import in_cooldown, may_revive
from fedspine_server.controllers.contract import Choice
from fedspine_server.opening import as_opening, is_opening
from fedspine_server.settings import learning_rate_of
from fedspine_server.state import DeviceState, RunState

# A device that is told to follow the server alone measures nothing; outside cool-down the server lives on measurements.
MOST_AGREEMENT_WHILE_MEASURING = 0.999


def candidates(state: RunState, device: DeviceState) -> dict[str, np.ndarray]:
    """Returns the members a device may keep in the round under way: group name -> int32.

    All while members may come back, and in cool-down, where every device takes the server's mask; in between what the
    device kept last (all, if it never returned anything).
    """
    if device.kept and not may_revive(state.settings, state.round_index):
        return dict(device.kept)
    return {group.name: np.arange(group.num_members, dtype=np.int32) for group in state.layout.groups}


class RoundArrays:
    """The arrays of a round's assignments: devices asked for the same rank and candidates share them.

    Only the last few combinations are held, so that a round in which each device has its own costs no memory here.

    Args:
        state: The state of the round.
    """

    def __init__(self, state: RunState) -> None:
        self._state = state
        self._made: dict[tuple[Any, ...], Mapping[str, np.ndarray]] = {}

    def of(self, members: Mapping[str, np.ndarray], rank: int) -> Mapping[str, np.ndarray]:
        """Returns the arrays for a device's candidates and rank."""
        key = (rank, *(members[group.name].tobytes() for group in self._state.layout.groups))
        found = self._made.get(key)
        if found is None:
            if len(self._made) > len(self._state.settings.ranks):
                del self._made[next(iter(self._made))]
            found = self._made[key] = _tensors(self._state, members, rank)
        return found


def build_assignment(state: RunState, choice: Choice, arrays: RoundArrays | None = None) -> Assignment:
    """Returns what the server asks of one device in the round under way.

    Args:
        state: The state of the round.
        choice: What the controller chose.
        arrays: Shared by the assignments of a round; None makes them for this one.
    """
    settings, round_index = state.settings, state.round_index
    # Nothing more is learned of members whose fate is settled; a device measures nothing at agreement 1.
    settled = in_cooldown(settings, round_index) or settings.target_sparsity == 0
    assignment = Assignment(
        run_id=state.run_id,
        device_id=choice.device_id,
        round_index=round_index,
        base_sha256=state.layout.base_sha256,
        pruning_ratio=choice.pruning_ratio,
        rank=choice.rank,
        scaling=settings.scaling,
        num_steps=choice.num_steps,
        prune_interval=settings.prune_interval,
        batch_size=settings.batch_size,
        learning_rate=learning_rate_of(settings, round_index, choice.rank),
        seed=zlib.crc32(f"{settings.seed}/{round_index}/{choice.device_id}".encode()),
        mask_agreement=1.0 if settled else min(settings.mask_agreement, MOST_AGREEMENT_WHILE_MEASURING),
        mask_mode=settings.mask_mode,
        revive=may_revive(settings, round_index),
        tensors={},
        importance=settings.importance,
        budget_seconds=choice.budget_seconds,
        min_steps=choice.min_steps,
        update_dtype=settings.update_dtype,
        base_dtype=settings.base_dtype,
        lora_dropout=settings.lora_dropout,
    )
    if is_opening(settings, state.layout, round_index):
        return as_opening(assignment, state.task_head)
    members = candidates(state, state.devices[choice.device_id])
    return dataclasses.replace(assignment, tensors=(arrays or RoundArrays(state)).of(members, choice.rank))


def _tensors(state: RunState, members: Mapping[str, np.ndarray], rank: int) -> Mapping[str, np.ndarray]:
    tensors = _float16_tensors(state, members, rank)
    if state.settings.update_dtype == "float16":
        return tensors
    return DecodedArrays(packed_once(tensors, state.layout, ASSIGNMENT_DTYPE), state.layout, rank)


def _float16_tensors(state: RunState, members: Mapping[str, np.ndarray], rank: int) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for matrix in state.layout.matrices:
        factors = state.adapter[matrix.name]
        rows, columns = kept_features(state.layout, matrix, members)
        lora_a = factors.lora_a[:rank] if columns is None else factors.lora_a[:rank, columns]
        lora_b = factors.lora_b[:, :rank] if rows is None else factors.lora_b[rows, :rank]
        tensors[f"lora_a/{matrix.name}"] = lora_a.astype(np.float16)
        tensors[f"lora_b/{matrix.name}"] = lora_b.astype(np.float16)
    for name, kept in members.items():
        tensors[f"keep/{name}"] = kept
    tensors |= {f"importance/{name}": value.astype(np.float16) for name, value in state.importance.items()}
    if state.settings.mean_compensation:
        tensors |= {f"mean_input/{name}": value.astype(np.float16) for name, value in state.mean_input.items()}
    return tensors | {f"task_head/{name}": value for name, value in state.task_head.items()}


def kept_features(
    layout: Layout, matrix: Matrix, members: Mapping[str, np.ndarray]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Returns the rows and the columns of a matrix that the given members own; None for a side without a group."""
    sides: list[np.ndarray | None] = []
    for group_name, features in ((matrix.out_group, matrix.out_features), (matrix.in_group, matrix.in_features)):
        if group_name is None:
            sides.append(None)
        else:
            sides.append(expand_members(members[group_name], layout.group(group_name).num_members, features))
    return sides[0], sides[1]


def kept_members(update: Update | Assignment, layout: Layout) -> dict[str, np.ndarray]:
    """Returns a message's members of each group."""
    return {group.name: update.tensors[f"keep/{group.name}"] for group in layout.groups}


def contribution(layout: Layout, matrix: Matrix, update: Update, weight: float) -> Contribution:
    """Returns an update's part in one matrix; its factors are looked up when they are read."""
    rows, columns = kept_features(layout, matrix, kept_members(update, layout))

    def read() -> tuple[np.ndarray, np.ndarray]:
        lora_a = update.tensors[f"lora_a/{matrix.name}"].astype(np.float64)
        lora_b = update.tensors[f"lora_b/{matrix.name}"].astype(np.float64)
        if columns is not None:
            trained_a, lora_a = lora_a, np.zeros((len(lora_a), matrix.in_features))
            lora_a[:, columns] = trained_a
        if rows is not None:
            trained_b, lora_b = lora_b, np.zeros((matrix.out_features, lora_b.shape[1]))
            lora_b[rows] = trained_b
        return lora_a, lora_b

    keep_out, keep_in = _mask(rows, matrix.out_features), _mask(columns, matrix.in_features)
    return Contribution(update.device_id, weight, update.rank, read, keep_out, keep_in)


def _mask(kept: np.ndarray | None, features: int) -> np.ndarray | None:
    if kept is None:
        return None
    mask = np.zeros(features, dtype=bool)
    mask[kept] = True
    return mask


def change_norm(layout: Layout, assignment: Assignment, update: Update) -> float:
    """Returns the Frobenius norm of what a device changed: scaling * (B A - assigned B A) at what it kept."""
    total = 0.0
    for matrix in layout.matrices:
        begin_a, begin_b = contribution(layout, matrix, as_update(assignment, update), 1.0).read()
        end = contribution(layout, matrix, update, 1.0)
        end_a, end_b = end.read()
        begin_a = begin_a if end.keep_in is None else begin_a * end.keep_in
        begin_b = begin_b if end.keep_out is None else begin_b * end.keep_out[:, None]
        lora_b = np.concatenate([end_b, -begin_b], axis=1)
        lora_a = np.concatenate([end_a, begin_a], axis=0)
        total += float(np.sum((lora_b.T @ lora_b) * (lora_a @ lora_a.T)))
    return assignment.scaling * float(np.sqrt(max(0.0, total)))


def as_update(assignment: Assignment, update: Update) -> Update:
    """Returns the update of a device that changed and pruned nothing."""
    return Update(
        run_id=update.run_id,
        device_id=update.device_id,
        round_index=update.round_index,
        base_sha256=update.base_sha256,
        pruning_ratio=0.0,
        rank=assignment.rank,
        report=update.report,
        tensors=assignment.tensors,
    )
