"""What a device was told when it joined: its model, its data, its limits.

Comes in: `agent.json` in the state directory. Goes out: `AgentSettings`. The defaults stand here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from fedspine_edge.atomic import write_bytes
from fedspine_edge.errors import UsageError

SETTINGS_FILE = "agent.json"
MIB = 1 << 20


@dataclass(frozen=True)
class AgentSettings:
    """How a device works.

    Attributes:
        model: The base model: a packaged name, a directory or a GGUF file.
        data: The device's own examples: `trec6`, or a .jsonl or .csv file.
        memory_bytes: Memory that tuning may take; None takes what the board has.
        threads: Threads of the worker; None takes every core.
        min_memory_bytes: A task is refused with less memory free.
        min_disk_bytes: A task is refused when it would leave less of the disk.
        max_celsius: Work pauses above this temperature, and goes on `COOLING_CELSIUS` below it.
        worker_idle_seconds: A worker without work for so long gives its memory back.
        slow_down: How many times slower than it is the device works: emulates a slower board.
    """

    model: str
    data: str
    memory_bytes: int | None = None
    threads: int | None = None
    min_memory_bytes: int = 128 * MIB
    min_disk_bytes: int = 64 * MIB
    max_celsius: float = 95.0
    worker_idle_seconds: float = 900.0
    slow_down: float = 1.0

    def __post_init__(self) -> None:
        if self.slow_down < 1:
            raise UsageError(f"expected a slow-down of at least 1, found {self.slow_down}")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"expected at least 1 thread, found {self.threads}")


def save_settings(state: Path, settings: AgentSettings) -> None:
    """Keeps a device's settings."""
    write_bytes(state / SETTINGS_FILE, (json.dumps(dataclasses.asdict(settings), indent=2) + "\n").encode())


def load_settings(state: Path) -> AgentSettings:
    """Returns a device's settings.

    Raises:
        UsageError: There are none, or they are not settings.
    """
    file = state / SETTINGS_FILE
    try:
        return AgentSettings(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"expected this device's settings in {file}, found: {error}", hint="join first: fedspine join URL --token T"
        ) from error
