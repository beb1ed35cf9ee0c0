"""Means over devices of everything that is not a LoRA factor: task head, importances, mean inputs.

Comes in: arrays of the merged devices with their weights. Goes out: the server's new arrays. NaN means "not measured"
and counts for nothing.

Source: docs/algorithm.md, sections 4 (mean compensation) and 8 (mask agreement).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def weighted_mean(values: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Returns the weighted mean, NaN where no device measured, float64 of the values' shape.

    Args:
        values: One array a device, equal shapes; NaN entries are skipped.
        weights: One positive weight a device.
    """
    total, mass = np.zeros(values[0].shape), np.zeros(values[0].shape)
    for value, weight in zip(values, weights, strict=True):
        measured = ~np.isnan(value)
        total += np.where(measured, weight * np.nan_to_num(value.astype(np.float64)), 0.0)
        mass += np.where(measured, weight, 0.0)
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
