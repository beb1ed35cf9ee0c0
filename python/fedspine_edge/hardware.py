"""Facts of the machine this runs on, read from /proc.

Comes in: nothing. Goes out: the CPU's name, cores, memory, and the peak memory of this process.
"""

from __future__ import annotations

import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Machine:
    """What a report says of the machine it was made on.

    Attributes:
        cpu: The processor's name, `unknown` where the kernel does not say.
        cores: Cores this process may use.
        memory_bytes: Memory of the machine.
    """

    cpu: str
    cores: int
    memory_bytes: int


def this_machine(proc: Path = Path("/proc")) -> Machine:
    """Returns the facts of this machine."""
    try:
        text = (proc / "cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    return Machine(found[1].strip() if found else "unknown", usable_cores(), psutil.virtual_memory().total)


def usable_cores() -> int:
    """Returns the cores this process may run on."""
    return len(os.sched_getaffinity(0))


def reset_peak_memory() -> None:
    """Makes the kernel forget this process's peak memory, so that the next reading is of what follows."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        # Some containers forbid it; the peak is then that of the whole life of the process, an upper bound.
        return


def peak_memory_bytes() -> int:
    """Returns the peak resident memory of this process since the last reset."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else psutil.Process().memory_info().rss


class MemoryWatch:
    """The peak memory of this process and all its children together, sampled from a thread; a context manager.

    Proportional resident memory: pages that processes share (the libraries, a mapped file) count once in all.
    """

    def __init__(self, interval_seconds: float = 0.5) -> None:
        self.peak_bytes = 0
        self._interval = interval_seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        root = psutil.Process()
        while True:
            total = sum(resident_bytes(process.pid) for process in (root, *root.children(recursive=True)))
            self.peak_bytes = max(self.peak_bytes, total)
            if self._over.wait(self._interval):
                return


def resident_bytes(pid: int) -> int:
    """Returns the proportional resident memory of a process; 0 once it has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
