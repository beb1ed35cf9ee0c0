r"""A model rollout on the device, as a pure function: what is asked, and what the disk says -> what to do next.

Comes in: the server's order and this device's own record. Goes out: one action, whose effect is on disk before the
record says that it was taken; so the board may lose its power anywhere, and the same function goes on from there.
Whether the model is kept is decided here, by the gate, whoever can or cannot be reached meanwhile.

    downloading -> installed -> checking -> committing -> committed -> returning -> rolled_back
          \____________\____________\-> failed

`current` names the model that programs of this board load. It changes in `committing` and `returning` only, by one
rename: a model that has not passed its gate here is never what they find.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum
from typing import Any

from fedspine_edge.rollout_gate import Condition

INSTALL, RESTORE = "install", "restore"
DOWNLOADING, INSTALLED, CHECKING, COMMITTING = "downloading", "installed", "checking", "committing"
COMMITTED, FAILED, RETURNING, ROLLED_BACK = "committed", "failed", "returning", "rolled_back"
MOST_TRIES = 3
"""So often a check may take the agent or the whole board down with it before the model is given up."""

FINAL = (COMMITTED, FAILED, ROLLED_BACK)
PHASES = ("", DOWNLOADING, INSTALLED, CHECKING, COMMITTING, RETURNING, *FINAL)


@dataclass(frozen=True)
class Order:
    """What the server asks.

    Attributes:
        rollout_id: Of which rollout.
        kind: `INSTALL` or `RESTORE`.
        sha256: The rollout's model.
        num_bytes: Its size.
        name: What people call it.
        conditions: The gate.
        passage: Text whose perplexity is measured; empty for the built-in one.
    """

    rollout_id: int
    kind: str
    sha256: str
    num_bytes: int
    name: str
    conditions: tuple[Condition, ...] = ()
    passage: str = ""


@dataclass(frozen=True)
class Record:
    """How far this device is with its latest rollout.

    Attributes:
        rollout_id: Which one; 0 for none yet.
        phase: Where it stands; empty for none yet.
        sha256: The rollout's model.
        before: The model that was current when it began; None for none.
        tries: How many checks were begun.
        figures: What the model does here.
        base: What the model before does.
        reason: Why it failed.
        told: The last phase the server is known to have heard of.
    """

    rollout_id: int = 0
    phase: str = ""
    sha256: str = ""
    before: str | None = None
    tries: int = 0
    figures: dict[str, Any] | None = None
    base: dict[str, Any] | None = None
    reason: str = ""
    told: str = ""

    @property
    def done(self) -> str:
        """The last order that was done and told, as the server knows it: `NUMBER:KIND`, or `none`."""
        if self.phase not in FINAL or self.told != self.phase:
            return "none"
        return f"{self.rollout_id}:{RESTORE if self.phase == ROLLED_BACK else INSTALL}"


class Action(Enum):
    """What to do next."""

    BEGIN = "begin"  # note what is asked, and which model is current
    DOWNLOAD = "download"  # fetch, prove by hash, put beside the current one
    CHECK = "check"  # have llama.cpp measure it here, judge by the gate
    GIVE_UP = "give up"  # checks took the device down too often
    SWITCH = "switch"  # make it current
    TAKE_BACK = "take back"  # note that the model before is to be current again
    RETURN = "return"  # make that so
    LEAVE = "leave"  # nothing was changed here, so nothing is to be taken back
    TELL = "tell"  # say how it ended
    REST = "rest"  # nothing is left to do


_STEPS = {DOWNLOADING: Action.DOWNLOAD, INSTALLED: Action.CHECK, CHECKING: Action.CHECK}
_UNFINISHED = {COMMITTING: Action.SWITCH, RETURNING: Action.RETURN}


def unfinished(record: Record) -> Action:
    """Returns what this device has still to do by itself, whatever is asked; `REST` for nothing."""
    if record.phase in FINAL:
        return Action.REST if record.told == record.phase else Action.TELL
    return _UNFINISHED.get(record.phase, Action.REST)


def next_action(order: Order, record: Record) -> Action:
    """Returns what to do next; following it until `REST` needs at most a dozen actions."""
    if record.phase in _UNFINISHED:
        return _UNFINISHED[record.phase]
    # A server that was restored from a backup may ask again for what it took back since.
    if record.rollout_id != order.rollout_id or (order.kind == INSTALL and record.phase == ROLLED_BACK):
        return Action.BEGIN
    if order.kind == RESTORE and record.phase != ROLLED_BACK:
        return Action.TAKE_BACK if record.phase == COMMITTED else Action.LEAVE
    if record.phase in FINAL:
        return unfinished(record)
    worn_out = record.phase == CHECKING and record.tries >= MOST_TRIES
    return Action.GIVE_UP if worn_out else _STEPS[record.phase]


def begun(order: Order, current: str | None) -> Record:
    """Returns the record of a new order; to go back from a rollout this device knows nothing of changes nothing."""
    if order.kind == INSTALL:
        return Record(order.rollout_id, DOWNLOADING, order.sha256, before=current)
    lost = current == order.sha256
    reason = "the record of the model before is lost: roll out the one that is wanted" if lost else ""
    return Record(order.rollout_id, ROLLED_BACK, order.sha256, before=current, reason=reason)


def failed(record: Record, reason: str) -> Record:
    """Returns the record of a rollout that this device gave up; the model before is current still."""
    return dataclasses.replace(record, phase=FAILED, reason=reason)
