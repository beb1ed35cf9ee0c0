"""Dropout of the low-rank values of LoRA layers, from a generator that keeps no state but a counter.

Comes in: a rate and a seed. Goes out: for each forward call of a layer, a `Dropout` whose mask its backward draws again
instead of storing it. peft drops elements of a layer's input; this drops elements of x A^T, rank of them a token in the
place of in_features.

Source: Srivastava et al., Dropout (JMLR 2014); Salmon et al., Parallel random numbers (SC 2011), for Philox.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dropout:
    """The mask of one forward call: a function of place and key.

    Attributes:
        rate: Share of the values that becomes 0, in [0, 1); the others are divided by 1 - rate.
        key: 64 bits.
    """

    rate: float
    key: int

    @property
    def threshold(self) -> int:
        """A value goes when its random 32-bit word is below this."""
        return round(self.rate * 2**32)


@dataclass
class DropoutStream:
    """Dropouts of one rate, a new one for each call; the same again from the same seed.

    Attributes:
        rate: Share of the values that becomes 0, in [0, 1).
        seed: Its lower 32 bits count.
        num_calls: Dropouts handed out.
    """

    rate: float
    seed: int
    num_calls: int = 0

    def next(self) -> Dropout:
        """Returns the dropout of the next call."""
        key = self.seed % 2**32 | self.num_calls % 2**32 << 32
        self.num_calls += 1
        return Dropout(self.rate, key)
