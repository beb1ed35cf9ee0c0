"""What an operator may do from the page: each names what it does, what follows, and the link's function for it.

Comes in: nothing. Goes out: the table of actions. A new one is a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from starlette.exceptions import HTTPException

from fedspine_server.link import devices, rollouts, runs
from fedspine_server.link.hub import Hub
from fedspine_server.link.tables import ACCEPTED, PENDING, REVOKED, RUNNING, STOPPED

EVERYBODY = "all"


@dataclass(frozen=True)
class Action:
    """One action.

    Attributes:
        kind: `devices`, `runs` or `rollouts`.
        name: In the address.
        title: On the button.
        follows: What happens then, for whoever confirms.
        do: Hub and the name of a device, run or rollout -> done.
        severe: Whether it cannot be taken back.
    """

    kind: str
    name: str
    title: str
    follows: str
    do: Callable[[Hub, str], object]
    severe: bool = False


def _accept(hub: Hub, name: str) -> None:
    chosen = [name]
    if name == EVERYBODY:
        chosen = [device.device_id for device in devices.views(hub) if device.status == PENDING]
    devices.set_status(hub, chosen, ACCEPTED)


def _revoke(hub: Hub, name: str) -> None:
    if name == EVERYBODY:
        raise HTTPException(404, "expected the name of one device")
    devices.set_status(hub, [name], REVOKED)


def _roll_back(hub: Hub, name: str) -> None:
    if not (name.isascii() and name.isdecimal() and len(name) < 16):
        raise HTTPException(404, "expected the number of a rollout")
    rollouts.roll_back(hub, int(name))


ACTIONS = (
    Action("devices", "accept", "Accept", "It may fetch tasks and send updates from now on.", _accept),
    Action(
        "devices", "revoke", "Revoke", "It is shut out for ever, its task is dropped, and its agent stops. To come back"
        " it has to enrol under another name.", _revoke, severe=True,
    ),
    Action(
        "runs", "stop", "Stop", "Devices at work are told to stop. It can go on later where it stood.",
        lambda hub, name: runs.set_status(hub, name, STOPPED),
    ),
    Action(
        "runs", "resume", "Resume", "It goes on where it stood.", lambda hub, name: runs.set_status(hub, name, RUNNING)
    ),
    Action(
        "rollouts", "rollback", "Roll back", "Every device that took this model goes back to the one it had before;"
        " those on their way to it stop.", _roll_back, severe=True,
    ),
)  # fmt: skip


def find(kind: str, name: str) -> Action | None:
    """Returns an action, None when there is none of that name."""
    return next((action for action in ACTIONS if (action.kind, action.name) == (kind, name)), None)
