"""Charts as positions in per cent, for templates that draw them as SVG.

Comes in: a run's story. Goes out: lines, ticks and points with words. Colours and letters are the style sheet's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedspine_server.page import wording
from fedspine_server.page.story import Story

TIME_STEPS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 21600, 43200, 86400)
MOST_TICKS = 5
LEVELS = 9  # shades of a heat map


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis; `at` in per cent from the left or the top."""

    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    """One line: `path` for a polyline, `points` as (x, y, words), ticks of both axes."""

    name: str
    css: str
    path: str
    points: tuple[tuple[float, float, str], ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    last: str


def charts(story: Story, *, wall: bool) -> tuple[Chart, ...]:
    """Returns accuracy and loss against the run's clock, or against the wall's; empty where it was not noted."""
    times = list(story.wall) if wall else [float(record["virtual_end_seconds"]) for record in story.rounds]
    if not times or len(times) != len(story.rounds) or any(at is None for at in times):
        return ()
    known = [at for at in times if at is not None]
    found = []
    for name, css, shown in (("accuracy", "accuracy", "Accuracy"), ("loss_after", "loss", "Training loss")):
        points = [(index, known[index], value) for index, value in story.values(name)]
        if points:
            found.append(_chart(shown, css, points, known[-1]))
    return tuple(found)


def _chart(name: str, css: str, points: Sequence[tuple[int, float, float]], end: float) -> Chart:
    values = [value for _, _, value in points]
    ticks = value_ticks(min(values), max(values))
    low, high = ticks[0], ticks[-1]
    digits = max(0, -math.floor(math.log10((ticks[1] - ticks[0]) * (100 if css == "accuracy" else 1)) + 1e-9))

    def tell(value: float, more: int = 0) -> str:
        return wording.percent(value, digits + more) if css == "accuracy" else wording.number(value, digits + more)

    drawn = tuple(
        (
            round(100 * at / (end or 1.0), 2),
            round(100 * (high - value) / (high - low), 2),
            f"round {index + 1}, {wording.seconds(at)}: {tell(value, 1)}",
        )
        for index, at, value in points
    )
    path = " ".join(f"{x:g},{y:g}" for x, y, _ in drawn)
    y_ticks = tuple(Tick(round(100 * (high - value) / (high - low), 2), tell(value)) for value in ticks)
    return Chart(name, css, path, drawn, time_ticks(end), y_ticks, tell(values[-1], 1 if css == "accuracy" else 2))


def time_ticks(end: float) -> tuple[Tick, ...]:
    """Returns at most `MOST_TICKS` + 1 round times from 0 on an axis that ends at `end` seconds."""
    if end <= 0:
        return (Tick(0.0, "0"),)
    fitting = [step for step in TIME_STEPS if end / step <= MOST_TICKS]
    step = fitting[0] if fitting else 86400 * math.ceil(end / 86400 / MOST_TICKS)
    unit, name = (1, "s") if step < 60 else (60, "min") if step < 3600 else (3600, "h")
    return tuple(
        Tick(round(100 * i * step / end, 2), f"{i * step / unit:g} {name}" if i else "0")
        for i in range(math.floor(end / step) + 1)
    )


def value_ticks(low: float, high: float) -> tuple[float, ...]:
    """Returns round values that enclose [low, high] in a few steps of 1, 2 or 5 times a power of ten."""
    span = max(high - low, 1e-3 * max(1.0, abs(high)))
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(i * step for i in range(first, max(last, first + 1) + 1))


def runs_of_level(cells: Sequence[float]) -> tuple[tuple[float, float, int], ...]:
    """Returns (start, width, level) of equal neighbours, start and width in per cent; level 0 is gone, 8 is kept."""
    found: list[list[float]] = []
    for index, share in enumerate(cells):
        level = min(LEVELS - 1, round(share * (LEVELS - 1)))
        if found and found[-1][2] == level:
            found[-1][1] += 1
        else:
            found.append([index, 1, level])
    scale = 100 / len(cells) if cells else 0.0
    return tuple((round(start * scale, 3), round(width * scale, 3), int(level)) for start, width, level in found)
