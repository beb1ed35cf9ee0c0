"""Power, clocks, temperature and throttling of the board while something runs, sampled from a thread.

Comes in: a sysfs ROOT. Goes out: a power trace, and what was seen within given stretches of time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fedspine_edge.profiling import clocks, thermal
from fedspine_edge.profiling.energy import PowerTrace
from fedspine_edge.profiling.power import Meter

INTERVAL_SECONDS = 0.1

Windows = Sequence[tuple[float, float]]


class _Sample(NamedTuple):
    seconds: float
    celsius: float | None
    clock_ratio: float | None
    held_back: tuple[str, ...] | None


@dataclass(frozen=True)
class Seen:
    """What was seen of the board within some runs; None where it has no such sensor.

    Attributes:
        celsius_max: Highest temperature of any zone.
        clock_ratio_min: Lowest CPU clock, over the most the hardware does.
        clock_kept: Lowest over highest CPU clock of the runs.
        held_back: What throttled it; empty for nothing.
    """

    celsius_max: float | None
    clock_ratio_min: float | None
    clock_kept: float | None
    held_back: tuple[str, ...] | None


class BoardWatch:
    """Samples a board in the background; a context manager.

    Args:
        meter: What to read power from; None for a board without.
        root: Root of sysfs and procfs.
        clock: Monotonic seconds, the same that the windows are in.
    """

    def __init__(
        self, meter: Meter | None, *, root: Path = Path("/"), clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.trace = None if meter is None else PowerTrace(meter.counts_joules)
        self._meter, self._root, self._clock = meter, root, clock
        self._samples: list[_Sample] = []
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="board-watch", daemon=True)

    def __enter__(self) -> BoardWatch:
        self.sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def sample(self) -> float:
        """Takes one sample of everything and returns its time; call it at the start and the end of each run."""
        with self._lock:
            before = self._clock()
            value = None if self._meter is None else self._meter.read()
            seconds = (before + self._clock()) / 2
            if self.trace is not None:
                self.trace.add(seconds, value)
            self._samples.append(
                _Sample(
                    seconds,
                    thermal.hottest(self._root),
                    clocks.cpu_clock_ratio(self._root),
                    thermal.held_back_by(self._root),
                )
            )
            return seconds

    def seen(self, windows: Windows) -> Seen:
        """Returns what was seen within stretches of time, their ends included."""
        inside = [s for s in self._samples if any(start <= s.seconds <= end for start, end in windows)]
        ratios = [sample.clock_ratio for sample in inside if sample.clock_ratio is not None]
        told = [sample.held_back for sample in inside if sample.held_back is not None]
        return Seen(
            celsius_max=max((s.celsius for s in inside if s.celsius is not None), default=None),
            clock_ratio_min=min(ratios, default=None),
            clock_kept=min(ratios) / max(ratios) if ratios else None,
            held_back=tuple(dict.fromkeys(name for names in told for name in names)) if told else None,
        )

    def _watch(self) -> None:
        while not self._over.wait(INTERVAL_SECONDS):
            self.sample()
