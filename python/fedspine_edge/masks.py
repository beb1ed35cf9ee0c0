"""Scores and a pruning ratio -> which members stay.

Comes in: the server's importance, the device's own, and the ratio asked for. Goes out: `Keep`, for each group the
sorted members that stay, as int32 in the original numbering. Three modes: `uniform` keeps the same counts in each
layer, so that stock loaders take the model; `per-layer` ranks the members of a kind over all layers; `layers` empties
whole layers, the least important first, down to the block each must keep (FedPruner). Kept counts are multiples of the
group's block and at least one block; the share that goes is never less than the ratio asked for, up to that minimum.

Source: FedSpine (arXiv 2501.02438), per-device structured pruning; the agreement with the server's ranking is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

import numpy as np

from fedspine_edge.protocol import Group, Layout

Keep = dict[str, np.ndarray]
MODES = ("uniform", "per-layer", "layers")


def keep_all(layout: Layout) -> Keep:
    """Returns every member of every group."""
    return {group.name: np.arange(group.num_members, dtype=np.int32) for group in layout.groups}


def kept_counts(keep: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Returns the number of kept members of each group."""
    return {name: len(members) for name, members in keep.items()}


def blend(server: np.ndarray, device: np.ndarray | None, agreement: float) -> np.ndarray:
    """Returns agreement * server + (1 - agreement) * device; where one is NaN the other counts alone.

    Args:
        server: Importance of each member, [num_members], NaN = not measured.
        device: The device's own, or None.
        agreement: Share of the server's importance (rho), 0..1.
    """
    server = np.asarray(server, dtype=np.float32)
    if device is None:
        return server
    device = np.asarray(device, dtype=np.float32)
    mixed = agreement * server + (1 - agreement) * device
    return np.where(np.isnan(mixed), np.where(np.isnan(server), device, server), mixed)


def choose(
    layout: Layout,
    scores: Mapping[str, np.ndarray],
    *,
    pruning_ratio: float,
    mode: str,
    candidates: Mapping[str, np.ndarray] | None = None,
) -> Keep:
    """Returns the members that stay.

    Args:
        layout: The unpruned model's layout.
        scores: Group name -> importance [num_members]; NaN ranks below every number.
        pruning_ratio: Share of the members of each kind to go, 0 <= ratio < 1.
        mode: `uniform`, `per-layer` or `layers`.
        candidates: Members that may stay; every member when None. In a group whose candidates are fewer than its share,
            all of them stay.

    Raises:
        ValueError: Ratio out of range or unknown mode.
    """
    if not 0 <= pruning_ratio < 1:
        raise ValueError(f"expected a pruning ratio in [0, 1), found {pruning_ratio}")
    if mode not in MODES:
        raise ValueError(f"expected mask mode {' or '.join(MODES)}, found {mode!r}")
    if pruning_ratio == 0 and candidates is None:
        return keep_all(layout)
    order = {g.name: _ranked(scores[g.name], None if candidates is None else candidates[g.name]) for g in layout.groups}
    keep: Keep = {}
    by_kind = sorted(layout.groups, key=lambda group: group.kind)
    for _, groups in groupby(by_kind, key=lambda group: group.kind):
        same_kind = list(groups)
        if mode == "uniform":
            counts = {g.name: _share(g.num_members, pruning_ratio, g.block) for g in same_kind}
        elif mode == "layers":
            counts = _whole_layers(same_kind, order, _layer_order(layout, scores), pruning_ratio)
        else:
            counts = _global_counts(same_kind, scores, order, pruning_ratio)
        keep |= {g.name: np.sort(order[g.name][: counts[g.name]]).astype(np.int32) for g in same_kind}
    return {group.name: keep[group.name] for group in layout.groups}


def _ranked(scores: np.ndarray, candidates: np.ndarray | None) -> np.ndarray:
    """Member indices, most important first; equal scores in the order of their index."""
    members = np.arange(len(scores)) if candidates is None else np.asarray(candidates, dtype=np.int64)
    values = np.nan_to_num(np.asarray(scores, dtype=np.float64)[members], nan=-np.inf)
    return members[np.argsort(-values, kind="stable")]


def _share(num_members: int, ratio: float, block: int) -> int:
    """Kept members: whole blocks, rounded down so that at least `ratio` goes, at least one block."""
    return max(block, int(num_members * (1 - ratio) / block + 1e-6) * block)


def _global_counts(
    groups: list[Group], scores: Mapping[str, np.ndarray], order: Mapping[str, np.ndarray], ratio: float
) -> dict[str, int]:
    """Kept members of each group when the blocks of all groups compete; a block is worth the mean of its members."""
    counts: dict[str, int] = {}
    rivals: list[tuple[float, int, int]] = []
    for index, group in enumerate(groups):
        ranked = order[group.name]
        values = np.nan_to_num(np.asarray(scores[group.name], dtype=np.float64)[ranked], nan=-1.0)
        counts[group.name] = min(group.block, len(ranked))
        for start in range(group.block, len(ranked) - group.block + 1, group.block):
            rivals.append((-float(values[start : start + group.block].mean()), start, index))
    total = sum(group.num_members for group in groups)
    block = groups[0].block
    places = int(total * (1 - ratio) / block + 1e-6) - len(groups)
    for _, _, index in sorted(rivals)[: max(places, 0)]:
        counts[groups[index].name] += block
    return counts


def _layer_order(layout: Layout, scores: Mapping[str, np.ndarray]) -> list[str]:
    """Layers (a group's name without its last part), most important first: by the mean rank of their kinds' means."""
    places: dict[str, float] = {}
    for kind in sorted({group.kind for group in layout.groups}):
        groups = [group.name for group in layout.groups if group.kind == kind]
        means = [float(np.nan_to_num(np.asarray(scores[name], dtype=np.float64)).mean()) for name in groups]
        for place, index in enumerate(np.argsort(-np.asarray(means), kind="stable")):
            layer = groups[int(index)].rpartition(".")[0]
            places[layer] = places.get(layer, 0.0) + place
    return sorted(places, key=lambda layer: (places[layer], layer))


def _whole_layers(
    groups: list[Group], order: Mapping[str, np.ndarray], layers: list[str], ratio: float
) -> dict[str, int]:
    """Kept members when whole layers go: the first layers stay whole, one in between keeps a part, the rest a block."""
    counts = {group.name: min(group.block, len(order[group.name])) for group in groups}
    block = groups[0].block
    left = int(sum(group.num_members for group in groups) * (1 - ratio) / block + 1e-6) * block - sum(counts.values())
    for group in sorted(groups, key=lambda group: layers.index(group.name.rpartition(".")[0])):
        more = max(0, min(left, len(order[group.name]) - counts[group.name])) // block * block
        counts[group.name] += more
        left -= more
    return counts
