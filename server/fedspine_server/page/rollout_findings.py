"""What deserves a look in the newest rollout.

Comes in: a fleet. Goes out: level, title, why, what to do and where to look, for `diagnosis`.
"""

from __future__ import annotations

from collections.abc import Iterator

from fedspine_server.page import wording
from fedspine_server.page.views import Fleet


def rollout_findings(fleet: Fleet) -> Iterator[tuple[str, str, str, str, str]]:
    """Yields what is wrong with the newest rollout."""
    if not fleet.rollouts:
        return
    newest = fleet.rollouts[0]
    if newest.status == "stopped":
        title = f"rollout {newest.rollout_id} of {newest.model} stopped"
        yield "warn", title, newest.detail, "the other devices keep the model they have; begin another", "/rollouts"
    if newest.status == "awaiting":
        title = f"rollout {newest.rollout_id} of {newest.model} waits for devices that are away"
        yield "note", title, newest.detail, "they take it when they come back; revoke one that is gone", "/rollouts"
    failed = [part for part in newest.parts if part.state == "failed"]
    if failed and newest.status in ("rolling", "awaiting", "finished"):
        title = f"{wording.plural(len(failed), 'device')} did not take {newest.model}"
        why = f"{wording.names([part.device_id for part in failed])}: {failed[0].reason}"
        yield "warn", title, why, "they keep the model they have", "/rollouts"
