"""The calls a device makes, over one kept-alive TLS connection to a server whose CA it pinned.

Comes in: an identity. Goes out: plain values, files, or one of three errors that say what to do: try again later, stop,
or give up this task. Nothing here trusts the board's clock.

Source: docs/link.md; the server's OpenAPI document.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import ssl
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import urllib3

from fedspine_edge.agent.identity import Identity, fingerprint
from fedspine_edge.atomic import sync_directory
from fedspine_edge.errors import CheckpointError, LinkError

LINK_OLDEST, LINK_NEWEST = 1, 1
CONNECT_SECONDS, READ_SECONDS = 10.0, 30.0
MAX_REPLY_BYTES = 4 << 20
PART_BYTES = 1 << 18
AGAIN = (408, 425, 429, 500, 502, 503, 504, 507)
"""Statuses after which the same call may succeed later."""


class UnreachableError(LinkError):
    """The server cannot be reached or cannot answer now: try again later."""


class DismissedError(LinkError):
    """The server does not want this device or this boot of it: stop, and stay stopped (exit code 7)."""

    exit_code = 7


class NotTakenError(LinkError):
    """The server does not take what was sent: give it up."""


def pinned_context(ca: str) -> ssl.SSLContext:
    """Returns a TLS context that trusts one CA and nothing else."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cadata=ca)
    except (ssl.SSLError, ValueError) as error:
        raise LinkError(f"expected the fleet's CA certificate, found: {error}", hint="join again") from error
    return context


