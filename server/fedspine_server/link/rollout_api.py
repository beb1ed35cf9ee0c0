"""The calls about models and rollouts: the operator's, and the one by which a device says where it is.

Comes in: requests that passed the gate. Goes out: what `models`, `rollouts` and `rollout_views` say.
"""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Path, Request

from fedspine_server.link import models, rollout_views, rollouts
from fedspine_server.link.device_api import MAX_CHUNKS, Accepted, SharedHub
from fedspine_server.link.operator_api import operator
from fedspine_server.link.rollout_schemas import (
    MAX_ROLLOUT,
    ModelRequest,
    ModelView,
    RolloutReply,
    RolloutReport,
    RolloutRequest,
    RolloutView,
    UploadView,
)
from fedspine_server.link.schemas import HASH

devices = APIRouter(prefix="/v1", tags=["device"])
operators = APIRouter(prefix="/v1", tags=["operator"], dependencies=[Depends(operator)])

HashPath = Annotated[str, Path(pattern=HASH)]
Number = Annotated[int, Path(ge=0, le=MAX_ROLLOUT)]


@devices.post("/rollout/{rollout_id}")
def report(hub: SharedHub, device: Accepted, rollout_id: Number, message: RolloutReport) -> RolloutReply:
    """Where the device is with a rollout; asked again it changes nothing."""
    return rollouts.report(hub, device.device_id, rollout_id, message)


@operators.get("/models")
def list_models(hub: SharedHub) -> list[ModelView]:
    """Every model that can be rolled out."""
    return models.views(hub)


@operators.get("/models/{sha256}/upload")
def uploaded(hub: SharedHub, sha256: HashPath) -> UploadView:
    """How much of a model is there: go on with the next chunk."""
    return models.upload_view(hub, sha256)


@operators.put("/models/{sha256}/upload/{index}", status_code=204)
async def upload(
    request: Request,
    hub: SharedHub,
    sha256: HashPath,
    index: Annotated[int, Path(ge=0, le=MAX_CHUNKS)],
    chunk_sha256: Annotated[str, Header(alias="X-Chunk-SHA256", pattern=HASH)],
) -> None:
    """One chunk of a model, in its body; sent again it replaces itself."""
    content = await request.body()
    await asyncio.to_thread(models.put_chunk, hub, sha256, index, content, chunk_sha256)


@operators.post("/models/{sha256}", status_code=201)
def add_model(hub: SharedHub, sha256: HashPath, message: ModelRequest) -> ModelView:
    """The end of an upload: a model that can be rolled out."""
    return models.add(hub, sha256, message)


@operators.post("/models/{sha256}/forget", status_code=204)
def forget_model(hub: SharedHub, sha256: HashPath) -> None:
    """Forget a model that no device is to have any more."""
    models.forget(hub, sha256)


@operators.post("/rollouts", status_code=201)
def start_rollout(hub: SharedHub, message: RolloutRequest) -> RolloutView:
    """Begin a rollout: the canaries first."""
    return rollout_views.views(hub, rollouts.start(hub, message))[0]


@operators.get("/rollouts")
def list_rollouts(hub: SharedHub) -> list[RolloutView]:
    """The latest rollouts, newest first."""
    return rollout_views.views(hub)


@operators.get("/rollouts/{rollout_id}")
def show_rollout(hub: SharedHub, rollout_id: Number) -> RolloutView:
    """One rollout."""
    return rollout_views.views(hub, rollout_id)[0]


@operators.post("/rollouts/{rollout_id}/rollback")
def roll_back(hub: SharedHub, rollout_id: Number) -> RolloutView:
    """Have every device go back to the model it had before the newest rollout."""
    return rollout_views.views(hub, rollouts.roll_back(hub, rollout_id))[0]
