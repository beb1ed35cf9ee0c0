"""Devices: enrolment, hello, and what the operator decides about them.

Comes in: checked messages. Goes out: rows that change together with the event that says so.
"""

from __future__ import annotations

from typing import Any

from fastapi import HTTPException
from sqlalchemy import select
from sqlalchemy.orm import Session, defer
from sqlalchemy.orm.interfaces import ORMOption

from fedspine_server.link.credentials import claim_is_good, hashed
from fedspine_server.link.hub import Hub
from fedspine_server.link.operator_schemas import DeviceView
from fedspine_server.link.schemas import LINK_NEWEST, LINK_OLDEST, Enrolled, Enrollment, Hello, TaskInHand, Welcome
from fedspine_server.link.tables import (
    ACCEPTED,
    EXPIRED,
    LEASED,
    OFFERED,
    PENDING,
    REVOKED,
    DeviceRow,
    TaskRow,
)

TOUCH_SECONDS = 10.0  # how stale "last seen" may be: every poll a write would cost an fsync


def enroll(hub: Hub, message: Enrollment) -> Enrolled:
    """Makes a pending device; the same device asking again gets the same answer.

    Raises:
        HTTPException: 403 for a claim token that is unknown or has expired, 409 for a name that is taken.
    """
    now = hub.clock()
    with hub.database.write() as session:
        if not claim_is_good(session, message.claim, now=now):
            raise HTTPException(403, "expected a valid claim token, found one that is unknown or has expired")
        known = session.get(DeviceRow, message.device_id)
        if known is not None:
            if known.secret_sha256 != hashed(message.secret) or known.status == REVOKED:
                raise HTTPException(409, f"device name {message.device_id} is taken: choose another with --name")
            return Enrolled(device_id=known.device_id, status=known.status)
        session.add(
            DeviceRow(
                device_id=message.device_id,
                secret_sha256=hashed(message.secret),
                status=PENDING,
                facts=message.facts.model_dump(),
                sample={},
                num_examples=0,
                memory_bytes=0,
                base_sha256="",
                boot_id="",
                link_version=0,
                enrolled_at=now,
                last_seen_at=now,
            )
        )
        hub.record(session, "device_enrolled", device_id=message.device_id, board=message.facts.board)
    return Enrolled(device_id=message.device_id, status=PENDING)


def hello(hub: Hub, device_id: str, message: Hello) -> Welcome:
    """Makes this boot the owner of the device's identity and says what becomes of a task in hand.

    Raises:
        HTTPException: 426 when there is no link version that both speak.
    """
    version = min(LINK_NEWEST, message.link_newest)
    if version < max(LINK_OLDEST, message.link_oldest):
        raise HTTPException(
            426,
            f"device speaks link {message.link_oldest} to {message.link_newest},"
            f" server {LINK_OLDEST} to {LINK_NEWEST}: upgrade the older side",
        )
    with hub.database.write() as session:
        device = _device(session, device_id)
        if device.boot_id != message.boot_id:
            kind = "device_took_over" if device.boot_id else "device_joined"
            hub.record(session, kind, device_id=device_id, base_sha256=message.base_sha256)
        device.boot_id, device.link_version = message.boot_id, version
        device.facts = message.facts.model_dump()
        device.num_examples, device.memory_bytes = message.num_examples, message.memory_bytes
        device.base_sha256 = message.base_sha256
        device.last_seen_at = hub.clock()
        task = _in_hand(session, device_id, message.task)
        status = device.status
    hub.tokens.forget()
    hub.nudge.set()
    return Welcome(
        link_version=version,
        status=status,
        wait_seconds=hub.settings.wait_seconds,
        progress_seconds=hub.settings.progress_seconds,
        task=task,
    )


def _in_hand(session: Session, device_id: str, found: TaskInHand | None) -> Any:
    if found is None:
        return None
    row = session.get(TaskRow, found.task_id)
    wanted = row is not None and row.device_id == device_id and row.status in (OFFERED, LEASED)
    return "continue" if wanted else "drop"


def touch(hub: Hub, session: Session, device_id: str, *, every_seconds: float = 0.0) -> DeviceRow:
    """Returns a device's row within a writing session, and remembers that it was heard of.

    Args:
        hub: Whose clock.
        session: A writing session.
        device_id: Which device.
        every_seconds: How old that may be before it is worth a write.

    Raises:
        HTTPException: 404 for a device that never enrolled.
    """
    device, now = _device(session, device_id, defer(DeviceRow.facts), defer(DeviceRow.sample)), hub.clock()
    if now - device.last_seen_at >= every_seconds:
        device.last_seen_at = now
    return device


def set_status(hub: Hub, device_ids: list[str], status: str) -> None:
    """Accepts or revokes devices; a revoked one's open tasks are no longer wanted.

    Raises:
        HTTPException: 404 for a device that never enrolled, 409 for one that was revoked.
    """
    with hub.database.write() as session:
        for device_id in device_ids:
            device = _device(session, device_id)
            if device.status == REVOKED and status == ACCEPTED:
                raise HTTPException(409, f"device {device_id} was revoked: let it enrol anew under another name")
            if device.status == status:
                continue
            device.status = status
            hub.record(session, f"device_{status}", device_id=device_id)
            if status == REVOKED:
                open_tasks = select(TaskRow).where(
                    TaskRow.device_id == device_id, TaskRow.status.in_((OFFERED, LEASED))
                )
                for task in session.scalars(open_tasks):
                    task.status = EXPIRED
    hub.tokens.forget()
    hub.nudge.set()
    hub.bell.ring(device_ids)


def views(hub: Hub, device_id: str | None = None) -> list[DeviceView]:
    """Returns every device, or one, as the operator sees it.

    Raises:
        HTTPException: 404 for a device that never enrolled.
    """
    now = hub.clock()
    with hub.database.read() as session:
        if device_id is not None:
            devices = [_device(session, device_id)]
        else:
            devices = list(session.scalars(select(DeviceRow).order_by(DeviceRow.device_id)))
        at_work = {
            task.device_id: {"task_id": task.task_id, "run_id": task.run_id, "round_index": task.round_index}
            for task in session.scalars(select(TaskRow).where(TaskRow.status == LEASED))
        }
        return [
            DeviceView(
                device_id=device.device_id,
                status=device.status,
                last_seen_seconds=max(0.0, now - device.last_seen_at),
                num_examples=device.num_examples,
                memory_bytes=device.memory_bytes,
                base_sha256=device.base_sha256,
                link_version=device.link_version,
                task=at_work.get(device.device_id),
                facts=device.facts,
                sample=device.sample,
            )
            for device in devices
        ]


def _device(session: Session, device_id: str, *options: ORMOption) -> DeviceRow:
    device = session.get(DeviceRow, device_id, options=options)
    if device is None:
        raise HTTPException(404, f"expected a device that has enrolled, found {device_id}")
    return device
