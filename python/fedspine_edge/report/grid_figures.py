"""What the grid of `fedspine reproduce` shows: results of single runs -> the figures that the comparison is judged by.

In: result documents as the grid stores them. Out: figures with their spread, JSON-ready. Only what was run counts:
pairs of runs on the same task and seed are compared, and a figure without a pair is the text `not run`.

Source: docs/algorithm.md, section 10: Cost-to-Target, Quality-under-Budget, robustness.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OURS, REFERENCE, PAPER, HETLORA = "spine", "fedlora", "fedspine-paper", "hetlora"
PLAIN, DROPOUTS, ATTACKERS = "plain", "dropouts", "attackers"
ENCODER_TASKS = ("trec6", "r8", "sentiment")
SPARSITIES = (0.5, 0.7, 0.85)
TARGET_SHARE = 0.99
FINAL_ROUNDS = 3  # validation accuracies at the end of the reference that are averaged: a single one wavers by a point
NOT_RUN = "not run"
Document = Mapping[str, Any]
Figure = dict[str, Any] | str
Pair = tuple[str, int]  # task and seed


@dataclass(frozen=True)
class Results:
    """All results of a grid, by (task, variant, method, sparsity, seed)."""

    documents: Mapping[tuple[str, str, str, float, int], Document]

    @classmethod
    def of(cls, documents: Iterable[Document]) -> Results:
        """Returns the results that the documents hold."""
        return cls({(d["task"], d["variant"], d["method"], d["sparsity"], d["seed"]): d for d in documents})

    def runs(self, method: str, *, sparsity: float | None = None, variant: str = PLAIN) -> dict[Pair, Document]:
        """Returns a method's runs on the encoder tasks: (task, seed) -> result.

        Args:
            method: Which.
            sparsity: Its target; None for the first of `SPARSITIES`, or 0 where the method does not prune.
            variant: Which.
        """
        wanted = (SPARSITIES[0], 0.0) if sparsity is None else (sparsity,)
        return {
            (task, seed): document
            for (task, own, name, target, seed), document in self.documents.items()
            if task in ENCODER_TASKS and name == method and own == variant and target in wanted
        }

    def methods(self) -> list[str]:
        """Returns the names of all methods that have a plain result, ours first."""
        names = {method for (_, variant, method, _, _) in self.documents if variant == PLAIN}
        return sorted(names, key=lambda name: (name != OURS, name))


def figure(values: Sequence[float], **more: Any) -> Figure:
    """Returns mean, standard deviation (None for one value) and count of values; `not run` without any."""
    if not values:
        return NOT_RUN
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"value": statistics.fmean(values), "sd": spread, "n": len(values), **more}


def summarise(documents: Iterable[Document]) -> dict[str, Any]:
    """Returns the figures of a grid."""
    results = Results.of(documents)
    return {
        "num_results": len(results.documents),
        "cost_to_target": cost_to_target(results),
        "cost_to_common": cost_to_common(results),
        "quality": {f"{sparsity:g}": quality(results, sparsity) for sparsity in SPARSITIES},
        "waiting_share": figure([d["waiting_share"] for d in results.runs(OURS).values()]),
        "waiting_share_paper": figure([d["waiting_share"] for d in results.runs(PAPER).values()]),
        "traffic_ratio": traffic_ratio(results),
        "attackers_drop": drop(results, ATTACKERS),
        "dropouts_drop": drop(results, DROPOUTS),
        "dropouts_time": dropouts_time(results),
    }


def target_of(reference: Document) -> float:
    """Returns 99 % of the reference's final validation accuracy."""
    return TARGET_SHARE * statistics.fmean(accuracy for *_, accuracy in reference["curve"][-FINAL_ROUNDS:])


def reach(document: Document, target: float) -> tuple[float, float] | None:
    """Returns the virtual seconds and the bytes at which a run first has an accuracy; None when it never does."""
    return next(((seconds, moved) for seconds, moved, accuracy in document["curve"] if accuracy >= target), None)


def cost_to_target(results: Results) -> dict[str, Any]:
    """Returns how many times longer the rivals take to 99 % of unpruned FedLoRA's final accuracy.

    A rival that never gets there counts with its whole run, so its ratio is a lower bound (`bounded` counts those).
    Where ours does not get there the pair counts for nothing but `ours_not_reached`.
    """
    ours, reference = results.runs(OURS), results.runs(REFERENCE)
    targets = {pair: target_of(document) for pair, document in reference.items() if pair in ours}
    reached = {pair: reach(ours[pair], target) for pair, target in targets.items()}
    by_rival = {}
    for rival in results.methods()[1:]:
        ratios, bounded = [], 0
        for pair, document in results.runs(rival).items():
            own = reached.get(pair)
            if own is None:
                continue
            found = reach(document, targets[pair])
            bounded += found is None
            ratios.append((document["virtual_seconds"] if found is None else found[0]) / own[0])
        by_rival[rival] = figure(ratios, bounded=bounded)
    not_reached = sum(found is None for found in reached.values())
    return _extremes(by_rival) | {"by_rival": by_rival, "ours_not_reached": not_reached}


