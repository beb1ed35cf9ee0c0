"""Devices that lie, for the simulated fleet: what becomes of an honest update on its way to the server.

Comes in: what a device was asked and what it trained. Goes out: what it sends. `label-flip` is not here: such a device
trains honestly on wrong labels.

Source: the usual attacks on federated averaging, as surveyed in arXiv 2107.06917.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from fedspine_edge.protocol import Assignment, Layout, Update
from fedspine_edge.quantized import as_float16, encoded, packed_masks
from fedspine_server.assignments import kept_features, kept_members

# What an attacker makes of the change it trained.
CHANGE_TIMES = {"sign-flip": -1.0, "scaled": 10.0, "nan": float("nan")}
ATTACKS = (*CHANGE_TIMES, "label-flip")


def falsified(attack: str | None, layout: Layout, assignment: Assignment, update: Update) -> Update:
    """Returns what the device sends: factors and task head moved the other way, too far, or not numbers at all.

    Args:
        attack: One of `ATTACKS`, None for an honest device.
        layout: The base model's layout.
        assignment: What it was asked.
        update: What it trained.
    """
    if attack not in CHANGE_TIMES:
        return update
    if assignment.work != "tune":
        sums = {name: _moved(np.zeros_like(array), array, CHANGE_TIMES[attack]) for name, array in _floats(update)}
        return dataclasses.replace(update, tensors={**update.tensors, **sums})
    dtype = assignment.update_dtype
    honest = as_float16(update, dtype, layout)
    times, tensors = CHANGE_TIMES[attack], dict(honest.tensors)
    given, kept = kept_members(assignment, layout), kept_members(honest, layout)
    for matrix in layout.matrices:
        sides = zip(kept_features(layout, matrix, given), kept_features(layout, matrix, kept), strict=True)
        rows, columns = (slice(None) if had is None or has is None else np.searchsorted(had, has) for had, has in sides)
        name_a, name_b = f"lora_a/{matrix.name}", f"lora_b/{matrix.name}"
        tensors[name_a] = _moved(assignment.tensors[name_a][:, columns], tensors[name_a], times)
        tensors[name_b] = _moved(assignment.tensors[name_b][rows], tensors[name_b], times)
    for name, _ in layout.task_head:
        head = f"task_head/{name}"
        tensors[head] = _moved(assignment.tensors[head], tensors[head], times)
    if dtype != "float16":
        for matrix in layout.matrices:
            for side, values in (("a", tensors[f"lora_a/{matrix.name}"]), ("b", tensors[f"lora_b/{matrix.name}"].T)):
                codes, scales = encoded(values, dtype)
                tensors |= {f"lora_{side}/{matrix.name}": codes, f"scale_{side}/{matrix.name}": scales}
        tensors |= packed_masks(tensors, layout)
    return dataclasses.replace(update, tensors=tensors)


def _floats(update: Update) -> list[tuple[str, np.ndarray]]:
    return [(name, array) for name, array in update.tensors.items() if array.dtype.kind == "f"]


def _moved(begin: np.ndarray, end: np.ndarray, times: float) -> np.ndarray:
    change = end.astype(np.float64) - begin
    return np.asarray((begin + times * change).astype(end.dtype))


def attackers(num_devices: int, share: float, seed: int) -> list[int]:
    """Returns which devices lie, by index: that share of them, rounded down."""
    chosen = np.random.default_rng([seed, 5]).permutation(num_devices)[: int(share * num_devices + 1e-9)]
    return sorted(int(index) for index in chosen)
