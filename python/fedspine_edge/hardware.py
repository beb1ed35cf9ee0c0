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


def available_memory_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Returns the memory a process can still get: the machine's, or its control group's where that is less."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):  # no such group, or `max`
        return available
    return min(available, max(0, limit - used))


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

    Every process's own pages, and the file pages of the largest: libraries and mapped weights are shared. (The kernel's
    exact figure, smaps_rollup, costs 25 ms a worker and holds up its page faults.)
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
            pages = [_pages(process.pid) for process in (root, *root.children(recursive=True))]
            own, shared = (sum(own for own, _ in pages), max(shared for _, shared in pages))
            self.peak_bytes = max(self.peak_bytes, (own + shared) * os.sysconf("SC_PAGE_SIZE"))
            if self._over.wait(self._interval):
                return


def _pages(pid: int) -> tuple[int, int]:
    """A process's own resident pages and its resident file pages; none once it has ended."""
    try:
        _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    except (OSError, ValueError):
        return 0, 0
    return resident - shared, shared
