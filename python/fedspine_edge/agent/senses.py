"""What the board is and how it feels: facts for the server at hello, samples with every report.

Comes in: a filesystem ROOT. Goes out: plain values for JSON; what cannot be read is None, never 0.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from fedspine_edge.agent.running_release import running_release
from fedspine_edge.hardware import this_machine
from fedspine_edge.profiling import thermal
from fedspine_edge.profiling.board import power_mode, this_board
from fedspine_edge.profiling.clocks import cpu_clock_ratio
from fedspine_edge.profiling.memory import process_memory
from fedspine_edge.profiling.power import Meter, find_meter

LONGEST_WORDS = 200


class Senses:
    """One board's sensors.

    Args:
        state: A directory of the device, whose disk is watched.
        root: Root of sysfs and procfs.
    """

    def __init__(self, state: Path, root: Path = Path("/")) -> None:
        self._state = state
        self._root = root
        self._meter: Meter | None = find_meter(root)

    def facts(self) -> dict[str, Any]:
        """Returns what the board is."""
        board, machine = this_board(self._root), this_machine(self._root / "proc")
        found = {
            **{name: value for name, value in asdict(board).items() if name != "model"},
            "board": board.model,
            "cpu": machine.cpu,
            "cores": machine.cores,
            "memory_bytes": machine.memory_bytes,
            "disk_free_bytes": self.disk_free_bytes(),
            "power_source": self._meter.source if self._meter else None,
            "machine": platform.machine(),
            "kernel": platform.release(),
            "python": platform.python_version(),
            "version": importlib.metadata.version("fedspine-edge"),
            **running_release(self._root),
        }
        return {name: _words(value) for name, value in found.items()}

    def sample(self, worker_pid: int | None = None) -> dict[str, Any]:
        """Returns what the sensors say now, and what the worker holds."""
        reading = self._meter.read() if self._meter else None
        counts_joules = self._meter is not None and self._meter.counts_joules
        throttled = thermal.held_back_by(self._root)
        return {
            "temperature_celsius": thermal.hottest(self._root),
            "power_watts": None if counts_joules else reading,
            "energy_joules": reading if counts_joules else None,
            "power_mode": _words(power_mode(self._root)),
            "clock_ratio": cpu_clock_ratio(self._root),
            "throttled_by": None if throttled is None else [_words(name) for name in throttled],
            "memory_available_bytes": self.memory_available_bytes(),
            "worker_rss_bytes": process_memory(worker_pid).rss_bytes if worker_pid else None,
            "disk_free_bytes": self.disk_free_bytes(),
        }

    def celsius(self) -> float | None:
        """Returns the hottest zone's temperature."""
        return thermal.hottest(self._root)

    def memory_available_bytes(self) -> int:
        """Returns the memory that can be had without swapping."""
        return int(psutil.virtual_memory().available)

    def disk_free_bytes(self) -> int:
        """Returns what is free where the device keeps its state."""
        return shutil.disk_usage(self._state).free


def total_memory_bytes() -> int:
    """Returns the memory of this board."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _words(value: Any) -> Any:
    """Text out of firmware may hold anything; the server takes printable lines."""
    if isinstance(value, str):
        return "".join(c for c in value[:LONGEST_WORDS] if c.isprintable())
    return [_words(entry) for entry in value] if isinstance(value, (list, tuple)) else value
