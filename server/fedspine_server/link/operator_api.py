"""The calls of the operator: devices, claim tokens, runs, events, and this API's own description.

Comes in: requests with the operator's token. Goes out: what `devices` and `runs` say.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Path, Query, Request
from fastapi.responses import FileResponse

from fedspine_server.link import devices, runs
from fedspine_server.link.credentials import CLAIM, Principal, issue
from fedspine_server.link.device_api import SharedHub
from fedspine_server.link.operator_schemas import Claim, ClaimRequest, DeviceView, EventView, RunRequest, RunView
from fedspine_server.link.schemas import NAME
from fedspine_server.link.tables import ACCEPTED, REVOKED, RUNNING, STOPPED


def operator(request: Request) -> Principal:
    """Returns the operator that asks."""
    principal: Principal | None = request.state.principal
    if principal is None or principal.kind != "operator":
        raise HTTPException(403, "expected an operator's token")
    return principal


router = APIRouter(prefix="/v1", tags=["operator"], dependencies=[Depends(operator)])

NamePath = Annotated[str, Path(pattern=NAME)]
STATUS_OF = {"accept": ACCEPTED, "revoke": REVOKED, "stop": STOPPED, "resume": RUNNING}


@router.get("/openapi.json", include_in_schema=False)
def openapi(request: Request) -> dict[str, Any]:
    """This API as an OpenAPI document."""
    document: dict[str, Any] = request.app.openapi()
    return document


@router.post("/claims", status_code=201)
def make_claim(hub: SharedHub, message: ClaimRequest) -> Claim:
    """A new claim token for devices to enrol with."""
    now, seconds = hub.clock(), 3600 * message.hours
    with hub.database.write() as session:
        token = issue(session, CLAIM, now=now, seconds=seconds)
        hub.record(session, "claim_made", hours=message.hours)
    return Claim(claim=token, expires_at=now + seconds)


@router.get("/devices")
def list_devices(hub: SharedHub) -> list[DeviceView]:
    """Every device that has enrolled."""
    return devices.views(hub)


@router.get("/devices/{device_id}")
def show_device(hub: SharedHub, device_id: NamePath) -> DeviceView:
    """One device."""
    return devices.views(hub, device_id)[0]


@router.post("/devices/{device_id}/{action}")
def change_device(
    hub: SharedHub, device_id: NamePath, action: Annotated[str, Path(pattern="^(accept|revoke)$")]
) -> DeviceView:
    """Accept a pending device, or revoke one for ever."""
    devices.set_status(hub, [device_id], STATUS_OF[action])
    return devices.views(hub, device_id)[0]


@router.post("/runs", status_code=201)
def start_run(hub: SharedHub, message: RunRequest) -> RunView:
    """Begin a run."""
    return runs.start(hub, message)


@router.get("/runs")
def list_runs(hub: SharedHub) -> list[RunView]:
    """Every run."""
    return runs.views(hub)


@router.get("/runs/{run_id}")
def show_run(hub: SharedHub, run_id: NamePath) -> RunView:
    """One run."""
    return runs.views(hub, run_id)[0]


@router.get("/runs/{run_id}/history")
def run_history(hub: SharedHub, run_id: NamePath) -> list[dict[str, Any]]:
    """What happened in each closed round: who was asked for what and why, seconds, bytes, losses."""
    state = hub.state(runs.views(hub, run_id)[0].state_sha256)
    return [dict(record) for record in state.history]


@router.get("/runs/{run_id}/state", response_class=FileResponse)
def run_state(hub: SharedHub, run_id: NamePath) -> FileResponse:
    """The coordinator's present state, with the global adapter: one safetensors blob."""
    return FileResponse(runs.state_path(hub, run_id), media_type="application/octet-stream")


@router.post("/runs/{run_id}/{action}")
def change_run(hub: SharedHub, run_id: NamePath, action: Annotated[str, Path(pattern="^(stop|resume)$")]) -> RunView:
    """Stop a run, or go on with it."""
    return runs.set_status(hub, run_id, STATUS_OF[action])


@router.get("/events")
def list_events(
    hub: SharedHub,
    run_id: Annotated[str | None, Query(pattern=NAME)] = None,
    after: Annotated[int, Query(ge=0, le=1 << 53)] = 0,
) -> list[EventView]:
    """What happened, oldest first."""
    return runs.events(hub, run_id, after)
