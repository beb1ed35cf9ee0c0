"""The page's ASGI application: it stands beside the link's and shares its port, never its door.

Comes in: requests of browsers. Goes out: pages, their parts as they change, downloads; and what the operator asks is
done by the link's own functions. Every answer forbids what a page here does not need: other origins, inline scripts and
styles, frames, caches.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedspine_edge.errors import FedSpineError
from fedspine_server.link.hub import Hub
from fedspine_server.page import doors, looks, rollout_door
from fedspine_server.page.desk import Desk, guarded
from fedspine_server.page.render import page
from fedspine_server.page.views import Source

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parent / "assets"
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none';"
    " form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
FORM_BYTES, ROLLOUT_BYTES = 4096, 16384  # a rollout may bring a text
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def create_page(source: Source, hub: Hub | None = None) -> Shielded:
    """Returns the page as an application.

    Args:
        source: What it shows.
        hub: Who may sign in, and what actions change; without it the page is read-only and open to this machine.
    """
    closed: Callable[[], bool] = (lambda: hub.bell.closed) if hub is not None else (lambda: False)
    desk = Desk(source, hub, closed=closed)
    routes = [
        Route("/", guarded(looks.fleet)),
        Route("/runs/{run_id}", guarded(looks.run)),
        Route("/runs/{run_id}/model", guarded(looks.model)),
        Route("/runs/{run_id}/rounds/{index:int}", guarded(looks.round)),
        Route("/runs/{run_id}/matrix.json", guarded(looks.matrix)),
        Route("/runs/{run_id}/files/{name}", guarded(looks.file)),
        Route("/devices/{device_id}", guarded(looks.device)),
        Route("/stream", guarded(looks.stream)),
        Route("/overview.json", looks.overview),
        Route("/metrics", looks.metrics_text),
        Route("/favicon.ico", _favicon),
        Mount("/assets", StaticFiles(directory=ASSETS)),
    ]
    if hub is not None:
        routes += [
            Route("/login", doors.login, methods=["GET", "POST"]),
            Route("/rollouts", guarded(looks.rollouts)),
            Route("/rollouts/new", guarded(rollout_door.new_rollout), methods=["GET", "POST"]),
            Route("/logout", guarded(doors.logout), methods=["POST"]),
            Route("/{kind}/{name}/{action}", guarded(doors.action), methods=["GET", "POST"]),
        ]
    handlers: dict[Any, Any] = {HTTPException: _refused, FedSpineError: _failed}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.state.desk = desk
    return Shielded(app, desk, local_only=hub is None)


async def _favicon(request: Request) -> Response:
    return FileResponse(ASSETS / "icon.svg", media_type="image/svg+xml")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _said(request, error.status_code, str(error.detail), dict(error.headers or {}))


async def _failed(request: Request, error: Exception) -> Response:
    logger.error("page failed error=%s", error)
    return _said(request, 507, str(error), {})


def _said(request: Request, status: int, detail: str, headers: dict[str, str]) -> Response:
    if "text/html" in request.headers.get("accept", ""):
        return HTMLResponse(page("error.html", {"title": f"{status}", "detail": detail}), status, headers)
    return Response(json.dumps({"detail": detail}), status, headers, media_type="application/json")


class Shielded:
    """Limits what comes in, forbids with headers what must not happen, and asks who a local page's reader is.

    Args:
        app: The page.
        desk: What its requests share.
        local_only: Whether only this machine may read it.
    """

    def __init__(self, app: ASGIApp, desk: Desk, *, local_only: bool) -> None:
        self._app, self.desk, self._local_only = app, desk, local_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        length = headers.get(b"content-length", "0")
        most = ROLLOUT_BYTES if scope["path"] == "/rollouts/new" else FORM_BYTES
        if scope["method"] == "POST" and not (length.isdigit() and int(length) <= most):
            await Response("expected a small form", 413)(scope, receive, send)
            return
        # A site elsewhere whose name points to this machine must not read what is open on its loopback.
        host = headers.get(b"host", "").rsplit(":", 1)[0]
        if self._local_only and host not in LOOPBACK:
            await Response("expected a loopback address", 421)(scope, receive, send)
            return

        async def shielded(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {name for name, _ in message["headers"]}
                more = [
                    (k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in own - {b"cache-control"}
                ]
                kept = [(k, v) for k, v in message["headers"] if k != b"cache-control"]
                message = {**message, "headers": [*kept, *more]}
            await send(message)

        await self._app(scope, receive, shielded)


class Front:
    """One port, two applications: `/v1/` is the link's, everything else the page's.

    Args:
        link: Behind its gate.
        page: Behind its sign-in.
    """

    def __init__(self, link: ASGIApp, page: ASGIApp) -> None:
        self._link, self._page = link, page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        own = scope["type"] != "http" or scope["path"].startswith("/v1/")
        await (self._link if own else self._page)(scope, receive, send)
