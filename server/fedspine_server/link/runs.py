"""Runs: begun, stopped, resumed and shown.

Comes in: what the operator asks. Goes out: rows that the rounds then move on.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from safetensors import SafetensorError
from safetensors.numpy import load as load_blob
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from fedspine_edge.protocol import Layout
from fedspine_server import coordinator
from fedspine_server.link.hub import Hub
from fedspine_server.link.operator_schemas import EventView, RunRequest, RunView
from fedspine_server.link.tables import (
    EXPIRED,
    FINISHED,
    LEASED,
    OFFERED,
    RUNNING,
    STOPPED,
    EventRow,
    ResultRow,
    RunRow,
    TaskRow,
)
from fedspine_server.settings import RunSettings
from fedspine_server.state import RunState, adapter_sha256

MAX_EVENTS = 1000


def start(hub: Hub, request: RunRequest) -> RunView:
    """Begins a run.

    Raises:
        HTTPException: 409 for a name that is taken, 422 for settings, layout or task head that do not fit.
    """
    state = _first_state(request)
    timings = request.options.timings
    if timings is not None and len(timings) < state.settings.rounds:
        raise HTTPException(422, f"expected {state.settings.rounds} recorded rounds, found {len(timings)}")
    state_sha256 = hub.keep_state(state)
    with hub.database.write() as session:
        if session.get(RunRow, request.run_id) is not None:
            raise HTTPException(409, f"run name {request.run_id} is taken: choose another with --name")
        session.add(
            RunRow(
                run_id=request.run_id,
                status=RUNNING,
                recipe=request.recipe.model_dump(),
                experiment=request.experiment,
                options=request.options.model_dump(),
                base_sha256=state.layout.base_sha256,
                state_sha256=state_sha256,
                adapter_sha256=adapter_sha256(state),
                round_index=0,
                rounds=state.settings.rounds,
                created_at=hub.clock(),
                opened_at=None,
                closing_at=None,
                detail="",
            )
        )
        hub.record(session, "run_started", run_id=request.run_id, recorded_timings=timings is not None)
    hub.nudge.set()
    return views(hub, request.run_id)[0]


def _first_state(request: RunRequest) -> RunState:
    try:
        settings, layout = RunSettings.from_json(request.settings), Layout.from_json(request.layout)
        task_head = load_blob(bytes(request.task_head)) if request.task_head else {}
        return dataclasses.replace(coordinator.init(settings, layout, task_head), run_id=request.run_id)
    except (ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise HTTPException(422, f"expected settings and a layout that fit, found: {error}") from error


def set_status(hub: Hub, run_id: str, status: str) -> RunView:
    """Stops a run, or goes on with a stopped one where it stood.

    Raises:
        HTTPException: 404 for an unknown run, 409 for one that is over.
    """
    with hub.database.write() as session:
        run = session.scalars(select(RunRow).where(RunRow.run_id == run_id).with_for_update()).first()
        if run is None:
            raise HTTPException(404, f"expected a run, found none named {run_id}")
        if run.status == FINISHED:
            raise HTTPException(409, f"run {run_id} is over after {run.rounds} rounds")
        if run.status != status:
            run.status = status
            _stop_tasks(session, run_id) if status == STOPPED else _offer_again(session, run)
            hub.record(session, f"run_{'resumed' if status == RUNNING else status}", run_id=run_id)
    hub.nudge.set()
    return views(hub, run_id)[0]


def _stop_tasks(session: Session, run_id: str) -> None:
    wanted = (TaskRow.run_id == run_id, TaskRow.status.in_((OFFERED, LEASED)))
    session.execute(update(TaskRow).where(*wanted).values(status=EXPIRED))


def _offer_again(session: Session, run: RunRow) -> None:
    """The round that was open when the run stopped goes on with the same assignments."""
    answered = select(ResultRow.task_id).where(ResultRow.run_id == run.run_id)
    wanted = (TaskRow.run_id == run.run_id, TaskRow.round_index == run.round_index, TaskRow.status == EXPIRED)
    session.execute(update(TaskRow).where(*wanted, TaskRow.task_id.not_in(answered)).values(status=OFFERED))


def views(hub: Hub, run_id: str | None = None) -> list[RunView]:
    """Returns every run, or one, as the operator sees it.

    Raises:
        HTTPException: 404 for an unknown run.
    """
    with hub.database.read() as session:
        chosen = select(RunRow).order_by(RunRow.created_at)
        runs = list(session.scalars(chosen if run_id is None else chosen.where(RunRow.run_id == run_id)))
        if run_id is not None and not runs:
            raise HTTPException(404, f"expected a run, found none named {run_id}")
        return [_view(session, run) for run in runs]


def _view(session: Session, run: RunRow) -> RunView:
    own = (TaskRow.run_id == run.run_id, TaskRow.round_index == run.round_index)
    statuses = Counter(session.scalars(select(TaskRow.status).where(*own)))
    options: dict[str, Any] = {name: value for name, value in run.options.items() if name != "timings"}
    return RunView(
        run_id=run.run_id,
        status=run.status,
        round_index=run.round_index,
        rounds=run.rounds,
        recorded_timings=run.options["timings"] is not None,
        adapter_sha256=run.adapter_sha256,
        state_sha256=run.state_sha256,
        base_sha256=run.base_sha256,
        detail=run.detail,
        recipe=run.recipe,
        experiment=run.experiment,
        options=options,
        tasks=dict(statuses),
    )


def state_path(hub: Hub, run_id: str) -> Path:
    """Returns the file of a run's present state."""
    return hub.blobs.path(views(hub, run_id)[0].state_sha256)


def events(hub: Hub, run_id: str | None, after: int) -> list[EventView]:
    """Returns what happened since an event, at most `MAX_EVENTS`, oldest first."""
    wanted = select(EventRow).where(EventRow.event_id > after).order_by(EventRow.event_id).limit(MAX_EVENTS)
    if run_id is not None:
        wanted = wanted.where(EventRow.run_id == run_id)
    with hub.database.read() as session:
        return [
            EventView(
                event_id=row.event_id,
                at=row.at,
                kind=row.kind,
                run_id=row.run_id,
                device_id=row.device_id,
                detail=row.detail,
            )
            for row in session.scalars(wanted)
        ]
