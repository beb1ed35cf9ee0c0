"""The gate of a model rollout: what must hold on a device before it keeps a new model.

Comes in: words such as `ppl<=1.05*base and tokens_per_second>=8`. Goes out: conditions, and which of them measured
figures do not meet. Server and device judge by this one module; nothing here is evaluated as code.

    gate       =  condition { "and" condition }        (no words at all: the model has to run, no more)
    condition  =  figure sign limit
    figure     =  "ppl" | "tokens_per_second" | "prompt_tokens_per_second"
    sign       =  "<=" | ">=" | "<" | ">"
    limit      =  number | number "*" "base" | "base"  (base: the same figure of the device's present model)
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedspine_edge.errors import UsageError

FIGURES = ("ppl", "tokens_per_second", "prompt_tokens_per_second")
MOST_CONDITIONS, MOST_CHARACTERS = 8, 400
_SIGNS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_CONDITION = re.compile(
    r"\s*([a-z_]+)\s*(<=|>=|<|>)\s*(?:([0-9]+(?:\.[0-9]+)?)(?:\s*\*\s*(base))?|(base))\s*", re.ASCII
)


@dataclass(frozen=True)
class Condition:
    """One condition.

    Attributes:
        figure: One of `FIGURES`.
        sign: `<`, `<=`, `>` or `>=`.
        limit: What it is compared with: a figure, or times `base`.
        of_base: Whether the limit is a multiple of what the present model does.
    """

    figure: str
    sign: str
    limit: float
    of_base: bool

    def __post_init__(self) -> None:
        known = self.figure in FIGURES and self.sign in _SIGNS and isinstance(self.of_base, bool)
        number = isinstance(self.limit, (int, float)) and not isinstance(self.limit, bool)
        if not (known and number and math.isfinite(self.limit) and self.limit > 0):
            raise UsageError(f"expected figure, sign and limit of a gate, found {asdict(self)}"[:200])

    def __str__(self) -> str:
        return f"{self.figure}{self.sign}{self.limit:g}{'*base' if self.of_base else ''}"


def parse(text: str) -> tuple[Condition, ...]:
    """Returns the conditions a text states; none for an empty one.

    Raises:
        UsageError: It is no gate.
    """
    if len(text) > MOST_CHARACTERS:
        raise UsageError(f"expected a gate of at most {MOST_CHARACTERS} characters, found {len(text)}")
    parts = re.split(r"\band\b", text) if text.strip() else []
    if len(parts) > MOST_CONDITIONS:
        raise UsageError(f"expected at most {MOST_CONDITIONS} conditions, found {len(parts)}")
    return tuple(_condition(part) for part in parts)


def _condition(text: str) -> Condition:
    found = _CONDITION.fullmatch(text)
    if found is None or found[1] not in FIGURES:
        raise UsageError(
            f"expected a condition such as ppl<=1.05*base, found {text.strip()!r:.80}",
            hint=f"figures are {', '.join(FIGURES)}; conditions are joined by `and`",
        )
    return Condition(found[1], found[2], float(found[3] or 1.0), of_base=bool(found[4] or found[5]))


def from_json(document: Any) -> tuple[Condition, ...]:
    """Returns the conditions in a JSON document.

    Raises:
        UsageError: They are none.
    """
    if not isinstance(document, list) or len(document) > MOST_CONDITIONS:
        raise UsageError(f"expected a list of at most {MOST_CONDITIONS} conditions, found {document!r:.80}")
    try:
        return tuple(Condition(**entry) for entry in document)
    except TypeError as error:
        raise UsageError(f"expected figure, sign, limit and of_base, found {document!r:.80}") from error


def to_json(conditions: Sequence[Condition]) -> list[dict[str, Any]]:
    """Returns conditions as a JSON document."""
    return [asdict(condition) for condition in conditions]


def unmet(conditions: Sequence[Condition], figures: Mapping[str, Any], base: Mapping[str, Any] | None) -> str | None:
    """Returns what does not hold, in words; None when all of it does.

    Args:
        conditions: The gate.
        figures: What the new model does, by `FIGURES`; None or missing where it was not measured.
        base: What the present model does; None where there is none.
    """
    return next((said for condition in conditions if (said := _unmet(condition, figures, base))), None)


def _unmet(condition: Condition, figures: Mapping[str, Any], base: Mapping[str, Any] | None) -> str | None:
    value, limit = figures.get(condition.figure), condition.limit
    if value is None:
        return f"{condition} cannot be judged: {condition.figure} was not measured"
    if condition.of_base:
        before = None if base is None else base.get(condition.figure)
        if before is None:
            return f"{condition} cannot be judged: the device has no model to compare with"
        limit *= before
    # One that is not a number meets nothing.
    return None if _SIGNS[condition.sign](value, limit) else f"{condition}: {value:.4g}, limit {limit:.4g}"