def cost_to_common(results: Results) -> dict[str, Any]:
    """Returns how many times longer each rival takes to the highest accuracy that both it and ours reach."""
    ours, by_rival = results.runs(OURS), {}
    for rival in results.methods()[1:]:
        ratios = []
        for pair, document in results.runs(rival).items():
            if pair in ours:
                target = min(max(accuracy for *_, accuracy in one["curve"]) for one in (document, ours[pair]))
                theirs, own = reach(document, target), reach(ours[pair], target)
                if theirs is not None and own is not None:  # always: both reach it
                    ratios.append(theirs[0] / own[0])
        by_rival[rival] = figure(ratios)
    return _extremes(by_rival) | {"by_rival": by_rival}


def _extremes(by_rival: Mapping[str, Figure]) -> dict[str, Any]:
    known = {name: found for name, found in by_rival.items() if isinstance(found, dict)}
    if not known:
        return dict.fromkeys(("min_ratio", "vs_slowest", "vs_fedspine_paper"), NOT_RUN)
    least = min(known, key=lambda name: known[name]["value"])
    most = max(known, key=lambda name: known[name]["value"])
    return {
        "min_ratio": {**known[least], "rival": least},
        "vs_slowest": {**known[most], "rival": most},
        "vs_fedspine_paper": by_rival.get(PAPER, NOT_RUN),
    }


def quality(results: Results, sparsity: float) -> dict[str, Any]:
    """Returns points of held-out accuracy by which ours is ahead at a sparsity, over pairs of the same task and seed.

    The best and the weakest rival are those with the highest and lowest mean difference.
    """
    ours = results.runs(OURS, sparsity=sparsity)
    ahead = {}
    for rival in results.methods()[1:]:
        found = figure(_points(ours, results.runs(rival, sparsity=sparsity)))
        if isinstance(found, dict):
            ahead[rival] = found
    dense = figure(_points(ours, results.runs(REFERENCE)))
    if not ahead:
        return {"vs_best": NOT_RUN, "vs_weakest": NOT_RUN, "vs_dense": dense, "by_rival": {}}
    best = min(ahead, key=lambda name: ahead[name]["value"])
    weakest = max(ahead, key=lambda name: ahead[name]["value"])
    return {
        "vs_best": {**ahead[best], "rival": best},
        "vs_weakest": {**ahead[weakest], "rival": weakest},
        "vs_dense": dense,
        "by_rival": ahead,
    }


def _points(ours: Mapping[Pair, Document], theirs: Mapping[Pair, Document]) -> list[float]:
    """Points by which ours is ahead, one for each pair that both have."""
    return [100 * (ours[pair]["accuracy"] - theirs[pair]["accuracy"]) for pair in sorted(ours.keys() & theirs.keys())]


def traffic_ratio(results: Results) -> Figure:
    """Returns the bytes to 99 % of FedLoRA's final accuracy, ours over HetLoRA's (its whole run if it never does)."""
    ours, rival, ratios = results.runs(OURS), results.runs(HETLORA), []
    for pair, document in results.runs(REFERENCE).items():
        if pair not in ours or pair not in rival:
            continue
        own, theirs = (reach(runs[pair], target_of(document)) for runs in (ours, rival))
        if own is not None:
            ratios.append(own[1] / (rival[pair]["transfer_bytes"] if theirs is None else theirs[1]))
    return figure(ratios)


def drop(results: Results, variant: str) -> Figure:
    """Returns the points of accuracy that ours loses in a variant."""
    return figure(_points(results.runs(OURS), results.runs(OURS, variant=variant)))


def dropouts_time(results: Results) -> Figure:
    """Returns how many times longer ours takes to 99 % of FedLoRA's final accuracy when devices drop out."""
    clean, hit, ratios = results.runs(OURS), results.runs(OURS, variant=DROPOUTS), []
    for pair, document in results.runs(REFERENCE).items():
        found = [reach(runs[pair], target_of(document)) if pair in runs else None for runs in (clean, hit)]
        if found[0] is not None and found[1] is not None:
            ratios.append(found[1][0] / found[0][0])
    return figure(ratios)
