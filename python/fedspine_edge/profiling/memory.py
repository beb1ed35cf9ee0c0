"""Memory of a process by phase: resident, proportional and anonymous bytes, now and at their peak.

Comes in: a process id. Goes out: `Memory`; a figure the kernel does not give is None. Weights mapped from a file count
in full as resident in every process that maps them; the proportional set (PSS) shares them out, and anonymous pages
are what cannot be dropped and read again.

Source: Linux Documentation/filesystems/proc, smaps_rollup and clear_refs.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
INTERVAL_SECONDS = 0.02
_LABELS = ("Rss:", "Pss:", "Anonymous:")


class Memory(NamedTuple):
    """Bytes of one process; None where the kernel does not say."""

    rss_bytes: int | None = None
    pss_bytes: int | None = None
    anonymous_bytes: int | None = None


def process_memory(pid: int, proc: Path = PROC) -> Memory:
    """Returns what a process holds now; all None once it has ended.

    The kernel walks every page for this and holds up the process's page faults: never during a timed run.
    """
    folder = proc / str(pid)
    sizes = _kibibytes(folder / "smaps_rollup")
    if "Rss:" in sizes:
        return Memory(*(sizes.get(label) for label in _LABELS))
    sizes = _kibibytes(folder / "status")
    return Memory(sizes.get("VmRSS:"), None, sizes.get("RssAnon:"))


def peak_rss_bytes(pid: int, proc: Path = PROC) -> int | None:
    """Returns the peak resident memory of a process since it began or was last reset."""
    return _kibibytes(proc / str(pid) / "status").get("VmHWM:")


def reset_peak_rss(pid: int, proc: Path = PROC) -> bool:
    """Makes the kernel forget a process's peak; returns whether it did, for some containers forbid it."""
    try:
        (proc / str(pid) / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


class PeakMemory:
    """The peak memory of a process within a `with` block, sampled from a thread.

    Args:
        pid: Process.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._exact = reset_peak_rss(pid)
        self._peak = Memory()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    @property
    def peak(self) -> Memory:
        """The largest figures so far; the resident one is the kernel's own peak where it could be reset."""
        exact = peak_rss_bytes(self._pid) if self._exact else None
        return highest(self._peak, Memory(exact))

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._take()

    def _watch(self) -> None:
        while not self._over.wait(INTERVAL_SECONDS):
            self._take()

    def _take(self) -> None:
        self._peak = highest(self._peak, process_memory(self._pid))


def highest(first: Memory, second: Memory) -> Memory:
    """Returns the larger of each figure; None only where both are."""
    return Memory(
        *(max((value for value in pair if value is not None), default=None) for pair in zip(first, second, strict=True))
    )


def _kibibytes(path: Path) -> dict[str, int]:
    """Returns the sizes a file lists in kB, in bytes by their label."""
    try:
        words = [line.split() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return {}
    return {parts[0]: 1024 * int(parts[1]) for parts in words if len(parts) == 3 and parts[1].isdecimal()}
