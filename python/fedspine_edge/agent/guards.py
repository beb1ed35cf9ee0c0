"""Whether this board can take a task just now, and whether it must rest.

Comes in: limits and what the sensors say. Goes out: a reason in words, or None. A silent sensor stops nothing.
"""

from __future__ import annotations

from fedspine_edge.agent.settings import AgentSettings

COOLING_CELSIUS = 5.0
COPIES = 3  # a message lies on disk packed, as the update and as what is remembered of it


def refusal(
    settings: AgentSettings, *, message_bytes: int, memory_available_bytes: int, disk_free_bytes: int
) -> str | None:
    """Returns why a task cannot be taken, None when it can.

    Args:
        settings: The device's limits.
        message_bytes: Size of the task's message.
        memory_available_bytes: Memory that is free.
        disk_free_bytes: Disk that is free.
    """
    needed = settings.min_disk_bytes + COPIES * message_bytes
    if disk_free_bytes < needed:
        return f"expected {needed} bytes free on disk, found {disk_free_bytes}"
    needed = settings.min_memory_bytes + message_bytes
    if memory_available_bytes < needed:
        return f"expected {needed} bytes of memory free, found {memory_available_bytes}"
    return None


def rest(settings: AgentSettings, celsius: float | None, *, resting: bool) -> str | None:
    """Returns why work must pause, None when it may go on; a pause ends only some degrees lower."""
    limit = settings.max_celsius - (COOLING_CELSIUS if resting else 0.0)
    return f"{celsius:.0f} degrees, above {limit:.0f}" if celsius is not None and celsius > limit else None
