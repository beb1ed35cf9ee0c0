"""A rollout as pure functions: what each device is to do now, what its word is worth, how the rollout goes on.

Comes in: the rollout, what devices reported, who is accepted. Goes out: orders, verdicts, the next status. The newest
rollout is the only one that asks anything of anybody.

| status | who is to have the model | ends when |
|---|---|---|
| `canary` | the canaries | all of them committed: `rolling`; one failed or none is left: `stopped` |
| `rolling` | every device it is for | each has committed or failed: `finished`; all that are there have: `awaiting` |
| `awaiting` | the same | those that were away have decided too, or were revoked: `finished`; one is back: `rolling` |
| `finished` | the same, whoever joins later too | |
| `stopped` | nobody new | |
| `rolled_back` | nobody; who took it goes back to the model before | |
| `superseded` | nobody: a newer one was begun | |
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedspine_edge.rollout_gate import Condition, unmet

CANARY, ROLLING, AWAITING, FINISHED, STOPPED = "canary", "rolling", "awaiting", "finished", "stopped"
ROLLED_BACK, SUPERSEDED = "rolled_back", "superseded"
UNDER_WAY = (CANARY, ROLLING)
UNSETTLED = (*UNDER_WAY, AWAITING)

WAITING, DOWNLOADING, INSTALLED, CHECKING = "waiting", "downloading", "installed", "checking"
COMMITTED, FAILED, TAKEN_BACK = "committed", "failed", "rolled_back"
DECIDED = (COMMITTED, FAILED)

MOST_NAMED = 8

INSTALL, RESTORE = "install", "restore"
"""What a device is told: have this model, or go back to the one before it."""


@dataclass(frozen=True)
class Rollout:
    """What the operator wants.

    Attributes:
        rollout_id: Its number; the highest counts.
        status: `CANARY`, ... above.
        model_sha256: The model's hash.
        conditions: The gate.
        canaries: Who goes first.
        devices: Whom it is for; None for every device.
    """

    rollout_id: int
    status: str
    model_sha256: str
    conditions: tuple[Condition, ...]
    canaries: tuple[str, ...]
    devices: tuple[str, ...] | None = None

    def is_for(self, device_id: str) -> bool:
        """Returns whether a device is meant at all."""
        return self.devices is None or device_id in self.devices


def order(rollout: Rollout, device_id: str, state: str | None) -> str | None:
    """Returns what an accepted device is to do: `INSTALL`, `RESTORE`, or None for nothing.

    Args:
        rollout: The newest one.
        device_id: Which device.
        state: What it reported last of this rollout; None when it reported nothing.
    """
    if rollout.status == ROLLED_BACK:
        return RESTORE if state is not None else None
    if rollout.status == CANARY:
        return INSTALL if device_id in rollout.canaries else None
    return INSTALL if rollout.status in (ROLLING, AWAITING, FINISHED) and rollout.is_for(device_id) else None


def verdict(rollout: Rollout, state: str, figures: Mapping[str, Any] | None, base: Mapping[str, Any] | None) -> str:
    """Returns why a device's word that it committed is not taken; empty when it is. Its figures must meet the gate."""
    if state != COMMITTED:
        return ""
    said = "no figures" if figures is None else unmet(rollout.conditions, figures, base)
    return f"reported committed against its own figures: {said}" if said else ""


def settled(
    rollout: Rollout,
    states: Mapping[str, str],
    reasons: Mapping[str, str],
    accepted: Iterable[str],
    away: Collection[str] = (),
) -> tuple[str, str]:
    """Returns the status a rollout now has, and why where that needs saying.

    Args:
        rollout: As it stands.
        states: device_id -> what it reported last.
        reasons: device_id -> why it failed.
        accepted: Devices that may work: who was revoked is not waited for.
        away: Those among them that were not heard of for long.
    """
    here = set(accepted)
    if rollout.status == CANARY:
        status, why = _of_canaries(rollout, states, reasons, [name for name in rollout.canaries if name in here], away)
        if status != ROLLING:
            return status, why
    elif rollout.status not in (ROLLING, AWAITING):
        return rollout.status, ""
    waits = [name for name in sorted(here) if rollout.is_for(name) and states.get(name) not in DECIDED]
    if waits and all(name in away for name in waits):
        are = "is" if len(waits) == 1 else "are"
        return AWAITING, f"finished but for {len(waits)} that {are} away: {_named(waits)}"
    return (ROLLING if waits else FINISHED), ""


def _of_canaries(
    rollout: Rollout,
    states: Mapping[str, str],
    reasons: Mapping[str, str],
    left: Sequence[str],
    away: Collection[str],
) -> tuple[str, str]:
    failed = [name for name in rollout.canaries if states.get(name) == FAILED]
    if failed:
        return STOPPED, f"canary {failed[0]} failed: {reasons.get(failed[0], '')}"
    if not left:
        return STOPPED, "no canary is left: each was revoked"
    waits = [name for name in left if states.get(name) != COMMITTED]
    missing = [name for name in waits if name in away]
    return (CANARY if waits else ROLLING), f"waits for a canary that is away: {_named(missing)}" if missing else ""


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def choose_canaries(present: Sequence[str], others: Sequence[str], count: int, *, model_sha256: str) -> list[str]:
    """Returns so many devices that go first: those that are there before the others, in an order the model decides.

    Another model has other canaries, so that it is not always the same boards that go first; asked twice it is the
    same ones.
    """

    def place(device_id: str) -> str:
        return hashlib.sha256(f"{model_sha256}/{device_id}".encode()).hexdigest()

    return [*sorted(present, key=place), *sorted(others, key=place)][:count]