def fetch_ca(url: str, expected: str) -> str:
    """Returns the CA certificate of a server, which must have the expected fingerprint.

    This one call does not verify the server: the fingerprint, which came with the token, proves the CA, and every call
    after this one is verified by it.

    Raises:
        LinkError: Another CA, or none.
        UnreachableError: No answer.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with open_pool(context) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore", urllib3.exceptions.InsecureRequestWarning)
        reply = request(pool, "GET", f"{url}/v1/health", {}, None, READ_SECONDS)
    ca = str((reply or {}).get("ca", ""))
    if fingerprint(ca) != expected:
        found = fingerprint(ca)[:12] or "none"
        raise LinkError(
            f"expected the CA {expected[:12]} at {url}, found {found}",
            hint="somebody else answers there, or the token is of another server: compare with `fedspine serve --init`",
        )
    return ca


class Link:
    """The calls of one device in one boot.

    Args:
        identity: Who this is.
        boot_id: Which start of the agent; the newest one owns the identity.
    """

    def __init__(self, identity: Identity, boot_id: str) -> None:
        self._url = identity.url.rstrip("/")
        self._pool = open_pool(pinned_context(identity.ca) if self._url.startswith("https:") else None)
        self._headers = {"Authorization": f"Bearer {identity.device_id}.{identity.secret}", "X-Boot": boot_id}
        self.boot_id = boot_id

    def enroll(self, identity: Identity, claim: str, facts: Mapping[str, Any]) -> str:
        """Asks to be let in and returns the device's status."""
        body = {"claim": claim, "device_id": identity.device_id, "secret": identity.secret, "facts": facts}
        return str(request(self._pool, "POST", f"{self._url}/v1/enroll", {}, body, READ_SECONDS)["status"])

    def hello(self, inventory: Mapping[str, Any], task: Mapping[str, Any] | None) -> dict[str, Any]:
        """Begins, or begins again; returns what the server says."""
        versions = {"boot_id": self.boot_id, "link_oldest": LINK_OLDEST, "link_newest": LINK_NEWEST}
        reply: dict[str, Any] = self._call("POST", "/v1/hello", {**versions, **inventory, "task": task})
        return reply

    def task(self, wait_seconds: float, done: str | None = None) -> dict[str, Any] | None:
        """Waits for a task, or for another order of a rollout than the one done; None when there is neither."""
        more = f"&rollout={done}" if done is not None else ""
        path = f"/v1/task?wait={wait_seconds:g}{more}"
        reply: dict[str, Any] | None = self._call("GET", path, None, wait_seconds + READ_SECONDS)
        return reply

    def rollout(self, rollout_id: int, report: Mapping[str, Any]) -> dict[str, Any]:
        """Says how far a rollout is; returns whether to go on."""
        reply: dict[str, Any] = self._call("POST", f"/v1/rollout/{rollout_id}", report)
        return reply

    def progress(self, task_id: str, report: Mapping[str, Any]) -> dict[str, Any]:
        """Says how far the work is; returns whether to go on."""
        reply: dict[str, Any] = self._call("POST", f"/v1/task/{task_id}/progress", report)
        return reply

    def result(self, task_id: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Ends a task; returns what became of it."""
        reply: dict[str, Any] = self._call("POST", f"/v1/task/{task_id}/result", manifest, 10 * READ_SECONDS)
        return reply

    def download(
        self, sha256: str, num_bytes: int, path: Path, on_part: Callable[[int], None] = lambda received: None
    ) -> None:
        """Fetches a blob, going on where an earlier try broke off; the file is there whole or not at all.

        `on_part` is called with the bytes that are there after each part of at most `PART_BYTES`.

        Raises:
            UnreachableError: It broke off; what came is kept.
            NotTakenError: The server has no such blob for this device, or another one.
            CheckpointError: The disk is full.
        """
        if path.is_file() and _hash_of(path) == sha256:
            return
        partial = path.with_name(f"{sha256}.partial")
        try:
            if not any(self._fetched(sha256, num_bytes, partial, on_part) for _ in range(2)):
                raise NotTakenError(f"expected blob {sha256[:12]}, found other bytes, from its beginning on")
            partial.replace(path)
            sync_directory(path.parent)
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error.strerror or error}", hint="free some space") from error

    def _fetched(self, sha256: str, num_bytes: int, partial: Path, on_part: Callable[[int], None]) -> bool:
        """Fetches what is missing of a blob; other bytes, as a power cut may leave them, are thrown away."""
        with partial.open("ab") as file:
            if file.tell() > num_bytes:
                file.truncate(0)
            self._receive(sha256, num_bytes, file, on_part)
            file.flush()
            os.fsync(file.fileno())
        if _hash_of(partial) == sha256:
            return True
        partial.unlink()
        return False

    def _receive(self, sha256: str, num_bytes: int, file: Any, on_part: Callable[[int], None]) -> None:
        if file.tell() == num_bytes:
            return
        headers = {**self._headers, "Range": f"bytes={file.tell()}-"}
        url = f"{self._url}/v1/blob/{sha256}"
        try:
            timeout = urllib3.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS)
            reply = self._pool.request("GET", url, headers=headers, preload_content=False, timeout=timeout)
            try:
                if reply.status not in (200, 206):
                    raise _error(reply.status, _json(reply.read(MAX_REPLY_BYTES)))
                if reply.status == 200:
                    file.truncate(0)
                left = num_bytes - file.tell()
                while left > 0 and (part := reply.read(min(PART_BYTES, left))):
                    file.write(part)
                    left -= len(part)
                    on_part(num_bytes - left)
            finally:
                reply.drain_conn() if reply.status >= 400 else reply.close()
        except urllib3.exceptions.HTTPError as error:
            raise UnreachableError(f"download broke off: {_cause(error)}") from error
        if left > 0:
            raise UnreachableError(f"download broke off {left} bytes before its end")

    def upload(self, task: Mapping[str, Any], path: Path) -> dict[str, str]:
        """Sends a file in chunks, going on where an earlier try broke off; a small one goes with the task's result.

        Returns:
            What the result has to say beside its hash and size.
        """
        if path.stat().st_size <= task.get("inline_bytes", 0):
            return {"content": base64.b64encode(path.read_bytes()).decode()}
        place, attempt, size = f"/v1/upload/{task['task_id']}", int(task["attempt"]), int(task["chunk_bytes"])
        index = 0  # a single chunk is sent again sooner than asked for
        if path.stat().st_size > size:
            index = int(self._call("HEAD", f"{place}?attempt={attempt}", None)["x-chunks"])
        with path.open("rb") as file:
            file.seek(index * size)
            while chunk := file.read(size):
                self._put(f"{place}/{index}?attempt={attempt}", chunk)
                index += 1
        return {}

    def _put(self, path: str, chunk: bytes) -> None:
        headers = {
            **self._headers,
            "X-Chunk-SHA256": hashlib.sha256(chunk).hexdigest(),
            "Content-Type": "application/octet-stream",
        }
        request(self._pool, "PUT", self._url + path, headers, chunk, READ_SECONDS)

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None, seconds: float = READ_SECONDS) -> Any:
        return request(self._pool, method, self._url + path, self._headers, body, seconds)

    def close(self) -> None:
        """Closes the connection."""
        self._pool.clear()


def open_pool(context: ssl.SSLContext | None) -> urllib3.PoolManager:
    """Returns a pool of two connections, one for reports during a download; without a context plain HTTP, in tests."""
    return urllib3.PoolManager(num_pools=1, maxsize=2, retries=False, ssl_context=context)


def request(
    pool: urllib3.PoolManager, method: str, url: str, headers: Mapping[str, str], body: Any, read_seconds: float
) -> Any:
    """Makes one call: JSON or raw bytes in, JSON (for HEAD: the headers) out.

    Raises:
        UnreachableError: No answer, or one that says to try again.
        DismissedError: The server knows no such device, or another boot of it owns the identity.
        NotTakenError: Any other refusal.
    """
    headers = dict(headers)
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body, allow_nan=False).encode()
        headers["Content-Type"] = "application/json"
    try:
        timeout = urllib3.Timeout(connect=CONNECT_SECONDS, read=read_seconds)
        reply = pool.request(method, url, headers=headers, body=body, preload_content=False, timeout=timeout)
        try:
            content = reply.read(MAX_REPLY_BYTES)
        finally:
            reply.drain_conn()
            reply.release_conn()
    except urllib3.exceptions.HTTPError as error:
        raise UnreachableError(
            f"expected an answer of {url.partition('/v1')[0]}, found: {_cause(error)}",
            hint="is the server up, the address right and the port open?",
        ) from error
    if reply.status >= 400:
        raise _error(reply.status, _json(content))
    if method == "HEAD":
        return {name.lower(): value for name, value in reply.headers.items()}
    return _json(content) if reply.status != 204 else None


def _error(status: int, reply: Any) -> LinkError:
    detail = reply.get("detail") if isinstance(reply, dict) else None
    words = detail if isinstance(detail, str) else json.dumps(detail)[:500]
    message = f"server answered {status}: {words}"
    if status in AGAIN:
        return UnreachableError(message)
    if status == 401:
        return DismissedError(message, hint="this device was revoked or never enrolled: ask the operator for a token")
    if status == 409 and "taken over" in words:
        return DismissedError(message, hint="two machines have the identity of one device: let one of them join anew")
    return NotTakenError(message)


def _json(content: bytes) -> Any:
    try:
        return json.loads(content) if content else None
    except ValueError as error:
        raise UnreachableError(f"expected JSON, found {content[:40]!r}") from error


def _cause(error: BaseException) -> str:
    reason = getattr(error, "reason", None) or error
    return str(reason).rpartition(": ")[2] or type(reason).__name__


def _hash_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(PART_BYTES):
            digest.update(part)
    return digest.hexdigest()
