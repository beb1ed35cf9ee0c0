"""The accuracy curve over virtual time: the pruned run against the unpruned reference.

In: checked records. Out: positions in per cent of the plot, for a template that draws the lines as stretched SVG and
every word as HTML, so that letters stay the same size on a phone and on a desk.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedspine_edge.report import wording
from fedspine_edge.report.records import RoundRecord, Run

LABEL_GAP = 9.0
TIME_STEPS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 21600, 43200, 86400)


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis; `at` in per cent from the left or the top."""

    at: float
    label: str


@dataclass(frozen=True)
class Dot:
    """One measured point; x and y in per cent from the top left."""

    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Series:
    """One line with its name written at its end, `label_at` per cent from the top."""

    name: str
    css: str
    path: str
    dots: tuple[Dot, ...]
    label: str
    label_at: float


@dataclass(frozen=True)
class Curve:
    """A whole chart: `quantity` against virtual time, and one sentence that says what it shows."""

    quantity: str
    series: tuple[Series, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    finding: str


def curve(run: Run) -> Curve | None:
    """Returns accuracy over virtual time, or the training loss without any accuracy; None without either."""
    for quantity in ("accuracy", "loss"):
        lines = {
            name: points
            for name, rounds in (("unpruned", run.dense_rounds), ("pruned", run.rounds))
            if (points := _points(rounds, quantity, run.summary.accuracy_untuned))
        }
        if "pruned" in lines:
            return _draw(lines, quantity, _finding(lines, quantity))
    return None


def time_ticks(end_seconds: float, count: int = 5) -> tuple[Tick, ...]:
    """Returns at most `count` + 1 round times from 0 on an axis that ends at `end_seconds`."""
    if end_seconds <= 0:
        return (Tick(0.0, "0"),)
    fitting = [step for step in TIME_STEPS if end_seconds / step <= count]
    step = fitting[0] if fitting else 86400 * math.ceil(end_seconds / 86400 / count)
    unit, name = (1, "s") if step < 60 else (60, "min") if step < 3600 else (3600, "h")
    last = math.floor(end_seconds / step)
    return tuple(
        Tick(100 * i * step / end_seconds, f"{i * step / unit:g} {name}" if i else "0") for i in range(last + 1)
    )


def value_ticks(low: float, high: float, count: int = 5) -> tuple[float, ...]:
    """Returns round values that enclose [low, high] in about `count` steps of 1, 2 or 5 times a power of ten."""
    span = max(high - low, 1e-6 * max(1.0, abs(high)))
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(i * step for i in range(first, max(last, first + 1) + 1))


def spread_labels(wanted: Sequence[float], gap: float = LABEL_GAP) -> tuple[float, ...]:
    """Returns positions at least `gap` apart, in the order of `wanted`, within 0..100 and near what was wanted."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = list(wanted)
    for before, after in itertools.pairwise(order):
        placed[after] = max(placed[after], placed[before] + gap)
    overflow = max(0.0, max(placed, default=0.0) - 100)
    return tuple(place - overflow for place in placed)


def _points(rounds: Sequence[RoundRecord], quantity: str, untuned: float | None) -> list[tuple[float, float]]:
    points = [(0.0, untuned)] if quantity == "accuracy" and untuned is not None and rounds else []
    for record in rounds:
        value = record.accuracy if quantity == "accuracy" else record.loss_after
        if value is not None and math.isfinite(value):
            points.append((record.virtual_end_seconds, value))
    return points if any(seconds > 0 for seconds, _ in points) else []


def _draw(lines: dict[str, list[tuple[float, float]]], quantity: str, finding: str) -> Curve:
    values = [value for points in lines.values() for _, value in points]
    ticks = value_ticks(min(values), max(values))
    low, high = ticks[0], ticks[-1]
    end = max(points[-1][0] for points in lines.values())
    tell = wording.percent if quantity == "accuracy" else wording.number

    def place(value: float) -> float:
        return round(100 * (high - value) / (high - low), 2)

    label_places = spread_labels([place(points[-1][1]) for points in lines.values()])
    series = []
    for (name, points), label_at in zip(lines.items(), label_places, strict=True):
        dots = tuple(
            Dot(round(100 * t / end, 2), place(v), f"{name}: {tell(v)} after {wording.seconds(t)}") for t, v in points
        )
        path = " ".join(f"{dot.x:g},{dot.y:g}" for dot in dots)
        series.append(Series(name, name, path, dots, f"{name} {tell(points[-1][1])}", label_at))
    digits = max(0, -math.floor(math.log10((ticks[1] - ticks[0]) * (100 if quantity == "accuracy" else 1)) + 1e-9))
    y_ticks = tuple(
        Tick(place(v), wording.percent(v, digits) if quantity == "accuracy" else wording.number(v, digits))
        for v in ticks
    )
    return Curve(quantity, tuple(series), time_ticks(end), y_ticks, finding)


def _finding(lines: dict[str, list[tuple[float, float]]], quantity: str) -> str:
    if quantity != "accuracy" or "unpruned" not in lines:
        return ""
    target = 0.99 * lines["unpruned"][-1][1]
    dense, pruned = (
        next((t for t, value in lines[name] if value >= target), math.inf) for name in ("unpruned", "pruned")
    )
    goal = f"99 % of the unpruned run's final accuracy ({wording.percent(target)})"
    if math.isinf(pruned):
        return f"The pruned run did not reach {goal}; the unpruned run did after {wording.seconds(dense)}."
    after = [wording.seconds(value) for value in (pruned, dense)]
    text = f"The pruned run reached {goal} after {after[0]}, the unpruned run after {after[1]}"
    ratio = wording.comparison(dense, pruned, ("sooner", "later", False))
    return f"{text}." if ratio == wording.MISSING else f"{text}: {ratio}."
