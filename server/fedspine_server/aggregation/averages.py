"""Means over devices of everything that is not a LoRA factor: task head, importances, mean inputs.

Comes in: arrays of the merged devices with their weights. Goes out: the server's new arrays. NaN means "not measured"
and counts for nothing.

Source: docs/algorithm.md, sections 4 (mean compensation) and 8 (mask agreement).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


def weighted_mean(values: Iterable[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Returns the weighted mean, NaN where no device measured, float64 of the values' shape.

    Args:
        values: One array a device, equal shapes, at least one; taken one after the other. NaN entries are skipped.
        weights: One positive weight a device.
    """
    total: np.ndarray | float = 0.0
    mass: np.ndarray | float = 0.0
    for value, weight in zip(values, weights, strict=True):
        measured = ~np.isnan(value)
        total = total + np.where(measured, weight * np.nan_to_num(value.astype(np.float64)), 0.0)
        mass = mass + np.where(measured, weight, 0.0)
    seen = np.asarray(mass) > 0
    return np.where(seen, total / np.where(seen, mass, 1.0), np.nan)


def trimmed_mean(values: np.ndarray, share: float) -> np.ndarray:
    """Returns the mean over the first axis without a share of the values at either end; NaN where all are NaN.

    Args:
        values: float [devices, ...]; NaN entries are skipped. Sorted in place.
        share: Left out below and above, 0..0.5; at 0.5 one or two values are left, the median.
    """
    values.sort(axis=0)  # NaN last
    count = np.count_nonzero(~np.isnan(values), axis=0)
    cut = np.minimum((share * count + 1e-9).astype(np.int64), np.maximum(count - 1, 0) // 2)
    total, mass = np.zeros(values.shape[1:]), np.zeros(values.shape[1:])
    for index, value in enumerate(values):
        inside = (index >= cut) & (index < count - cut)
        total += np.where(inside, value, 0.0)
        mass += inside
    return np.where(mass > 0, total / np.where(mass > 0, mass, 1.0), np.nan)


def moved_towards(old: np.ndarray, fresh: np.ndarray, gain: float) -> np.ndarray:
    """Returns the moving average (1 - gain) old + gain fresh; where one of them is NaN, the other; float32."""
    both = (1 - gain) * old.astype(np.float64) + gain * fresh
    return np.where(np.isnan(old), fresh, np.where(np.isnan(fresh), old, both)).astype(np.float32)


def on_scale_of(reference: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns a device's importances times the factor that gives both the same sum over the members both know.

    Devices normalise over the members they keep, so the same member looks more important on a device that keeps few.

    Args:
        reference: The server's importances of the group, NaN where unknown.
        values: The device's, float [num_members].
    """
    known = ~np.isnan(reference) & ~np.isnan(values)
    own = float(values[known].astype(np.float64).sum())
    wanted = float(reference[known].astype(np.float64).sum())
    return values.astype(np.float64) * (wanted / own if own > 0 and wanted > 0 else 1.0)
