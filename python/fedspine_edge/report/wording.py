"""Numbers as people read them: seconds, bytes, shares, ratios; the same value always in the same words.

In: plain numbers, None or NaN where nothing was measured. Out: short strings; `-` stands for not measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

MISSING = "–"


def seconds(value: float | None) -> str:
    """Returns a duration: `0.42 s`, `7.5 s`, `2 min 05 s`, `3 h 07 min`, `2 d 4 h`."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value < 60:
        digits = 2 if value < 1 else 1
        text = f"{value:.{digits}f}"
        return "1 min 00 s" if text == "60.0" else f"{text} s"
    whole = round(value)
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(value / 60), 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(round(value / 3600), 24)
    return f"{days} d {hours} h"


def data_size(value: float | None) -> str:
    """Returns a number of bytes in powers of 1000: `812 B`, `4.1 kB`, `23 MB`, `1.25 GB`, `8 GB`."""
    return MISSING if value is None else _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def amount(value: float) -> str:
    """Returns a large count: `950`, `4.1 k`, `134 M`, `6.74 G`."""
    return _scaled(value, ("", "k", "M", "G", "T")).strip()


def _scaled(value: float, units: Sequence[str]) -> str:
    index = 0
    while abs(value) >= 999.5 and index < len(units) - 1:
        value, index = value / 1000, index + 1
    digits = 0 if index == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{round(value, digits):g} {units[index]}"


def percent(share: float | None, digits: int = 1) -> str:
    """Returns a share of 1 as `81.2 %`."""
    return MISSING if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f} %"


def points(difference: float) -> str:
    """Returns the difference of two shares of 1 in percentage points, signed: `+0.4 points`."""
    rounded = round(100 * difference, 1)
    return "±0.0 points" if rounded == 0 else f"{rounded:+.1f} points".replace("-", "−")


def number(value: float | None, digits: int = 3) -> str:
    """Returns a plain number with that many decimals."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def rate(value: float) -> str:
    """Returns a rate with three or more digits: `592`, `42.4`."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}"


def small(value: float | None) -> str:
    """Returns a number of any magnitude with two significant digits: `0.0031`, `2.4e-07`."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:.2g}"


def times(value: float | None) -> str:
    """Returns a ratio: `1.42×`."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:.2f}×"


def comparison(dense: float | None, pruned: float | None, words: tuple[str, str, bool]) -> str:
    """Returns how pruned stands against dense, in a word: `1.42× faster`.

    Args:
        dense: The unpruned model's value.
        pruned: The pruned model's value.
        words: Word when it is better, word when it is worse, whether more is better.
    """
    if not dense or not pruned:
        return MISSING
    better, worse, more_is_better = words
    gain = pruned / dense if more_is_better else dense / pruned
    if 0.995 < gain < 1.005:
        return "the same"
    return f"{times(gain)} {better}" if gain > 1 else f"{times(1 / gain)} {worse}"


def plural(count: int, noun: str) -> str:
    """Returns `1 round`, `8 rounds`, with thin groups of three digits in large counts."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}".replace(",", " ")


def half_width(share: float, num_examples: int) -> float:
    """Returns the half width of the 95 % interval of a share measured on that many examples (normal approximation)."""
    return 1.96 * math.sqrt(share * (1 - share) / num_examples) if num_examples else 0.0
