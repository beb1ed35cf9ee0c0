"""What changed, sent to every browser that looks: one watch a view and process, however many look.

Comes in: a source. Goes out: messages for server-sent events, each the parts of a page that are new. A view is made
anew only when the source's stamp moved, or after `STALE_SECONDS`, since neither silence nor every report moves it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable

from sqlalchemy.exc import SQLAlchemyError

from fedspine_edge.errors import FedSpineError
from fedspine_server.page.render import Part, View, parts_of
from fedspine_server.page.views import Fleet, Source

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.8  # an event is seen within two seconds
STALE_SECONDS = 1.2  # progress within a device's last few seconds of being seen moves no stamp either
WAITING_MESSAGES = 8


class Snapshots:
    """The fleet, read at most once for every stamp whatever is asked of it.

    Args:
        source: Where it comes from.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._stamp: object = None
        self._read_at = float("-inf")
        self._fleet: Fleet | None = None

    def fleet(self) -> Fleet:
        """Returns the fleet at this moment, or as it was when nothing has happened since."""
        stamp, now = self.source.stamp(), time.monotonic()
        if self._fleet is None or stamp != self._stamp or now - self._read_at > STALE_SECONDS:
            self._fleet, self._stamp, self._read_at = self.source.fleet(), stamp, now
        return self._fleet


class Watches:
    """The views that somebody looks at.

    Args:
        source: Where pages come from.
        over: Whether the server is stopping.
    """

    def __init__(self, source: Source, over: Callable[[], bool]) -> None:
        self._snapshots = Snapshots(source)
        self._over = over
        self._watches: dict[View, _Watch] = {}

    async def messages(self, view: View) -> AsyncIterator[str]:
        """Yields all parts of a view, then those that change, until the server stops."""
        watch = self._watches.get(view)
        if watch is None:
            watch = self._watches[view] = _Watch(view, self._snapshots, self._over)
        queue: asyncio.Queue[str | None] = asyncio.Queue(WAITING_MESSAGES)
        await watch.join(queue)
        try:
            while (message := await queue.get()) is not None:
                yield message
        finally:
            if watch.leave(queue):
                self._watches.pop(view, None)


class _Watch:
    def __init__(self, view: View, snapshots: Snapshots, over: Callable[[], bool]) -> None:
        self._view, self._snapshots, self._over = view, snapshots, over
        self._queues: set[asyncio.Queue[str | None]] = set()
        self._parts: dict[str, Part] = {}
        self._fleet: Fleet | None = None
        self._ready = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def join(self, queue: asyncio.Queue[str | None]) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._look())
        await self._ready.wait()
        queue.put_nowait(_message(list(self._parts.values()), self._fleet))
        self._queues.add(queue)

    def leave(self, queue: asyncio.Queue[str | None]) -> bool:
        self._queues.discard(queue)
        if not self._queues and self._task is not None:
            self._task.cancel()
        return not self._queues

    async def _look(self) -> None:
        while not self._over():
            try:
                found = await asyncio.to_thread(self._made)
            except (FedSpineError, SQLAlchemyError, OSError) as error:
                logger.warning("page not made view=%s error=%s", self._view.page, type(error).__name__)
                found = None
            if found is not None:
                self._tell(found)
            self._ready.set()
            await asyncio.sleep(TICK_SECONDS)
        for queue in list(self._queues):
            _put(queue, None)

    def _made(self) -> list[Part] | None:
        fleet = self._snapshots.fleet()
        if fleet is self._fleet:
            return None
        self._fleet = fleet
        return parts_of(self._view, fleet, self._snapshots.source)

    def _tell(self, parts: list[Part]) -> None:
        changed = [p for p in parts if p.id not in self._parts or self._parts[p.id].signature != p.signature]
        self._parts = {part.id: part for part in parts}
        if not changed or not self._queues:
            return
        message = _message(changed, self._fleet)
        for queue in list(self._queues):
            if queue.full():  # a browser that does not keep up is shown everything once it does
                while not queue.empty():
                    queue.get_nowait()
                _put(queue, _message(parts, self._fleet))
            else:
                queue.put_nowait(message)


def _put(queue: asyncio.Queue[str | None], message: str | None) -> None:
    while queue.full():
        queue.get_nowait()
    queue.put_nowait(message)


def _message(parts: list[Part], fleet: Fleet | None) -> str:
    ids = {part.id for part in parts}
    sent = [[part.id, part.html] for part in parts if part.inside not in ids]
    return json.dumps({"now": fleet.now if fleet else 0, "parts": sent})
