"""What an aggregation rule works on: one matrix, the old global factors, and what each device trained of it.

Comes in: nothing. Goes out: the types every rule shares. A rule sees full-size factors: rows of B and columns of A that
a device did not keep are zero, and `keep_out` / `keep_in` say which those are. Weights, ranks and masks are at hand for
all devices at once; factors are read one device after the other and let go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Factors:
    """The global LoRA pair of one matrix.

    Attributes:
        lora_a: float32 [r_max, in].
        lora_b: float32 [out, r_max]; components are sorted, the first r are the best of rank r.
    """

    lora_a: np.ndarray
    lora_b: np.ndarray

    def wide(self) -> Pair:
        """Returns copies of A and B, float64."""
        return self.lora_a.astype(np.float64), self.lora_b.astype(np.float64)


@dataclass(frozen=True)
class Contribution:
    """One device's LoRA pair of one matrix, in the unpruned matrix's numbering.

    Attributes:
        device_id: Which device.
        weight: Its weight, > 0; weights of a round need not sum to 1.
        rank: Its LoRA rank r.
        read: Gives A, float64 [r, in], zero in columns not kept, and B, float64 [out, r], zero in rows not kept.
        keep_out: Which rows the device kept, bool [out]; None for all.
        keep_in: Which columns, bool [in]; None for all.
    """

    device_id: str
    weight: float
    rank: int
    read: Callable[[], Pair] = field(repr=False)
    keep_out: np.ndarray | None = None
    keep_in: np.ndarray | None = None

    def read_over(self, old_a: np.ndarray, old_b: np.ndarray) -> Pair:
        """Returns A and B with the old global values where the device kept nothing, as FedMP recovers residuals."""
        lora_a, lora_b = self.read()
        if self.keep_in is not None:
            lora_a = np.where(self.keep_in, lora_a, old_a[: self.rank])
        if self.keep_out is not None:
            lora_b = np.where(self.keep_out[:, None], lora_b, old_b[:, : self.rank])
        return lora_a, lora_b

    def kept_of(self, old_a: np.ndarray, old_b: np.ndarray) -> Pair:
        """Returns the old global factors as the device was given them: at its rank, zero where it kept nothing."""
        lora_a, lora_b = old_a[: self.rank], old_b[:, : self.rank]
        lora_a = lora_a if self.keep_in is None else lora_a * self.keep_in
        return lora_a, lora_b if self.keep_out is None else lora_b * self.keep_out[:, None]


@dataclass(frozen=True)
class RoundFacts:
    """What a rule must know beyond the factors.

    Attributes:
        drop_uncovered: Whether rows and columns that no device kept are gone for good (cool-down): then they become
            zero, and the global rank is spent on what is left. Else they keep their old values: a device that pruned
            them said nothing about them, and a later round may bring them back.
        generator: Randomness of this matrix in this round, for components that have died.
        trim_share: Share of the devices that `trimmed-mean` leaves out at either end.
    """

    drop_uncovered: bool
    generator: np.random.Generator
    trim_share: float = 0.25


Rule = Callable[[Factors, Sequence[Contribution], RoundFacts], Factors]


def in_order(contributions: Sequence[Contribution]) -> list[Contribution]:
    """Returns the contributions sorted by device, so that the order of arrival changes nothing."""
    return sorted(contributions, key=lambda contribution: contribution.device_id)


def covered(contributions: Sequence[Contribution], side: str, features: int) -> np.ndarray:
    """Returns which rows (`side` = `out`) or columns (`in`) at least one device kept, bool [features]."""
    result = np.zeros(features, dtype=bool)
    for contribution in contributions:
        keep = contribution.keep_out if side == "out" else contribution.keep_in
        result |= True if keep is None else keep
    return result


def remaining(old: Factors, contributions: Sequence[Contribution], facts: RoundFacts) -> Pair:
    """Returns the old A and B, float64, zero where they are gone for good."""
    old_a, old_b = old.wide()
    if facts.drop_uncovered:
        old_a *= covered(contributions, "in", old_a.shape[1])
        old_b *= covered(contributions, "out", old_b.shape[0])[:, None]
    return old_a, old_b
