"""The calls of devices: parse, call one function, answer.

Comes in: requests that passed the gate. Goes out: what `devices` and `tasks` say.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from typing import Annotated

from fastapi import APIRouter, Depends, Header, HTTPException, Path, Query, Request, Response
from fastapi.responses import FileResponse
from sqlalchemy import select

from fedspine_server.link import devices, rollouts, tasks
from fedspine_server.link.credentials import Principal
from fedspine_server.link.hub import Hub
from fedspine_server.link.rollout_schemas import DONE, OrderReply
from fedspine_server.link.schemas import (
    HASH,
    TASK_ID,
    Enrolled,
    Enrollment,
    Health,
    Hello,
    Progress,
    ProgressReply,
    ResultReply,
    Task,
    TaskResult,
    Welcome,
)
from fedspine_server.link.tables import ACCEPTED, TaskRow

router = APIRouter(prefix="/v1", tags=["device"])

TaskPath = Annotated[str, Path(pattern=TASK_ID)]
Attempt = Annotated[int, Query(ge=1, le=1 << 31)]
MAX_CHUNKS = 1 << 20


async def hub_of(request: Request) -> Hub:
    """Returns what this server process shares."""
    hub: Hub = request.app.state.hub
    return hub


async def enrolled_device(request: Request) -> Principal:
    """Returns the device that asks, accepted or not yet."""
    principal: Principal | None = request.state.principal
    if principal is None or principal.kind != "device":
        raise HTTPException(403, "expected a device's token")
    return principal


async def present_device(
    device: Annotated[Principal, Depends(enrolled_device)], boot: Annotated[str, Header(alias="X-Boot")]
) -> Principal:
    """Returns the device that asks, in the boot that said hello last."""
    if boot != device.boot_id:
        raise tasks.superseded(device.device_id)
    return device


async def accepted_device(device: Annotated[Principal, Depends(present_device)]) -> Principal:
    """Returns the device that asks, if the operator accepted it."""
    if device.status != ACCEPTED:
        raise HTTPException(403, f"device {device.device_id} is {device.status}: the operator has to accept it")
    return device


SharedHub = Annotated[Hub, Depends(hub_of)]
Present = Annotated[Principal, Depends(present_device)]
Accepted = Annotated[Principal, Depends(accepted_device)]


@router.get("/health", tags=["open"])
def health(hub: SharedHub) -> Health:
    """That the server is there; needs no token."""
    return Health(ca=hub.ca)


@router.post("/enroll", status_code=201, tags=["open"])
def enroll(request: Request, hub: SharedHub, message: Enrollment) -> Enrolled:
    """Ask to be let in; needs a claim token in the body and no other."""
    address = request.client.host if request.client else ""
    wait = hub.enrollments.wait_seconds(address, hub.clock())
    if wait:
        raise HTTPException(429, "too many enrolments from here", headers={"Retry-After": str(math.ceil(wait))})
    return devices.enroll(hub, message)


@router.post("/hello")
def hello(hub: SharedHub, device: Annotated[Principal, Depends(enrolled_device)], message: Hello) -> Welcome:
    """Begin, or begin again: this boot owns the device's identity from now on."""
    return devices.hello(hub, device.device_id, message)


@router.get("/task", responses={204: {"description": "Nothing to do for now"}})
async def task(
    hub: SharedHub,
    device: Present,
    response: Response,
    wait: Annotated[float, Query(ge=0, le=60)] = 0.0,
    rollout: Annotated[str | None, Query(pattern=DONE)] = None,
) -> Task | OrderReply | None:
    """Long poll: the device's task as soon as there is one; before it, what a rollout asks.

    `rollout` is the last order the device has done (`none`, `NUMBER:install`, `NUMBER:restore`); left out, it is asked
    for nothing but tasks.
    """
    loop = asyncio.get_running_loop()
    until, rung = loop.time() + min(wait, hub.settings.wait_seconds), False
    while True:
        bell = hub.bell.listen(device.device_id)
        found = await asyncio.to_thread(_next, hub, device, rollout, rung=rung)
        left = until - loop.time()
        if found is not None or left <= 0 or hub.bell.closed:
            break
        try:
            await asyncio.wait_for(bell.wait(), left)
            rung = True
        except asyncio.TimeoutError:
            break
    if found is None:
        response.status_code = 204
    return found


