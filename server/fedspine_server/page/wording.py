"""Numbers as an operator reads them; the same words as in the report of a run.

Comes in: plain numbers, None where nothing was measured. Goes out: short strings; a dash stands for not measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from fedspine_edge.rollout_gate import Condition

MISSING = "–"
MINUTE, HOUR, DAY = 60, 3600, 86400


def seconds(value: float | None) -> str:
    """Returns a duration: `0.42 s`, `7.5 s`, `48 s`, `2 min 05 s`, `3 h 07 min`, `2 d 4 h`."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value < MINUTE - 0.5:
        return f"{value:.2f} s" if value < 1 else f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    whole = round(value)
    if whole < HOUR:
        return f"{whole // MINUTE} min {whole % MINUTE:02d} s"
    minutes = round(value / MINUTE)
    if value < 2 * DAY:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(value / HOUR)
    return f"{hours // 24} d {hours % 24} h"


def data_size(value: float | None) -> str:
    """Returns a number of bytes in powers of 1000: `812 B`, `4.1 kB`, `23 MB`, `1.25 GB`."""
    if value is None or not math.isfinite(value):
        return MISSING
    units = ("B", "kB", "MB", "GB", "TB")
    index = 0
    while abs(value) >= 999.5 and index < len(units) - 1:
        value, index = value / 1000, index + 1
    digits = 0 if index == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{round(value, digits):g} {units[index]}"


def percent(share: float | None, digits: int = 0) -> str:
    """Returns a share of 1 as `81 %`."""
    return MISSING if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f} %"


def number(value: float | None, digits: int = 2) -> str:
    """Returns a plain number."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def unit(value: float | None, name: str, digits: int = 0) -> str:
    """Returns a number with its unit: `61 °C`."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:.{digits}f} {name}"


def board(name: str) -> str:
    """Returns what a board calls itself without its maker, who makes them all."""
    return name.removeprefix("NVIDIA ") or "unknown board"


def plural(count: int, noun: str) -> str:
    """Returns `1 round`, `8 rounds`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}".replace(",", " ")


def names(found: list[str], most: int = 3) -> str:
    """Returns the first few of several names, and how many more there are."""
    told = ", ".join(found[:most])
    return f"{told} and {len(found) - most} more" if len(found) > most else told


FIGURES = {
    "ppl": "perplexity",
    "tokens_per_second": "generated tokens per second",
    "prompt_tokens_per_second": "prompt tokens per second",
}
SIGNS = {"<=": "at most", ">=": "at least", "<": "below", ">": "above"}


def condition(found: Condition) -> str:
    """Returns a condition of a gate as a phrase: `perplexity at most 1.05 times that of its present model`."""
    limit = f"{found.limit:g}" if not found.of_base else f"{found.limit:g} times that of its present model"
    return f"{FIGURES[found.figure]} {SIGNS[found.sign]} {limit}"


def figure(value: float | None) -> str:
    """Returns a measured figure with three digits that mean something."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def counts(found: Mapping[str, int]) -> str:
    """Returns how many devices are in each state: `12 committed, 1 failed`."""
    return ", ".join(f"{count} {state.replace('_', ' ')}" for state, count in sorted(found.items())) or MISSING
