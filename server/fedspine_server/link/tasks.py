"""Tasks: handed out at least once, counted exactly once.

Comes in: polls, progress and results of devices. Goes out: leases and verdicts. A task's first valid result decides it;
any later one, of the same attempt or another, is answered and changes nothing.
"""

from __future__ import annotations

from typing import Any

from fastapi import HTTPException
from sqlalchemy import select
from sqlalchemy.orm import Session

from fedspine_edge.errors import IncompatibleError
from fedspine_edge.protocol import unpack, update_from_bytes
from fedspine_server.link.devices import TOUCH_SECONDS, touch
from fedspine_server.link.hub import Hub
from fedspine_server.link.schemas import BlobRef, Progress, ProgressReply, Recipe, ResultReply, Task, TaskResult
from fedspine_server.link.tables import (
    ACCEPTED,
    DONE,
    EXPIRED,
    FAILED,
    KEPT,
    LATE,
    LEASED,
    OFFERED,
    REFUSED,
    RUNNING,
    DeviceRow,
    ResultRow,
    RunRow,
    TaskRow,
)

OPEN = (OFFERED, LEASED)
FRAME_OVERHEAD = 1024  # what zstd adds to bytes it cannot shrink, and then some


def upload_name(task_id: str, attempt: int) -> str:
    """Returns what an attempt's upload is called."""
    return f"{task_id}.{attempt}"


def max_frame_bytes(task: TaskRow) -> int:
    """Returns how large the upload of a task may be."""
    return task.max_update_bytes + task.max_update_bytes // 64 + FRAME_OVERHEAD


def lease(hub: Hub, device_id: str, boot_id: str) -> Task | None:
    """Hands a device its task; None when there is none.

    Raises:
        HTTPException: 409 when another boot of the device has taken over.
    """
    now = hub.clock()
    with hub.database.read() as session:
        device = session.get(DeviceRow, device_id)
        fresh = device is not None and now - device.last_seen_at < TOUCH_SECONDS
        if fresh and not session.scalars(_open_tasks(device_id)).first():
            return None
    with hub.database.write() as session:
        device = touch(hub, session, device_id)
        if device.boot_id != boot_id:
            raise superseded(device_id)
        if device.status != ACCEPTED:
            return None
        for task in session.scalars(_open_tasks(device_id).with_for_update()).all():
            run = session.get_one(RunRow, task.run_id)
            if run.round_index == task.round_index:
                return _hand_out(hub, session, task, run)
            task.status = EXPIRED  # who asks for a task is not at work on an old one any more
        return None


def _hand_out(hub: Hub, session: Session, task: TaskRow, run: RunRow) -> Task:
    if task.attempt:
        hub.record(session, "task_again", run_id=task.run_id, device_id=task.device_id, round_index=task.round_index)
    task.status, task.attempt = LEASED, task.attempt + 1
    task.lease_until = hub.clock() + hub.settings.lease_seconds
    return _message(hub, task, run)


def superseded(device_id: str) -> HTTPException:
    """Returns the answer to a boot that no longer owns its device's identity."""
    return HTTPException(409, f"another agent of device {device_id} has taken over: stop one of the two")


def _open_tasks(device_id: str) -> Any:
    wanted = (TaskRow.device_id == device_id, TaskRow.status.in_(OPEN))
    return select(TaskRow).where(*wanted).order_by(TaskRow.created_at.desc(), TaskRow.round_index.desc())


def _message(hub: Hub, task: TaskRow, run: RunRow) -> Task:
    spec = task.spec
    return Task(
        task_id=task.task_id,
        attempt=task.attempt,
        run_id=task.run_id,
        round_index=task.round_index,
        device_id=task.device_id,
        pruning_ratio=spec["pruning_ratio"],
        rank=spec["rank"],
        num_steps=spec["num_steps"],
        seed=spec["seed"],
        base_sha256=run.base_sha256,
        recipe=Recipe.model_validate(run.recipe),
        blob=BlobRef(
            sha256=task.blob_sha256,
            num_bytes=task.blob_bytes,
            message_bytes=spec["message_bytes"],
            content=hub.inline(task.blob_sha256, task.blob_bytes),
        ),
        lease_seconds=hub.settings.lease_seconds,
        deadline_seconds=spec["deadline_seconds"],
        chunk_bytes=hub.settings.chunk_bytes,
        inline_bytes=hub.settings.inline_bytes,
        max_update_bytes=task.max_update_bytes,
    )


def own_task(session: Session, device_id: str, task_id: str, *, lock: bool = False) -> TaskRow:
    """Returns a device's own task, kept from others' changes if wanted; raises HTTPException 404 for any other."""
    task = session.get(TaskRow, task_id, with_for_update=lock or None)
    if task is None or task.device_id != device_id:
        raise HTTPException(404, f"device {device_id} has no task {task_id}")
    return task


