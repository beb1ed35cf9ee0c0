"""Admitted updates -> the next global adapter, task head, importances and mean inputs.

Comes in: the state a round began with and the updates that were admitted. Goes out: the state with the server's arrays
moved on, matrix by matrix, so that of updates which wait on disk (`spool`) little more than two arrays are in memory.
Updates are taken in the order of their device_id, so the order of arrival changes nothing; one of an earlier round
weighs less.

Source: docs/algorithm.md, section 8.
"""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fedspine_edge.protocol import Matrix, Update
from fedspine_server.aggregation import AGGREGATIONS, Factors, RoundFacts
from fedspine_server.aggregation.averages import moved_towards, on_scale_of, trimmed_mean, weighted_mean
from fedspine_server.aggregation.robust import MEDIAN, clipped
from fedspine_server.arms import in_cooldown
from fedspine_server.assignments import contribution
from fedspine_server.lateness import staleness_weight
from fedspine_server.opening import is_opening, opened_head
from fedspine_server.settings import RunSettings
from fedspine_server.state import RunState, weight_of


def merge(state: RunState, updates: Sequence[Update]) -> RunState:
    """Returns the state with admitted updates merged; unchanged without any."""
    if not updates:
        return state
    ordered = sorted(updates, key=lambda update: update.device_id)
    if is_opening(state.settings, state.layout, state.round_index):
        head = opened_head(state.layout, state.task_head, ordered, _trim_share(state.settings))
        return dataclasses.replace(state, task_head=head)
    weights = [_weight(state, update) for update in ordered]
    task_head = {
        name: _middle(state, (update.tensors[f"task_head/{name}"] for update in ordered), weights).astype(np.float32)
        for name in state.task_head
    }
    return dataclasses.replace(
        state,
        adapter=_adapter(state, ordered, weights),
        task_head=task_head,
        importance=_importance(state, ordered, weights),
        mean_input={
            name: _moved(state, old, [update.tensors.get(f"mean_input/{name}") for update in ordered], weights)
            for name, old in state.mean_input.items()
        },
    )


def _weight(state: RunState, update: Update) -> float:
    own = weight_of(state.settings, state.devices[update.device_id])
    return own * staleness_weight(state.round_index - update.round_index)


def _adapter(state: RunState, updates: Sequence[Update], weights: Sequence[float]) -> dict[str, Factors]:
    """Each matrix on its own, so the cores can share them and the result stays the same."""
    settings, layout = state.settings, state.layout
    rule = AGGREGATIONS[settings.aggregation]

    def merged(matrix: Matrix) -> Factors:
        parts = [contribution(layout, matrix, u, weight) for u, weight in zip(updates, weights, strict=True)]
        generator = np.random.default_rng([settings.seed, state.round_index + 1, zlib.crc32(matrix.name.encode())])
        # In cool-down all devices keep the same members, so what none of them kept is gone for good.
        facts = RoundFacts(in_cooldown(settings, state.round_index), generator, settings.trim_share)
        old = state.adapter[matrix.name]
        return rule(old, clipped(old, parts, settings.clip_factor) if settings.clip_factor else parts, facts)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return dict(zip((m.name for m in layout.matrices), pool.map(merged, layout.matrices), strict=True))


def _importance(state: RunState, updates: Sequence[Update], weights: Sequence[float]) -> Mapping[str, np.ndarray]:
    """Importances stand still in cool-down: they decide the mask, the same in all its rounds and in the export."""
    if in_cooldown(state.settings, state.round_index):
        return state.importance
    result = {}
    for name, old in state.importance.items():
        measured = [update.tensors.get(f"importance/{name}") for update in updates]
        scaled = [None if values is None else on_scale_of(old, values) for values in measured]
        result[name] = _moved(state, old, scaled, weights)
    return result


def _middle(state: RunState, values: Iterable[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """What is no LoRA factor, over the devices: their mean, or what a robust rule makes of it."""
    share = _trim_share(state.settings)
    if share is None:
        return weighted_mean(values, weights)
    return trimmed_mean(np.stack([value.astype(np.float32) for value in values]), share)


def _trim_share(settings: RunSettings) -> float | None:
    return {"median": MEDIAN, "trimmed-mean": settings.trim_share}.get(settings.aggregation)


def _moved(
    state: RunState, old: np.ndarray, measured: Sequence[np.ndarray | None], weights: Sequence[float]
) -> np.ndarray:
    pairs = [(values, weight) for values, weight in zip(measured, weights, strict=True) if values is not None]
    if not pairs:
        return old
    fresh = _middle(state, [values for values, _ in pairs], [weight for _, weight in pairs])
    return moved_towards(old, fresh, state.settings.importance_gain)
