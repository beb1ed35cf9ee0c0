"""The gate before every call: who is it, and how much may they send; no other code sees a request that fails here.

Comes in: raw ASGI requests. Goes out: requests whose sender is known (in `request.state.principal`) and whose body ends
before its limit. Everything is closed but `OPEN`; bodies of strangers are not read.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedspine_server.link.credentials import Principal, principal_of
from fedspine_server.link.hub import Hub

OPEN = frozenset({("POST", "/v1/enroll"), ("GET", "/v1/health"), ("HEAD", "/v1/health")})
"""All that answers without a token."""

BODY_BYTES = 64 << 10
OPERATOR_BODY_BYTES = 256 << 20
UPLOAD = "/v1/upload/"


class Gate:
    """ASGI middleware: authenticates and limits.

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
        body = await _whole_body(receive, limit) if _declares_at_most(headers, limit) else None
        if body is None:
            # What is still to come of the body is not worth reading.
            await _answer(send, 413, f"expected a body of at most {limit} bytes", {"Connection": "close"})
            return
        await self._app(scope, _replayed(body, receive), send)

    async def _principal(self, headers: Mapping[bytes, bytes]) -> Principal | None:
        scheme, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        if scheme.lower() != "bearer" or not token.isascii():
            return None
        token, now = token.strip(), self._hub.clock()
        known = self._hub.tokens.get(token, now)
        if known is None:
            known = await asyncio.to_thread(self._look_up, token, now)
            if known is not None:
                self._hub.tokens.put(token, known, now)
        return known

    def _look_up(self, token: str, now: float) -> Principal | None:
        with self._hub.database.read() as session:
            return principal_of(session, token, now=now)

    def _limit(self, path: str, principal: Principal | None) -> int:
        if principal is not None and principal.kind == "operator":
            return OPERATOR_BODY_BYTES
        return self._hub.settings.chunk_bytes if principal is not None and path.startswith(UPLOAD) else BODY_BYTES


def _declares_at_most(headers: Mapping[bytes, bytes], limit: int) -> bool:
    declared = headers.get(b"content-length", b"0")
    return declared.isdigit() and len(declared) < len(str(limit)) + 2 and int(declared) <= limit


async def _whole_body(receive: Receive, limit: int) -> bytes | None:
    """Returns a body, None as soon as it is past its limit: a length may lie, and a chunked body has none."""
    parts, total, more = list[bytes](), 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return b""  # the client is gone; nobody reads an answer
        parts.append(message.get("body", b""))
        total += len(parts[-1])
        more = message.get("more_body", False)
        if total > limit:
            return None
    return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _answer(send: Send, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
    body = json.dumps({"detail": detail}).encode()
    fixed = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
    pairs = [(name.encode(), value.encode()) for name, value in fixed.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