def progress(hub: Hub, device_id: str, task_id: str, message: Progress) -> ProgressReply:
    """Renews a lease and keeps what the sensors say; tells a device to stop when nobody waits for its work."""
    now = hub.clock()
    with hub.database.write() as session:
        task = own_task(session, device_id, task_id, lock=True)
        device = touch(hub, session, device_id)
        done = message.model_dump(exclude={"sample", "attempt"}) | {"round_index": task.round_index}
        device.sample = {**message.sample.model_dump(), **done, "at": now}
        why = _unwanted(session, task, message.attempt)
        if not why:
            task.status, task.lease_until = LEASED, now + hub.settings.lease_seconds
    return ProgressReply(cancel=bool(why), detail=why, lease_seconds=hub.settings.lease_seconds)


def _unwanted(session: Session, task: TaskRow, attempt: int) -> str:
    run = session.get_one(RunRow, task.run_id)
    if task.status not in OPEN:
        return f"the task is {task.status}"
    if attempt != task.attempt:
        return f"attempt {attempt} was replaced by {task.attempt}"
    if run.status != RUNNING:
        return f"the run is {run.status}"
    behind = run.round_index - task.round_index
    if behind > run.options["max_staleness"]:
        task.status = EXPIRED
        return f"the result would be {behind} rounds late"
    return ""


def result(hub: Hub, device_id: str, task_id: str, message: TaskResult) -> ResultReply:
    """Takes the end of a task; asked again with the same attempt it gives the same answer.

    Raises:
        HTTPException: 404 for another's task, 409 for an attempt that was never handed out, 425 for an upload that is
            not, or not any more, what was announced: it begins anew.
    """
    with hub.database.read() as session:
        known = session.get(ResultRow, (task_id, message.attempt))
        task = own_task(session, device_id, task_id)
        if known is not None:
            return ResultReply(fate=known.fate, detail=known.detail)
        if not 1 <= message.attempt <= task.attempt:
            raise HTTPException(409, f"expected an attempt of 1 to {task.attempt}, found {message.attempt}")
        if message.num_bytes > max_frame_bytes(task):
            raise HTTPException(413, f"expected at most {max_frame_bytes(task)} bytes, found {message.num_bytes}")
        max_bytes = task.max_update_bytes
    refused = _malformed(hub, message, upload_name(task_id, message.attempt), max_bytes) if message.sha256 else None
    with hub.database.write() as session:
        row = _decide(hub, session, task_id, message, refused)
        reply = ResultReply(fate=row.fate, detail=row.detail)
    hub.nudge.set()
    return reply


def _malformed(hub: Hub, message: TaskResult, upload: str, max_bytes: int) -> str | None:
    """Makes a blob of what came; returns why it is no update, None when it is one. Its content is judged later."""
    assert message.sha256 is not None
    try:
        if message.content is None:
            hub.blobs.finish_upload(upload, message.sha256, message.num_bytes)
        else:
            hub.blobs.put(message.content)
    except IncompatibleError as error:
        raise HTTPException(425, f"{error}: send the upload again") from error
    frame = hub.blobs.read(message.sha256) if message.content is None else message.content
    try:
        update_from_bytes(unpack(frame, max_bytes=max_bytes))
    except IncompatibleError as error:
        return str(error)[:500]
    return None


def _decide(hub: Hub, session: Session, task_id: str, message: TaskResult, refused: str | None) -> ResultRow:
    # First the run, as a closing does: no round may close between this look at it and the commit.
    own_run = select(TaskRow.run_id).where(TaskRow.task_id == task_id).scalar_subquery()
    run = session.scalars(select(RunRow).where(RunRow.run_id == own_run).with_for_update(read=True)).one()
    task = session.scalars(select(TaskRow).where(TaskRow.task_id == task_id).with_for_update()).one()
    known = session.get(ResultRow, (task_id, message.attempt))
    if known is not None:
        return known
    closed = run.round_index - task.round_index + (run.closing_at is not None)
    fate, detail, staleness = LATE if closed else KEPT, message.failure, max(0, closed)
    if task.status not in OPEN:
        fate, detail = REFUSED, f"the task was {task.status} already"
    elif message.failure is not None:
        fate, task.status = FAILED, FAILED
    elif refused is not None:
        fate, detail, task.status = REFUSED, refused, FAILED
    elif closed and staleness > run.options["max_staleness"]:
        fate, detail, task.status = REFUSED, f"{staleness} rounds late", EXPIRED
    else:
        task.status = DONE
    row = ResultRow(
        task_id=task_id,
        attempt=message.attempt,
        run_id=task.run_id,
        round_index=task.round_index,
        device_id=task.device_id,
        fate=fate,
        staleness=staleness,
        closed_with=None,
        blob_sha256=message.sha256 if fate in (KEPT, LATE) else None,
        seconds={"download": message.download_seconds, "upload": message.upload_seconds},
        detail=detail,
        received_at=hub.clock(),
    )
    session.add(row)
    hub.record(
        session,
        f"result_{fate}",
        run_id=task.run_id,
        device_id=task.device_id,
        round_index=task.round_index,
        attempt=message.attempt,
        staleness=staleness,
        detail=detail,
    )
    touch(hub, session, task.device_id)
    return row
