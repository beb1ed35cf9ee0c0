"""The server's ASGI application, and the thread that looks after its runs.

Comes in: a hub. Goes out: an application for any ASGI server; while it is up, rounds open and close by themselves.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError, InterfaceError, OperationalError, SQLAlchemyError
from starlette.types import ASGIApp

from fedspine_edge.errors import CheckpointError, FedSpineError
from fedspine_server.link import device_api, operator_api, rollout_api, rollouts
from fedspine_server.link.gate import Gate
from fedspine_server.link.hub import Hub
from fedspine_server.link.rounds import advance, renew_leases, say_why
from fedspine_server.link.sweeping import sweep
from fedspine_server.link.tables import OFFERED, RUNNING, RunRow, TaskRow

logger = logging.getLogger(__name__)

LONG_AGO = float("-inf")
GATHER_SECONDS = 0.02  # results come in bursts: one look for all of them


class Steward:
    """A thread that moves every run on, renews leases and rings for tasks other processes offered.

    Args:
        hub: What it looks after.
    """

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="steward", daemon=True)
        self._wheel = hub.database.wheel()
        self._swept_at = LONG_AGO
        self._rollout = rollouts.head(hub)
        self.beats = 0
        self.failed = False  # ended by an error that nobody foresaw

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def stop(self) -> None:
        """Ends, after the step under way."""
        self._over.set()
        self._hub.nudge.set()
        self._thread.join()

    def _work(self) -> None:
        try:
            self._look_after_runs()
        finally:
            self.failed = not self._over.is_set()
            self._wheel.let_go()

    def _look_after_runs(self) -> None:
        while not self._over.is_set():
            self._hub.nudge.clear()
            moved = False
            try:
                moved = self.tend()
            except (FedSpineError, SQLAlchemyError, OSError) as error:
                # A full disk or a lost database: everything stands where it stood, and the next tick tries again.
                logger.exception("steward failed error=%s", type(error).__name__)
            self.beats += 1
            if not moved and self._hub.nudge.wait(self._hub.settings.tick_seconds):
                self._over.wait(GATHER_SECONDS)

    def tend(self) -> bool:
        """Does all that is due once; returns whether anything was. One process moves runs on, each wakes its polls."""
        moved = self._drive() if self._wheel.held() else False
        with self._hub.database.read() as session:
            offered = session.scalars(select(TaskRow.device_id).where(TaskRow.status == OFFERED)).all()
        self._hub.bell.ring(offered)
        newest = rollouts.head(self._hub)
        if newest != self._rollout:
            self._rollout = newest
            self._hub.bell.ring_all()
        return moved

    def _drive(self) -> bool:
        hub = self._hub
        with hub.database.read() as session:
            running = list(session.scalars(select(RunRow.run_id).where(RunRow.status == RUNNING)))
        moved = renew_leases(hub) + rollouts.settle(hub) > 0
        for run_id in running:
            try:
                moved = advance(hub, run_id) or moved
            except CheckpointError as error:
                # One run's damage is not the others'.
                if say_why(hub, run_id, str(error)):
                    logger.error("run stands run=%s reason=%s", run_id, error)
        if hub.clock() - self._swept_at > hub.settings.sweep_seconds:
            self._swept_at = hub.clock()
            sweep(hub)
        return moved


async def _say_what_is_wrong(_: Request, error: Exception) -> JSONResponse:
    """Names the fields and says why; what came in is not sent back, for it may be anything."""
    assert isinstance(error, RequestValidationError)
    said = [{"loc": list(found["loc"])[:8], "msg": found["msg"][:200]} for found in error.errors()[:8]]
    return JSONResponse({"detail": said}, status_code=422)


async def _say_that_it_cannot_be_kept(_: Request, error: Exception) -> JSONResponse:
    """The database's disk is full, its server away, or another process was quicker: the call may succeed later."""
    logger.error("database failed error=%s", error)
    return JSONResponse({"detail": "expected a database that can be written, found none now"}, status_code=507)


async def _say_what_the_program_says(_: Request, error: Exception) -> JSONResponse:
    """The server's disk is full, or what lies on it is damaged."""
    assert isinstance(error, FedSpineError)
    logger.error("call failed error=%s", error)
    return JSONResponse({"detail": str(error), "hint": error.hint}, status_code=507)


def create_app(hub: Hub, steward: Steward | None = None) -> ASGIApp:
    """Returns the application; its steward, a new one when none is given, lives as long as its lifespan."""
    steward = steward or Steward(hub)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        hub.bell.open(asyncio.get_running_loop())
        steward.start()
        try:
            yield
        finally:
            await asyncio.to_thread(steward.stop)
            hub.database.close()

    app = FastAPI(
        title="FedSpine link",
        version="1",
        description="Between a FedSpine server and its devices. Everything but health and enroll needs a bearer token.",
        lifespan=lifespan,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )
    app.state.hub = hub
    app.add_exception_handler(RequestValidationError, _say_what_is_wrong)
    app.add_exception_handler(FedSpineError, _say_what_the_program_says)
    for unkept in (OperationalError, InterfaceError, IntegrityError):
        app.add_exception_handler(unkept, _say_that_it_cannot_be_kept)
    app.include_router(device_api.router)
    app.include_router(operator_api.router)
    app.include_router(rollout_api.devices)
    app.include_router(rollout_api.operators)
    return Gate(app, hub)
