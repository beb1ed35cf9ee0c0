"""One self-contained HTML page of the grid: time to accuracy, accuracy against sparsity, waiting, traffic, ablations.

In: result documents. Out: a page without a request to anywhere; bands run from the lowest to the highest seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np

from fedspine_edge.report import wording
from fedspine_edge.report.curves import Tick, spread_labels, time_ticks, value_ticks
from fedspine_edge.report.grid_figures import (
    ENCODER_TASKS,
    NOT_RUN,
    OURS,
    PLAIN,
    SPARSITIES,
    Document,
    Results,
    summarise,
)
from fedspine_edge.report.grid_text import DIFFERENCES, lines

NUM_POINTS = 60
HUES = {OURS: "#0064a8", "fedlora": "#b04a00", "fedspine-paper": "#a0457f", "hetlora": "#009e73"}
OTHERS = "#8a939d"


@dataclass(frozen=True)
class Series:
    """One line with a band around it; points in per cent from the top left."""

    name: str
    colour: str
    line: str
    band: str
    label: str
    label_at: float


@dataclass(frozen=True)
class Chart:
    """Lines over one axis."""

    title: str
    series: tuple[Series, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class Bar:
    """One named length, in per cent of the longest, with its value in words."""

    name: str
    share: float
    value: str


Band = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # x, mean, low, high


def render(documents: Sequence[Document]) -> str:
    """Returns the page of a grid's results."""
    results = Results.of(documents)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(Path(__file__).with_name("grid.html").read_text(encoding="utf-8"))
    tasks = sorted({task for task, *_ in results.documents})
    return template.render(
        lines=lines(summarise(documents)),
        differences=DIFFERENCES,
        num_results=len(results.documents),
        times=[chart for task in tasks if (chart := time_chart(results, task))],
        sparsities=[chart for task in ENCODER_TASKS if (chart := sparsity_chart(results, task))],
        waiting=bars(results, "waiting_share", wording.percent),
        traffic=bars(results, "transfer_bytes", wording.data_size),
        ablations=ablation_bars(results),
        not_run=NOT_RUN,
    )


def time_chart(results: Results, task: str) -> Chart | None:
    """Returns validation accuracy over virtual time of every method on a task; None without any run."""
    bands: dict[str, Band] = {}
    for method in results.methods():
        runs = [
            document["curve"]
            for (own, variant, name, sparsity, _), document in results.documents.items()
            if (own, variant, name) == (task, PLAIN, method) and sparsity in (0.0, 0.3, SPARSITIES[0])
        ]
        if runs:
            bands[method] = _over_time(runs)
    if not bands:
        return None
    end = max(float(band[0][-1]) for band in bands.values())
    return _chart(task, bands, (0.0, end), time_ticks(end))


def sparsity_chart(results: Results, task: str) -> Chart | None:
    """Returns held-out accuracy over the target sparsity of every pruning method on a task; None without any run."""
    bands: dict[str, Band] = {}
    for method in results.methods():
        found = {
            sparsity: [d["accuracy"] for (own, _), d in results.runs(method, sparsity=sparsity).items() if own == task]
            for sparsity in SPARSITIES
        }
        known = {sparsity: values for sparsity, values in found.items() if values}
        if known:
            mean, low, high = (
                np.array([function(values) for values in known.values()]) for function in (statistics.fmean, min, max)
            )
            bands[method] = (np.array(list(known)), mean, low, high)
    if not bands:
        return None
    ticks = tuple(Tick(100 * (s - SPARSITIES[0]) / (SPARSITIES[-1] - SPARSITIES[0]), f"{s:g}") for s in SPARSITIES)
    return _chart(task, bands, (SPARSITIES[0], SPARSITIES[-1]), ticks)


def bars(results: Results, key: str, tell: object) -> tuple[Bar, ...]:
    """Returns the mean of a measured quantity for each method's plain runs."""
    assert callable(tell)
    means = {
        method: statistics.fmean(values)
        for method in results.methods()
        if (values := [d[key] for d in results.runs(method).values() if d[key] is not None])
    }
    longest = max(means.values(), default=0.0) or 1.0
    return tuple(Bar(name, 100 * value / longest, tell(value)) for name, value in means.items())


def ablation_bars(results: Results) -> tuple[Bar, ...]:
    """Returns held-out accuracy of ours as it is and with one thing changed, over the seeds both have."""
    changed: dict[str, list[float]] = {}
    for (task, variant, method, sparsity, _), document in sorted(results.documents.items()):
        if task == ENCODER_TASKS[0] and method == OURS and sparsity == SPARSITIES[0]:
            changed.setdefault(variant, []).append(document["accuracy"])
    return tuple(
        Bar(name, 100 * statistics.fmean(values), f"{wording.percent(statistics.fmean(values))} ({len(values)})")
        for name, values in sorted(changed.items(), key=lambda item: (item[0] != PLAIN, -statistics.fmean(item[1])))
    )


def _over_time(curves: Sequence[Sequence[Sequence[float]]]) -> Band:
    """Mean, lowest and highest of several curves on common points of time, to the end of the shortest."""
    seconds = np.linspace(max(c[0][0] for c in curves), min(c[-1][0] for c in curves), NUM_POINTS)
    values = np.stack([np.interp(seconds, [p[0] for p in c], [p[2] for p in c]) for c in curves])
    return seconds, values.mean(axis=0), values.min(axis=0), values.max(axis=0)


def _chart(title: str, bands: Mapping[str, Band], x_range: tuple[float, float], x_ticks: tuple[Tick, ...]) -> Chart:
    ticks = value_ticks(
        min(float(band[2].min()) for band in bands.values()), max(float(band[3].max()) for band in bands.values())
    )
    low, high = ticks[0], ticks[-1]

    def points(x: np.ndarray, y: np.ndarray) -> list[str]:
        across = 100 * (x - x_range[0]) / ((x_range[1] - x_range[0]) or 1.0)
        return [f"{a:.2f},{b:.2f}" for a, b in zip(across, 100 * (high - y) / (high - low), strict=True)]

    ends = {name: 100 * (high - float(band[1][-1])) / (high - low) for name, band in bands.items()}
    places = dict(zip(ends, spread_labels(list(ends.values()), 6.0), strict=True))
    series = tuple(
        Series(
            name=name,
            colour=HUES.get(name, OTHERS),
            line=" ".join(points(band[0], band[1])),
            band=" ".join([*points(band[0], band[2]), *points(band[0], band[3])[::-1]]),
            label=f"{name} {wording.percent(float(band[1][-1]))}",
            label_at=places[name],
        )
        for name, band in reversed(list(bands.items()))
    )
    y_ticks = tuple(Tick(100 * (high - v) / (high - low), wording.percent(v, 0)) for v in ticks)
    return Chart(title, series, x_ticks, y_ticks)
