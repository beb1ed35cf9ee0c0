"""Gates such as `itl_p95_ms>120`: a figure that must not be so, for a build that fails when a model got slower.

Comes in: the words of `--fail-if`. Goes out: what was measured where a gate is hit, each in one line.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedspine_edge.errors import UsageError

_OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@dataclass(frozen=True)
class Gate:
    """A condition under which a profile fails.

    Attributes:
        figure: Name of a figure.
        sign: `<`, `<=`, `>` or `>=`.
        limit: What it is compared with.
    """

    figure: str
    sign: str
    limit: float

    def __str__(self) -> str:
        return f"{self.figure}{self.sign}{self.limit:g}"

    def hit(self, value: float) -> bool:
        """Returns whether a value fails; one that is not a number does."""
        return math.isnan(value) or bool(_OPERATORS[self.sign](value, self.limit))


def parse_gate(text: str, names: Sequence[str]) -> Gate:
    """Returns the gate a text states.

    Args:
        text: FIGURE, sign and number, e.g. `itl_p95_ms>120`.
        names: The figures there are.

    Raises:
        UsageError: It is not such a condition, or there is no such figure.
    """
    found = re.fullmatch(r"\s*(\w+)\s*(<=|>=|<|>)\s*(\S+)\s*", text)
    try:
        limit = float(found[3]) if found else math.nan
    except ValueError:
        limit = math.nan
    if found is None or not math.isfinite(limit):
        raise UsageError(
            f"expected a gate such as itl_p95_ms>120, found {text!r}", hint="quote it: --fail-if 'itl_p95_ms>120'"
        )
    if found[1] not in names:
        raise UsageError(f"expected a figure that is measured, found {found[1]!r}", hint=f"take {', '.join(names)}")
    return Gate(found[1], found[2], limit)


def failures(gate: Gate, figures: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """Returns what was measured where a gate is hit, and that nothing was where no row has the figure.

    Args:
        gate: The condition.
        figures: Figures by name, of each row by what to call the row.
    """
    measured = {row: value for row, values in figures.items() if (value := values.get(gate.figure)) is not None}
    if not measured:
        return [f"{gate.figure} was not measured, so {gate} cannot be ruled out"]
    return [f"{row}: {gate.figure} is {value:.4g} ({gate})" for row, value in measured.items() if gate.hit(value)]
