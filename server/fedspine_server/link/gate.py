"""The gate before every call: who is it, and how much may they send; no other code sees a request that fails here.

Comes in: raw ASGI requests. Goes out: requests whose sender is known (in `request.state.principal`) and whose body ends
before its limit. Everything is closed but `OPEN`; bodies of strangers are not read.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedspine_edge.errors import FedSpineError
from fedspine_server.link.credentials import Principal, principal_of
from fedspine_server.link.hub import Hub

OPEN = frozenset({("POST", "/v1/enroll"), ("GET", "/v1/health"), ("HEAD", "/v1/health")})
"""All that answers without a token."""

BODY_BYTES = 64 << 10
OPERATOR_BODY_BYTES = 256 << 20
UPLOAD = "/v1/upload/"


class _TooLargeError(Exception):
    """A body went past its limit."""


class Gate:
    """ASGI middleware: authenticates, limits, and turns the program's own errors into answers.

    Args:
        app: What stands behind.
        hub: Where tokens are known.
    """

    def __init__(self, app: ASGIApp, hub: Hub) -> None:
        self._app = app
        self._hub = hub

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request through, or answers it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"expected http, found {scope['type']}")  # websockets are not accepted at all
        headers = {name.lower(): value for name, value in scope["headers"]}
        principal = await self._principal(headers)
        if principal is None and (scope["method"], scope["path"]) not in OPEN:
            await _answer(send, 401, "expected a valid bearer token", {"WWW-Authenticate": "Bearer"})
            return
        scope.setdefault("state", {})["principal"] = principal
        limit = self._limit(scope["path"], principal)
        if not _declares_at_most(headers, limit):
            await _answer(send, 413, f"expected a body of at most {limit} bytes")
            return
        await self._through(scope, _limited(receive, limit), send)

    async def _principal(self, headers: Mapping[bytes, bytes]) -> Principal | None:
        scheme, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        if scheme.lower() != "bearer" or not token.isascii():
            return None
        return await asyncio.to_thread(self._look_up, token.strip())

    def _look_up(self, token: str) -> Principal | None:
        with self._hub.database.read() as session:
            return principal_of(session, token, now=self._hub.clock())

    def _limit(self, path: str, principal: Principal | None) -> int:
        if principal is not None and principal.kind == "operator":
            return OPERATOR_BODY_BYTES
        return self._hub.settings.chunk_bytes if principal is not None and path.startswith(UPLOAD) else BODY_BYTES

    async def _through(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except _TooLargeError:
            if not begun:
                await _answer(send, 413, "expected a smaller body")
        except FedSpineError as error:
            if begun:
                raise
            await _answer(send, 507, str(error), hint=error.hint)


def _declares_at_most(headers: Mapping[bytes, bytes], limit: int) -> bool:
    declared = headers.get(b"content-length", b"0")
    return declared.isdigit() and len(declared) < len(str(limit)) + 2 and int(declared) <= limit


def _limited(receive: Receive, limit: int) -> Receive:
    """Counts what really comes: a length may lie, and a chunked body has none."""
    total = 0

    async def counted() -> Message:
        nonlocal total
        message = await receive()
        if message["type"] == "http.request":
            total += len(message.get("body", b""))
            if total > limit:
                raise _TooLargeError
        return message

    return counted


async def _answer(
    send: Send, status: int, detail: str, headers: Mapping[str, str] | None = None, *, hint: str | None = None
) -> None:
    body = json.dumps({"detail": detail} | ({"hint": hint} if hint else {})).encode()
    fixed = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
    pairs = [(name.encode(), value.encode()) for name, value in fixed.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
