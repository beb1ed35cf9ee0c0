"""What every call of one server process shares: database, blobs, clock, the bell that ends a long poll.

Comes in: a directory and settings. Goes out: `Hub`. All that lasts is in the database and the blobs, so any number of
processes may serve one fleet, and any of them may die.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from fedspine_edge.errors import CheckpointError
from fedspine_server import store
from fedspine_server.link.blobs import BlobStore
from fedspine_server.link.credentials import KnownTokens, RateLimit
from fedspine_server.link.database import Database
from fedspine_server.link.tables import EventRow
from fedspine_server.state import RunState

CACHED_STATES = 4
CACHED_MESSAGES = 64  # small ones


@dataclass(frozen=True)
class LinkSettings:
    """How the server talks to devices.

    Attributes:
        lease_seconds: A task is offered again when nothing was heard of it for so long.
        progress_seconds: How often a device at work reports.
        wait_seconds: Longest long poll.
        chunk_bytes: Size of an upload's chunks; the last may be smaller.
        inline_bytes: A message or update of at most so much travels within its task or result, not in calls of its own.
        tick_seconds: How often runs are looked after when nothing happens.
        enroll_tries: Enrolments in a row from one address.
        enroll_seconds: After how long one more is allowed.
        sweep_seconds: How often unused blobs are removed, and how old they must be.
    """

    lease_seconds: float = 60.0
    progress_seconds: float = 10.0
    wait_seconds: float = 25.0
    chunk_bytes: int = 2 << 20
    inline_bytes: int = 32 << 10
    tick_seconds: float = 0.5
    enroll_tries: int = 20
    enroll_seconds: float = 3.0
    sweep_seconds: float = 3600.0


class Bell:
    """Wakes the long poll of a device; rung from any thread, waited for in the event loop."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[str, asyncio.Event] = {}
        self._closed = False

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Binds the bell to the loop that waits for it."""
        self._loop = loop

    def listen(self, device_id: str) -> asyncio.Event:
        """Returns what the next ring for a device sets; taken before looking, so that no ring is missed."""
        event = self._waiting.setdefault(device_id, asyncio.Event())
        if self._closed:
            event.set()
        return event

    def ring(self, device_ids: Iterable[str]) -> None:
        """Wakes these devices' polls."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._set, list(device_ids))

    def ring_all(self) -> None:
        """Wakes every poll."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(lambda: self._set(list(self._waiting)))

    def close_soon(self) -> None:
        """Ends every poll, now and from now on; called from any thread when the server is to stop."""
        self._closed = True
        self.ring_all()

    @property
    def closed(self) -> bool:
        """Whether the server is stopping."""
        return self._closed

    def _set(self, device_ids: list[str]) -> None:
        for device_id in device_ids:
            event = self._waiting.pop(device_id, None)
            if event is not None:
                event.set()


@dataclass
class Hub:
    """Everything a call may need.

    Attributes:
        database: Tables.
        blobs: Messages and states.
        ca: The CA's certificate, PEM; empty without TLS.
        settings: How to talk.
        clock: Seconds since 1970.
        started_at: When this process began: what it could not have heard before says nothing of a device.
        bell: Ends long polls.
        nudge: Set when a run may have something to do.
        enrollments: Limit on enrolments.
        tokens: Whose tokens were seen a moment ago.
    """

    database: Database
    blobs: BlobStore
    ca: str = ""
    settings: LinkSettings = LinkSettings()
    clock: Callable[[], float] = time.time
    bell: Bell = field(default_factory=Bell)
    nudge: threading.Event = field(default_factory=threading.Event)
    started_at: float = field(init=False)
    enrollments: RateLimit = field(init=False)
    tokens: KnownTokens = field(default_factory=KnownTokens)

    def __post_init__(self) -> None:
        self.started_at = self.clock()
        self.enrollments = RateLimit(self.settings.enroll_tries, self.settings.enroll_seconds)
        self._load = functools.lru_cache(CACHED_STATES)(self._read_state)
        self._read_small = functools.lru_cache(CACHED_MESSAGES)(self._as_base64)

    def state(self, sha256: str) -> RunState:
        """Returns a coordinator's state by the hash of its blob.

        Raises:
            CheckpointError: The blob is damaged.
            KeyError: There is none.
        """
        return self._load(sha256)

    def inline(self, sha256: str, num_bytes: int) -> str | None:
        """Returns a small blob in base64; None for one that is large or damaged, which the device then asks for."""
        if num_bytes > self.settings.inline_bytes:
            return None
        try:
            return self._read_small(sha256)
        except (CheckpointError, KeyError, OSError):
            return None

    def _as_base64(self, sha256: str) -> str:
        return base64.b64encode(self.blobs.read(sha256)).decode()

    def _read_state(self, sha256: str) -> RunState:
        return store.from_bytes(self.blobs.read(sha256))

    def keep_state(self, state: RunState) -> str:
        """Keeps a state and returns its hash; it counts once a transaction names it."""
        return self.blobs.put(store.to_bytes(state))

    def record(
        self, session: Session, kind: str, *, run_id: str | None = None, device_id: str | None = None, **detail: Any
    ) -> None:
        """Adds an event to a transaction."""
        session.add(EventRow(at=self.clock(), kind=kind, run_id=run_id, device_id=device_id, detail=detail))


def steady_clock(after: float) -> Callable[[], float]:
    """Returns a clock that never goes back: not behind what is on record, nor when the machine's clock is set.

    Args:
        after: Seconds since 1970 that have passed for certain.
    """
    offset = max(time.time(), after) - time.monotonic()
    return lambda: offset + time.monotonic()


def open_hub(directory: Path, *, database: str | None = None, ca: str = "", **more: Any) -> Hub:
    """Opens what a server keeps in a directory, and makes it when missing.

    Args:
        directory: Blobs, uploads, and the SQLite file.
        database: URL of another database.
        ca: The CA's certificate, PEM.
        **more: Further fields of `Hub`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    url = database or f"sqlite:///{(directory / 'fedspine.sqlite').resolve()}"
    opened = Database(url)
    with opened.read() as session:
        last = session.scalars(select(EventRow.at).order_by(EventRow.event_id.desc()).limit(1)).first()
    return Hub(opened, BlobStore(directory), ca, **{"clock": steady_clock(last or 0.0), **more})
