"""Whether the machine was quiet enough to believe a measurement, and if not, why.

Comes in: the kernel's CPU times before and after each run, and what the runs themselves used. Goes out: reasons not to
trust the figures; none when there are none.

Source: Linux Documentation/filesystems/proc, /proc/stat. llama.cpp's threads spin at barriers: on two cores, one other
busy program makes generation tens of times slower.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fedspine_edge.profiling.sysfs import read_text

MAX_OTHERS_SHARE = 0.1
"""Of the machine's cores, what other programs may use."""

MAX_STEAL_SHARE = 0.02
"""Of the time, what the host of a virtual machine may take."""

MIN_CLOCK_KEPT = 0.9
"""Of the highest clock seen during the runs, what the lowest must reach."""

MAX_SPREAD = 0.05
"""Standard deviation over mean of the runs."""

MIN_SECONDS = 0.3
"""Shorter runs, all together, are within a few ticks of the kernel's CPU clock."""


@dataclass(frozen=True)
class CpuTimes:
    """Seconds of CPU since boot, over all cores: busy with programs, and stolen by the host."""

    busy: float
    stolen: float


@dataclass(frozen=True)
class Quiet:
    """What was seen of the machine during some runs.

    Attributes:
        seconds: Wall time of the runs together.
        cores: Cores of the machine.
        others_cores: Cores' worth of CPU that other programs used; None where unknown.
        steal_share: Share of the time the host took; None where unknown.
        clock_kept: Lowest over highest CPU clock during the runs; None without cpufreq.
        held_back: What throttled the board.
        spread: Standard deviation over mean of the runs; None for a single run.
    """

    seconds: float
    cores: int
    others_cores: float | None
    steal_share: float | None
    clock_kept: float | None
    held_back: tuple[str, ...]
    spread: float | None

    def reasons(self) -> tuple[str, ...]:
        """Returns why the figures are not to be trusted; empty when they are."""
        return tuple(reason for reason in (*self._from_outside(), *self._from_the_runs()) if reason)

    def _from_outside(self) -> tuple[str, ...]:
        others, steal = self.others_cores, self.steal_share
        limit = MAX_OTHERS_SHARE * self.cores
        return (
            ""
            if others is None or others <= limit
            else f"other programs used {others:.2f} of {self.cores} cores (limit {limit:.2f})",
            ""
            if steal is None or steal <= MAX_STEAL_SHARE
            else f"the host took {steal:.1%} of the CPU time (limit {MAX_STEAL_SHARE:.0%})",
            ""
            if self.clock_kept is None or self.clock_kept >= MIN_CLOCK_KEPT
            else f"the CPU clock fell to {self.clock_kept:.0%} of its highest (limit {MIN_CLOCK_KEPT:.0%})",
            f"the board was held back by {', '.join(self.held_back)}" if self.held_back else "",
        )

    def _from_the_runs(self) -> tuple[str, ...]:
        return (
            ""
            if self.spread is None or self.spread <= MAX_SPREAD
            else f"the runs differ by {self.spread:.1%} of their mean (limit {MAX_SPREAD:.0%})",
            ""
            if self.seconds >= MIN_SECONDS
            else f"the runs took {self.seconds:.2f} s together, too short to judge (from {MIN_SECONDS} s on)",
        )


def cpu_times(root: Path = Path("/")) -> CpuTimes | None:
    """Returns the CPU times so far; None where the kernel does not tell."""
    words = (read_text(root / "proc/stat") or "").partition("\n")[0].split()
    if len(words) < 9 or words[0] != "cpu" or not all(word.isdecimal() for word in words[1:9]):
        return None
    user, nice, system, _, _, irq, softirq, stolen = map(int, words[1:9])
    tick = 1 / os.sysconf("SC_CLK_TCK")
    return CpuTimes(tick * (user + nice + system + irq + softirq), tick * stolen)


@dataclass
class QuietWatch:
    """Adds up, run by run, what other programs and the host took.

    Attributes:
        cores: Cores of the machine.
    """

    cores: int
    seconds: float = 0.0
    busy: float = 0.0
    own: float = 0.0
    stolen: float = 0.0
    known: bool = True

    def add(self, before: CpuTimes | None, after: CpuTimes | None, *, seconds: float, own_seconds: float) -> None:
        """Takes a run: the CPU times around it, its wall time, and the CPU that it and its watcher used."""
        self.seconds += seconds
        self.own += own_seconds
        if before is None or after is None:
            self.known = False
            return
        self.busy += after.busy - before.busy
        self.stolen += after.stolen - before.stolen

    def quiet(self, *, clock_kept: float | None, held_back: tuple[str, ...], spread: float | None) -> Quiet:
        """Returns what was seen, with what others found out."""
        known = self.known and self.seconds >= MIN_SECONDS
        return Quiet(
            seconds=self.seconds,
            cores=self.cores,
            others_cores=max(0.0, self.busy - self.own) / self.seconds if known else None,
            steal_share=self.stolen / (self.seconds * self.cores) if known else None,
            clock_kept=clock_kept,
            held_back=held_back,
            spread=spread,
        )
