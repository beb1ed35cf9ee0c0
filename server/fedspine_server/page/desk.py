"""What requests of the page have in common: who asks, what they may, and the form they send.

Comes in: a request. Goes out: what stands behind it, or a refusal.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from urllib.parse import parse_qs, quote

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from fedspine_server.link.credentials import RateLimit
from fedspine_server.link.hub import Hub
from fedspine_server.page import sessions
from fedspine_server.page.stream import Watches
from fedspine_server.page.views import Source

LOGIN_TRIES, LOGIN_SECONDS = 6, 10.0


@dataclass
class Desk:
    """What every request of one process shares; nothing in it has to last.

    Attributes:
        source: Where pages come from.
        hub: The server's; None for a run's directory, which anybody on this machine may read and nobody change.
        watches: Who is told of changes.
        logins: Limit on attempts to sign in.
    """

    source: Source
    hub: Hub | None = None
    watches: Watches = field(init=False)
    logins: RateLimit = field(default_factory=lambda: RateLimit(LOGIN_TRIES, LOGIN_SECONDS))
    closed: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        self.watches = Watches(self.source, self.closed)


Handler = Callable[[Request], Awaitable[Response]]


def desk_of(request: Request) -> Desk:
    """Returns what the process shares."""
    desk: Desk = request.app.state.desk
    return desk


def session_of(request: Request) -> str:
    """Returns the secret of a request's session, empty when it has none."""
    return sessions.secret_of(request.headers.get("cookie", ""))


def guarded(handler: Handler) -> Handler:
    """Lets in who is signed in; sends a person who is not to the door, and refuses a program."""

    async def guarded(request: Request) -> Response:
        hub = desk_of(request).hub
        if hub is None or await asyncio.to_thread(sessions.holds, hub, session_of(request), sessions.SESSION):
            return await handler(request)
        if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
            return RedirectResponse(f"/login?next={quote(request.url.path)}", 303)
        raise HTTPException(401, "expected somebody who is signed in")

    return guarded


def _bearer(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


async def let_in(request: Request, *kinds: str) -> None:
    """Lets in a program with a bearer token of one of these kinds; a run's own page is open to its machine."""
    hub = desk_of(request).hub
    if hub is not None and not await asyncio.to_thread(sessions.holds, hub, _bearer(request), *kinds):
        raise HTTPException(401, "expected a valid bearer token", headers={"WWW-Authenticate": "Bearer"})


async def read_form(request: Request) -> dict[str, str]:
    """Returns the fields of a form, which must not be of another site."""
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise HTTPException(403, "expected a form of this page, found one of another site")
    said = parse_qs((await request.body()).decode("utf-8", "replace"))
    return {name: values[-1] for name, values in said.items()}
