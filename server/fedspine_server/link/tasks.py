"""Tasks: handed out at least once, counted exactly once.

Comes in: polls, progress and results of devices. Goes out: leases and verdicts. A task's first valid result decides it;
any later one, of the same attempt or another, is answered and changes nothing.
"""

from __future__ import annotations

from fastapi import HTTPException
from sqlalchemy import and_, bindparam, exists, or_, select
from sqlalchemy.orm import Session, load_only

from fedspine_edge.errors import IncompatibleError
from fedspine_edge.wire_format import unpack, update_from_bytes
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

# Statements of every call, made once: to make one costs more than to run it.
_IS_OPEN = or_(TaskRow.status == OFFERED, TaskRow.status == LEASED)
_LOOK = select(
    DeviceRow.last_seen_at, exists().where(TaskRow.device_id == DeviceRow.device_id, _IS_OPEN).label("has_task")
).where(DeviceRow.device_id == bindparam("device_id"))
_OPEN_TASKS = (
    select(TaskRow, RunRow)
    .join(RunRow, RunRow.run_id == TaskRow.run_id)
    .where(TaskRow.device_id == bindparam("device_id"), _IS_OPEN)
    .order_by(TaskRow.created_at.desc(), TaskRow.round_index.desc())
    .with_for_update(of=TaskRow)
    .options(load_only(RunRow.round_index, RunRow.recipe, RunRow.base_sha256))
)
_ASKED_AND_TOLD = (
    select(TaskRow.device_id, TaskRow.attempt, TaskRow.max_update_bytes, ResultRow.fate, ResultRow.detail)
    .outerjoin(ResultRow, and_(ResultRow.task_id == TaskRow.task_id, ResultRow.attempt == bindparam("attempt")))
    .where(TaskRow.task_id == bindparam("task_id"))
)
_ITS_RUN = (
    select(RunRow)
    .where(RunRow.run_id == select(TaskRow.run_id).where(TaskRow.task_id == bindparam("task_id")).scalar_subquery())
    .with_for_update(read=True)
    .options(load_only(RunRow.round_index, RunRow.closing_at, RunRow.options))
)
_ITSELF = select(TaskRow).where(TaskRow.task_id == bindparam("task_id")).with_for_update()
_WAITED_FOR = (
    select(TaskRow.task_id)
    .where(TaskRow.run_id == bindparam("run_id"), TaskRow.round_index == bindparam("round_index"), _IS_OPEN)
    .limit(1)
)


def upload_name(task_id: str, attempt: int) -> str:
    """Returns what an attempt's upload is called."""
    return f"{task_id}.{attempt}"


def max_frame_bytes(max_update_bytes: int) -> int:
    """Returns how large the upload of a task may be."""
    return max_update_bytes + max_update_bytes // 64 + FRAME_OVERHEAD


def lease(hub: Hub, device_id: str, boot_id: str, *, rung: bool = False) -> Task | None:
    """Hands a device its task; None when there is none.

    Args:
        hub: Where tasks are.
        device_id: Whose.
        boot_id: The boot that asks.
        rung: Whether there should be one, so that looking first is not worth it.

    Raises:
        HTTPException: 409 when another boot of the device has taken over.
    """
    now = hub.clock()
    for found in () if rung else hub.database.rows(_LOOK, device_id=device_id):
        if not found.has_task and now - found.last_seen_at < TOUCH_SECONDS:
            return None
    with hub.database.write() as session:
        device = touch(hub, session, device_id)
        if device.boot_id != boot_id:
            raise superseded(device_id)
        if device.status != ACCEPTED:
            return None
        for task, run in session.execute(_OPEN_TASKS, {"device_id": device_id}).all():
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
        budget_seconds=spec.get("budget_seconds"),
        min_steps=spec.get("min_steps", 1),
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
        raise _not_its(device_id, task_id)
    return task


def _not_its(device_id: str, task_id: str) -> HTTPException:
    return HTTPException(404, f"device {device_id} has no task {task_id}")


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
    found = hub.database.rows(_ASKED_AND_TOLD, task_id=task_id, attempt=message.attempt)
    if not found or found[0].device_id != device_id:
        raise _not_its(device_id, task_id)
    if found[0].fate is not None:
        return ResultReply(fate=found[0].fate, detail=found[0].detail)
    last_attempt, max_bytes = found[0].attempt, found[0].max_update_bytes
    if not 1 <= message.attempt <= last_attempt:
        raise HTTPException(409, f"expected an attempt of 1 to {last_attempt}, found {message.attempt}")
    if message.num_bytes > max_frame_bytes(max_bytes):
        raise HTTPException(413, f"expected at most {max_frame_bytes(max_bytes)} bytes, found {message.num_bytes}")
    refused = _malformed(hub, message, upload_name(task_id, message.attempt), max_bytes) if message.sha256 else None
    with hub.database.write() as session:
        row = _decide(hub, session, task_id, message, refused)
        reply = ResultReply(fate=row.fate, detail=row.detail)
        own = {"run_id": row.run_id, "round_index": row.round_index}
        was_last = session.execute(_WAITED_FOR, own).first() is None
    if was_last:
        hub.nudge.set()  # a deadline that passed with a quorum is seen at the next tick
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
    run = session.scalars(_ITS_RUN, {"task_id": task_id}).one()
    task = session.scalars(_ITSELF, {"task_id": task_id}).one()
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
    touch(hub, session, task.device_id, every_seconds=TOUCH_SECONDS)  # the event tells already
    return row
