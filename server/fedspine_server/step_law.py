"""How the time of a tuning step depends on pruning ratio and rank: one law for the simulator and a controller's prior.

Comes in: measured seconds of steps (`fedspine profile --train`), or a file with a law. Goes out: a `StepLaw`, its fit,
and how far it is off where it was not fitted.

Source: docs/algorithm.md, sections 7 and 10; the features are those of `controllers.timing`.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedspine_edge.errors import UsageError

FORMAT = 1
REFERENCE_RANK = 16
MAX_FILE_BYTES = 1 << 20


class StepTime(NamedTuple):
    """What a step took: seconds at a pruning ratio and a rank."""

    pruning_ratio: float
    rank: int
    seconds: float


@dataclass(frozen=True)
class StepLaw:
    """constant + kept (1 - p) + lora r / 16, in any unit: what counts is how one arm stands to another.

    Attributes:
        constant: What neither pruning nor a lower rank saves.
        kept: What pruning removes in proportion.
        lora: What LoRA of rank 16 costs.
    """

    constant: float
    kept: float
    lora: float

    def __post_init__(self) -> None:
        parts = (self.constant, self.kept, self.lora)
        if not all(math.isfinite(part) and part >= 0 for part in parts) or self.work(0.0, REFERENCE_RANK) <= 0:
            raise ValueError(f"expected parts of a step that are not negative, found {list(parts)}")

    def work(self, pruning_ratio: float, rank: float) -> float:
        """Returns the time of a step."""
        return self.constant + self.kept * (1 - pruning_ratio) + self.lora * rank / REFERENCE_RANK

    def relative(self) -> StepLaw:
        """Returns the law in units of an unpruned step at rank 16."""
        whole = self.work(0.0, REFERENCE_RANK)
        return StepLaw(self.constant / whole, self.kept / whole, self.lora / whole)

    def errors(self, times: Sequence[StepTime]) -> list[float]:
        """Returns how far the law is off at each time, as a share of it; the law's unit must be seconds."""
        return [abs(self.work(t.pruning_ratio, t.rank) / t.seconds - 1) for t in times]


def fit(times: Sequence[StepTime]) -> StepLaw:
    """Returns the law, in seconds, with the least squared relative errors and no negative part.

    Raises:
        ValueError: There are fewer than three times, or not two ratios and two ranks among them.
    """
    if len({t.pruning_ratio for t in times}) < 2 or len({t.rank for t in times}) < 2 or len(times) < 3:
        raise ValueError("expected times at two pruning ratios and two ranks or more to fit a law to")
    seconds = np.array([t.seconds for t in times])
    features = np.array([[1.0, 1 - t.pruning_ratio, t.rank / REFERENCE_RANK] for t in times]) / seconds[:, None]
    best: tuple[float, np.ndarray] | None = None
    # The best law without negative parts is an unconstrained one over some of the parts: seven to try.
    for parts in itertools.chain.from_iterable(itertools.combinations(range(3), count) for count in (1, 2, 3)):
        found = np.zeros(3)
        found[list(parts)] = np.linalg.lstsq(features[:, parts], np.ones(len(times)), rcond=None)[0]
        loss = float(((features @ found - 1) ** 2).sum())
        if (found >= 0).all() and (best is None or loss < best[0]):
            best = loss, found
    assert best is not None  # the constant alone is never negative
    return StepLaw(*map(float, best[1]))


def median_error(law: StepLaw, times: Sequence[StepTime]) -> float | None:
    """Returns the median of the law's relative errors; None without times."""
    return statistics.median(law.errors(times)) if times else None


def document(law: StepLaw, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a law as its file holds it: relative parts, their seconds, and what was measured."""
    relative = law.relative()
    parts = {"constant": relative.constant, "kept": relative.kept, "lora": relative.lora}
    return {"format": FORMAT, "law": parts, "step_seconds": law.work(0.0, REFERENCE_RANK), **facts}


def read(path: Path) -> StepLaw:
    """Returns the law of a file.

    Raises:
        UsageError: There is no such file, or it holds no law that this version reads.
    """
    remedy = "write one with: fedspine profile MODEL --train --law FILE"
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(MAX_FILE_BYTES))
    except OSError as error:
        raise UsageError(f"expected a step-time law at {path}, found {error.strerror}", hint=remedy) from error
    except ValueError as error:
        raise UsageError(f"expected JSON in {path}, found something else", hint=remedy) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError(f"expected a step-time law of format {FORMAT} in {path}, found none", hint=remedy)
    try:
        parts = content["law"]
        return StepLaw(float(parts["constant"]), float(parts["kept"]), float(parts["lora"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"expected constant, kept and lora of a law in {path}, found {error}", hint=remedy) from error
