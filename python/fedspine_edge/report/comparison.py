"""A comparison of models as one self-contained HTML page, in the look of a run's report.

In: metrics of `profiling.comparison` and what is to be known of how they were measured. Out: HTML; names of files and
whatever else came from outside are escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from fedspine_edge.profiling.comparison import LETTERS, Metric, value_text, verdict
from fedspine_edge.profiling.intervals import Estimate
from fedspine_edge.report.page import palette


@dataclass(frozen=True)
class Cell:
    """A model's figure, how it stands to the first's, whether surely better, and its bar's width in per cent."""

    value: str
    verdict: str
    better: bool
    width: float


@dataclass(frozen=True)
class Line:
    """One metric of every model."""

    name: str
    trusted: bool
    cells: tuple[Cell, ...]


def comparison_page(metrics: Sequence[Metric], names: Sequence[str], notes: Sequence[str], picture: str = "") -> str:
    """Returns the page.

    Args:
        metrics: What was measured.
        names: Of the models, the first being what others are compared with.
        notes: How it was measured, a sentence each.
        picture: An SVG of our own drawing; empty for none.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(Path(__file__).with_name("comparison.html").read_text(encoding="utf-8"))
    return template.render(
        palette=palette(),
        models=list(zip(LETTERS, names, strict=False)),
        lines=[_line(metric) for metric in metrics],
        notes=notes,
        picture=picture,
    )


def _clearly_better(ratio: Estimate, metric: Metric) -> bool:
    """Whether a ratio is on the better side of 1 with its whole interval."""
    bounds = [bound for bound in (ratio.low, ratio.value, ratio.high) if bound is not None]
    return min(bounds) > 1 if metric.higher_is_better else max(bounds) < 1


def _line(metric: Metric) -> Line:
    longest = max((value for value in metric.values if value is not None), default=0.0)
    cells = []
    for index, value in enumerate(metric.values):
        ratio = metric.ratios[index]
        better = metric.trusted and ratio is not None and _clearly_better(ratio, metric)
        width = 0.0 if value is None or longest <= 0 else round(100 * value / longest, 1)
        cells.append(Cell(value_text(metric, index), verdict(metric, index) if index else "", better, width))
    return Line(metric.name, metric.trusted, tuple(cells))
