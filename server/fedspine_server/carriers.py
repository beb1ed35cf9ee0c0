"""What a run needs of whatever carries its messages, when the coordinator itself holds the rounds.

A carrier offers assignments to devices and says what became of them; it may lose any of them, and need not say so.
There is no event of a device's progress: Flower carries one reply a message. The HTTPS link, which has it, is no such
object: its rounds live in a database, so that several processes can hold them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fedspine_edge.protocol import Assignment, Update


@dataclass(frozen=True)
class Inventory:
    """What a device has.

    Attributes:
        num_examples: Examples it trains on.
        memory_bytes: Memory that tuning may take.
        base_sha256: Hash of its base model.
        facts: What its board says of itself.
    """

    num_examples: int
    memory_bytes: int
    base_sha256: str
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Joined:
    """A device can be reached, or again: what it was sent before is lost, what it finished is not.

    Attributes:
        device_id: Which.
    """

    device_id: str


@dataclass(frozen=True)
class Left:
    """A device can no longer be reached.

    Attributes:
        device_id: Which.
    """

    device_id: str


@dataclass(frozen=True)
class Result:
    """An update came back.

    Attributes:
        device_id: Whose.
        round_index: The round it answers.
        update: What came back.
        seconds: From the offer to its arrival.
    """

    device_id: str
    round_index: int
    update: Update
    seconds: float


@dataclass(frozen=True)
class Failed:
    """An assignment will not be answered.

    Attributes:
        device_id: Whose.
        round_index: The round of the assignment.
        reason: Why, in words.
    """

    device_id: str
    round_index: int
    reason: str


Event = Joined | Left | Result | Failed


class Carrier(Protocol):
    """Carries messages between the coordinator and devices."""

    def inventory(self) -> Mapping[str, Inventory]:
        """Returns what is known of the devices that can be reached now."""

    def offer(self, assignments: Sequence[Assignment]) -> None:
        """Sends each device what it is asked, in the place of what it was sent for that round; returns at once."""

    def cancel(self, device_id: str, round_index: int) -> None:
        """Gives an offer up: nobody waits for its answer any more."""

    def events(self, seconds: float) -> Sequence[Event]:
        """Returns what has happened since the last call, waiting a while for something to happen."""
