"""What can be looked at: the pages, their parts as they change, downloads, and what programs read.

Comes in: requests that were let in. Goes out: HTML, events, JSON, metrics. Nothing here changes anything.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

from sse_starlette.sse import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response

from fedspine_server.link.credentials import OPERATOR
from fedspine_server.page import metrics, sessions
from fedspine_server.page.desk import Desk, desk_of, let_in, session_of
from fedspine_server.page.diagnosis import diagnose
from fedspine_server.page.render import View, page, parts_of, round_html
from fedspine_server.page.views import Run

SESSION_CHECK_SECONDS = 20.0


async def _show(request: Request, view: View, title: str, **more: Any) -> Response:
    desk = desk_of(request)
    fleet = await asyncio.to_thread(desk.source.fleet)
    parts = await asyncio.to_thread(parts_of, view, fleet, desk.source)
    if not parts:
        raise HTTPException(404, f"there is no {view.page} named {view.name}")
    current = fleet.run(view.name) or fleet.current
    context = {
        "title": title,
        "view": view,
        "parts": [part for part in parts if not part.inside],
        "now": fleet.now,
        "run": current,
        "csrf": sessions.csrf_token(session_of(request)) if desk.hub else "",
        "signed_in": desk.hub is not None,
        **more,
    }
    return HTMLResponse(await asyncio.to_thread(page, "page.html", context))


async def fleet(request: Request) -> Response:
    """The fleet, and what to do."""
    return await _show(request, View("fleet"), "Fleet")


async def run(request: Request) -> Response:
    """One run."""
    name = request.path_params["run_id"]
    return await _show(request, View("run", name), f"Run {name}")


async def model(request: Request) -> Response:
    """What is left of a run's model, and its files."""
    name = request.path_params["run_id"]
    return await _show(request, View("model", name), f"Model of {name}")


async def device(request: Request) -> Response:
    """One device."""
    name = request.path_params["device_id"]
    return await _show(request, View("device", name), f"Device {name}")


async def rollouts(request: Request) -> Response:
    """Which model the devices are to run, where each of them is, and what was rolled out before."""
    return await _show(request, View("rollouts"), "Rollouts")


async def _known_run(request: Request) -> Run:
    run = (await asyncio.to_thread(desk_of(request).source.fleet)).run(request.path_params["run_id"])
    if run is None:
        raise HTTPException(404, "there is no such run")
    return run


async def round(request: Request) -> Response:
    """One round of a run, as a piece of its page."""
    run, index = await _known_run(request), request.path_params["index"]
    if not 0 <= index < len(run.story.rounds):
        raise HTTPException(404, f"{run.run_id} has no closed round {index + 1}")
    return HTMLResponse(await asyncio.to_thread(round_html, run, index))


async def matrix(request: Request) -> Response:
    """Every device in every round of a run, compact."""
    run = await _known_run(request)
    return JSONResponse(await asyncio.to_thread(run.story.matrix))


async def file(request: Request) -> Response:
    """A file of a run."""
    name = request.path_params["name"]
    found = await asyncio.to_thread(desk_of(request).source.file, request.path_params["run_id"], name)
    if found is None:
        raise HTTPException(404, "there is no such file to download")
    return FileResponse(found, filename=name, media_type="application/octet-stream")


async def stream(request: Request) -> Response:
    """The parts of a page as they change."""
    desk, asked = desk_of(request), request.query_params
    view = View(asked.get("page", "fleet"), asked.get("name", ""))
    if view.page not in ("fleet", "run", "model", "device", "rollouts"):
        raise HTTPException(404, "there is no such page")
    return EventSourceResponse(_told(desk, view, session_of(request)), ping=20, send_timeout=30)


async def _told(desk: Desk, view: View, secret: str) -> AsyncIterator[dict[str, str]]:
    checked = time.monotonic()
    async for message in desk.watches.messages(view):
        if desk.hub is not None and time.monotonic() - checked > SESSION_CHECK_SECONDS:
            checked = time.monotonic()
            if not await asyncio.to_thread(sessions.holds, desk.hub, secret, sessions.SESSION):
                return
        yield {"event": "parts", "data": message}


async def overview(request: Request) -> Response:
    """The fleet at this moment and its diagnosis as JSON, for `fedspine top`."""
    await let_in(request, OPERATOR)
    fleet = await asyncio.to_thread(desk_of(request).source.fleet)
    diagnosis = await asyncio.to_thread(diagnose, fleet)
    run = fleet.current
    known = ("run_id", "status", "round_index", "rounds", "detail", "asked", "answered", "simulated")
    losses = [value for _, value in run.story.values("loss_after")] if run else []
    accuracies = [value for _, value in run.story.values("accuracy")] if run else []
    devices = [{name: v for name, v in asdict(d).items() if name not in ("facts", "sample")} for d in fleet.devices]
    shown = (
        {**{name: getattr(run, name) for name in known}, "losses": losses, "accuracies": accuracies} if run else None
    )
    rollout = asdict(fleet.rollouts[0]) if fleet.rollouts else None
    told = {"now": fleet.now, "run": shown, "rollout": rollout, "devices": devices}
    return JSONResponse({**told, "diagnosis": asdict(diagnosis)})


async def metrics_text(request: Request) -> Response:
    """The fleet for Prometheus."""
    await let_in(request, sessions.METRICS, OPERATOR)
    fleet = await asyncio.to_thread(desk_of(request).source.fleet)
    return Response(await asyncio.to_thread(metrics.exposition, fleet), media_type=metrics.CONTENT_TYPE)