def _next(hub: Hub, device: Principal, done: str | None, *, rung: bool) -> Task | OrderReply | None:
    order = rollouts.order_for(hub, device.device_id, done) if done and device.status == ACCEPTED else None
    return order or tasks.lease(hub, device.device_id, device.boot_id, rung=rung)


@router.get("/blob/{sha256}", response_class=FileResponse)
def blob(hub: SharedHub, device: Accepted, sha256: Annotated[str, Path(pattern=HASH)]) -> FileResponse:
    """A blob of one of the device's own tasks, or the model it is to have; Range goes on where a download broke off."""
    own = (TaskRow.device_id == device.device_id, TaskRow.blob_sha256 == sha256)
    with hub.database.read() as session:
        num_bytes = session.scalars(select(TaskRow.blob_bytes).where(*own).limit(1)).first()
        if num_bytes is None:
            num_bytes = rollouts.model_bytes_for(session, device.device_id, sha256)
    if num_bytes is None:
        raise HTTPException(404, "expected a blob of one of this device's tasks or of its rollout")
    try:
        path = hub.blobs.path(sha256)
    except KeyError as error:
        raise HTTPException(404, "that is over and its blob is gone") from error
    if path.stat().st_size != num_bytes:
        raise HTTPException(404, f"expected a blob of {num_bytes} bytes, found it damaged on the server's disk")
    return FileResponse(path, media_type="application/zstd")


@router.head("/upload/{task_id}", status_code=204)
def uploaded(hub: SharedHub, device: Accepted, task_id: TaskPath, attempt: Attempt, response: Response) -> None:
    """How many chunks of an upload are there, in `X-Chunks`: go on with the next."""
    with hub.database.read() as session:
        tasks.own_task(session, device.device_id, task_id)
    response.headers["X-Chunks"] = str(hub.blobs.num_chunks(tasks.upload_name(task_id, attempt)))


@router.put("/upload/{task_id}/{index}", status_code=204)
async def upload(
    request: Request,
    hub: SharedHub,
    device: Accepted,
    task_id: TaskPath,
    index: Annotated[int, Path(ge=0, le=MAX_CHUNKS)],
    attempt: Attempt,
    chunk_sha256: Annotated[str, Header(alias="X-Chunk-SHA256", pattern=HASH)],
) -> None:
    """One chunk of an upload, in its body; sent again it replaces itself."""
    await asyncio.to_thread(_check_chunk, hub, device.device_id, task_id, index, attempt)
    content = await request.body()
    await asyncio.to_thread(_keep_chunk, hub, tasks.upload_name(task_id, attempt), index, content, chunk_sha256)


def _check_chunk(hub: Hub, device_id: str, task_id: str, index: int, attempt: int) -> None:
    """Whether a chunk may come, before it is read."""
    with hub.database.read() as session:
        task = tasks.own_task(session, device_id, task_id)
    if attempt != task.attempt or task.status not in tasks.OPEN:
        raise HTTPException(409, f"expected an upload of attempt {task.attempt} of an open task, found {task.status}")
    if index * hub.settings.chunk_bytes >= tasks.max_frame_bytes(task.max_update_bytes):
        raise HTTPException(413, f"expected at most {tasks.max_frame_bytes(task.max_update_bytes)} bytes")


def _keep_chunk(hub: Hub, upload: str, index: int, content: bytes, sha256: str) -> None:
    if hashlib.sha256(content).hexdigest() != sha256:
        raise HTTPException(422, "expected a chunk of the announced hash: send it again")
    hub.blobs.put_chunk(upload, index, content)


@router.post("/task/{task_id}/progress")
def progress(hub: SharedHub, device: Accepted, task_id: TaskPath, message: Progress) -> ProgressReply:
    """How far the device is; renews the lease, and may be told to stop."""
    return tasks.progress(hub, device.device_id, task_id, message)


@router.post("/task/{task_id}/result")
def result(hub: SharedHub, device: Accepted, task_id: TaskPath, message: TaskResult) -> ResultReply:
    """The end of a task; idempotent by (task, attempt)."""
    return tasks.result(hub, device.device_id, task_id, message)
