"""What an aggregation rule works on: one matrix, the old global factors, and what each device trained of it.

Comes in: nothing. Goes out: the types every rule shares. A rule sees full-size factors: rows of B and columns of A that
a device did not keep are zero, and `keep_out` / `keep_in` say which those are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Factors:
    """The global LoRA pair of one matrix.

    Attributes:
        lora_a: float32 [r_max, in].
        lora_b: float32 [out, r_max]; components are sorted, the first r are the best of rank r.
    """

    lora_a: np.ndarray
    lora_b: np.ndarray


@dataclass(frozen=True)
class Contribution:
    """One device's LoRA pair of one matrix, in the unpruned matrix's numbering.

    Attributes:
        device_id: Which device.
        weight: Its weight, > 0; weights of a round need not sum to 1.
        lora_a: float64 [r, in], zero in columns not kept.
        lora_b: float64 [out, r], zero in rows not kept.
        keep_out: Which rows the device kept, bool [out]; None for all.
        keep_in: Which columns, bool [in]; None for all.
    """

    device_id: str
    weight: float
    lora_a: np.ndarray
    lora_b: np.ndarray
    keep_out: np.ndarray | None = None
    keep_in: np.ndarray | None = None

    @property
    def rank(self) -> int:
        """The device's LoRA rank."""
        return int(self.lora_a.shape[0])


@dataclass(frozen=True)
class RoundFacts:
    """What a rule must know beyond the factors.

    Attributes:
        drop_uncovered: Whether rows and columns that no device kept are gone for good (cool-down): then they become
            zero, and the global rank is spent on what is left. Else they keep their old values: a device that pruned
            them said nothing about them, and a later round may bring them back.
        generator: Randomness of this matrix in this round, for components that have died.
    """

    drop_uncovered: bool
    generator: np.random.Generator


Rule = Callable[[Factors, Sequence[Contribution], RoundFacts], Factors]


def covered(contributions: Sequence[Contribution], side: str, features: int) -> np.ndarray:
    """Returns which rows (`side` = `out`) or columns (`in`) at least one device kept, bool [features]."""
    result = np.zeros(features, dtype=bool)
    for contribution in contributions:
        keep = contribution.keep_out if side == "out" else contribution.keep_in
        result |= True if keep is None else keep
    return result
