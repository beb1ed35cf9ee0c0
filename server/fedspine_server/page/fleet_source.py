"""The page's content from a server's database: all of it on record there, so every server process shows the same.

Comes in: a hub. Goes out: a `Source`. Nothing is written; what a device said is passed on as text and never as more.
"""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from fedspine_edge.errors import CheckpointError
from fedspine_server.arms import schedule_ratio
from fedspine_server.link.devices import TOUCH_SECONDS
from fedspine_server.link.hub import Hub
from fedspine_server.link.tables import (
    ACCEPTED,
    LEASED,
    OFFERED,
    REVOKED,
    RUNNING,
    DeviceRow,
    EventRow,
    RunRow,
    TaskRow,
)
from fedspine_server.page.rollout_source import read_models, read_rollouts, served_models
from fedspine_server.page.story import Story
from fedspine_server.page.structure import groups_of
from fedspine_server.page.views import (
    PAUSED,
    PENDING,
    SILENT,
    WAITING,
    WORKING,
    Device,
    Event,
    Fleet,
    Group,
    Run,
)
from fedspine_server.page.views import REVOKED as SHUT_OUT
from fedspine_server.state import RunState

GRACE_SECONDS = 10.0
MOST_RUNS, MOST_EVENTS, MOST_STORIES = 12, 40, 4
STATE_FILE = "state.safetensors"
HIDDEN = ("round_index", "recorded_timings")
LONG_HASH = re.compile(r"[0-9a-f]{32,}")


class FleetSource:
    """A fleet on record.

    Args:
        hub: The server's.
    """

    writable = True

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._stories: dict[str, Story] = {}  # by hash of the state they are from: the same in every process
        self._lock = threading.Lock()

    def stamp(self) -> Hashable:
        """Returns what changes with every event, every new "last seen" and every word about a run."""
        with self._hub.database.read() as session:
            last_event = session.scalar(select(func.max(EventRow.event_id)))
            seen = session.execute(select(func.max(DeviceRow.last_seen_at), func.count())).one()
            latest = select(RunRow.run_id, RunRow.status, RunRow.state_sha256, RunRow.opened_at, RunRow.detail)
            runs = session.execute(latest.where(RunRow.status == RUNNING)).all()
        return last_event, tuple(seen), tuple(tuple(run) for run in runs)

    def fleet(self) -> Fleet:
        """Returns everything at this moment."""
        now = self._hub.clock()
        with self._hub.database.read() as session:
            rows = list(session.scalars(select(RunRow).order_by(RunRow.created_at.desc()).limit(MOST_RUNS)))
            runs = tuple(self._run(session, row) for row in rows)
            devices = list(session.scalars(select(DeviceRow).order_by(DeviceRow.device_id)))
            at_work = list(session.scalars(select(TaskRow).where(TaskRow.status.in_((LEASED, OFFERED)))))
            tasks = {task.device_id: task for task in at_work}
            events = list(session.scalars(select(EventRow).order_by(EventRow.event_id.desc()).limit(MOST_EVENTS)))
        rollouts, models = read_rollouts(self._hub), read_models(self._hub)
        fleet = Fleet(now, (), runs, tuple(_event(event) for event in events), rollouts, models)
        asked = self._reasons(rows, fleet.current)
        shown = tuple(self._device(device, tasks.get(device.device_id), fleet, asked) for device in devices)
        return dataclasses.replace(fleet, devices=_with_models(shown, fleet, self._hub))

    def structure(self, run_id: str) -> tuple[Group, ...]:
        """Returns what is left of each layer."""
        state = self._state(run_id)
        return () if state is None else groups_of(state)

    def file(self, run_id: str, name: str) -> Path | None:
        """Returns the coordinator's state, the one file a server has of a run."""
        with self._hub.database.read() as session:
            run = session.get(RunRow, run_id)
        if run is None or name != STATE_FILE:
            return None
        return self._hub.blobs.path(run.state_sha256)

    def _state(self, run_id: str) -> RunState | None:
        with self._hub.database.read() as session:
            run = session.get(RunRow, run_id)
        try:
            return None if run is None else self._hub.state(run.state_sha256)
        except (CheckpointError, KeyError):
            return None  # the run stands, and its detail says why

    def _reasons(self, rows: Sequence[RunRow], current: Run | None) -> Mapping[str, str]:
        run = next((row for row in rows if current is not None and row.run_id == current.run_id), None)
        state = None if run is None or run.opened_at is None else self._state(run.run_id)
        return {} if state is None else {name: choice.reason for name, choice in state.open_choices.items()}

    def _run(self, session: Session, row: RunRow) -> Run:
        own = (TaskRow.run_id == row.run_id, TaskRow.round_index == row.round_index)
        tasks = session.execute(select(TaskRow.status, TaskRow.spec).where(*own)).all()
        story, settings = self._story(session, row)
        deadlines = [spec["deadline_seconds"] for _, spec in tasks if spec["deadline_seconds"] is not None]
        opened = row.opened_at
        return Run(
            run_id=row.run_id,
            status=row.status,
            round_index=row.round_index,
            rounds=row.rounds,
            detail=row.detail,
            story=story,
            asked=len(tasks),
            answered=sum(status not in (LEASED, OFFERED) for status, _ in tasks),
            opened_at=opened,
            deadline_at=opened + min(deadlines) if opened is not None and deadlines else None,
            controller=settings.controller if settings else "",
            target_sparsity=settings.target_sparsity if settings else 0.0,
            schedule_ratio=schedule_ratio(settings, min(row.round_index, row.rounds - 1)) if settings else None,
            recorded=row.options.get("timings") is not None,
            started_at=row.created_at,
        )

    def _story(self, session: Session, row: RunRow) -> tuple[Story, Any]:
        try:
            state = self._hub.state(row.state_sha256)
        except (CheckpointError, KeyError):
            return Story(), None
        with self._lock:
            known = self._stories.get(row.run_id)
            if known is not None and len(known.rounds) == len(state.history):
                return known, state.settings
        closed = select(EventRow.at).where(EventRow.run_id == row.run_id, EventRow.kind == "round_closed")
        times = [at - row.created_at for at in session.scalars(closed.order_by(EventRow.event_id))]
        wall = tuple(times) if len(times) == len(state.history) else (None,) * len(state.history)
        story = Story(state.history, wall)
        with self._lock:
            while len(self._stories) >= MOST_RUNS:
                self._stories.pop(next(iter(self._stories)))
            self._stories[row.run_id] = story
        return story, state.settings

    def _device(self, row: DeviceRow, task: TaskRow | None, fleet: Fleet, reasons: Mapping[str, str]) -> Device:
        run = fleet.run(task.run_id) if task is not None else fleet.current
        last = run.story.last(row.device_id) if run is not None else None
        sample, facts = row.sample, row.facts
        working = task is not None and task.status == LEASED
        own = sample if working and task is not None and sample.get("round_index") == task.round_index else {}
        spec = task.spec if task is not None else last or {}
        condition = self._condition(row, working=working, paused=bool(own.get("paused")), now=fleet.now)
        return Device(
            device_id=row.device_id,
            condition=condition,
            board=facts.get("board") or "",
            l4t=facts.get("l4t") or "",
            seen_at=row.last_seen_at,
            memory_bytes=facts.get("memory_bytes") or row.memory_bytes,
            memory_available_bytes=sample.get("memory_available_bytes"),
            temperature_celsius=sample.get("temperature_celsius"),
            power_watts=sample.get("power_watts"),
            energy_joules=sample.get("energy_joules"),
            throttled_by=tuple(sample.get("throttled_by") or ()),
            step=own.get("step", 0),
            num_steps=own.get("num_steps", 0) or (spec.get("num_steps", 0) if working else 0),
            done_at=_done_at(own, task) if working else None,
            pruning_ratio=spec.get("pruning_ratio"),
            rank=spec.get("rank"),
            reason=(reasons.get(row.device_id) or (last or {}).get("reason") or "") if run else "",
            run_id=run.run_id if run and (task or last) else "",
            marks=run.story.marks(row.device_id) if run else (),
            last_state=last["state"] if last else "",
            problem=_problem(condition, own, last),
            num_examples=row.num_examples,
            facts=facts,
            sample=sample,
        )

    def _condition(self, row: DeviceRow, *, working: bool, paused: bool, now: float) -> str:
        if row.status != ACCEPTED:
            return SHUT_OUT if row.status == REVOKED else PENDING
        settings = self._hub.settings
        usual = 3 * settings.progress_seconds if working else settings.wait_seconds + TOUCH_SECONDS
        if now - row.last_seen_at > usual + GRACE_SECONDS:
            return SILENT
        return PAUSED if paused else WORKING if working else WAITING


def _with_models(devices: tuple[Device, ...], fleet: Fleet, hub: Hub) -> tuple[Device, ...]:
    if not fleet.rollouts:
        return devices
    served, parts = served_models(hub), {part.device_id: part.state for part in fleet.rollouts[0].parts}
    return tuple(
        dataclasses.replace(d, model=served.get(d.device_id, ""), rollout_state=parts.get(d.device_id, ""))
        for d in devices
    )


def _done_at(sample: Mapping[str, Any], task: TaskRow | None) -> float | None:
    """When a device will be done, from how far it came since the task was offered."""
    step, num_steps = sample.get("step", 0), sample.get("num_steps", 0)
    if task is None or not step or not num_steps:
        return None
    spent = float(sample["at"]) - task.created_at
    return float(round(sample["at"] + spent * (num_steps - step) / step))


def _problem(condition: str, sample: Mapping[str, Any], last: Mapping[str, Any] | None) -> str:
    if condition == PAUSED:
        return str(sample["paused"])
    if last is not None and last["state"] in ("rejected", "dropped", "late"):
        return f"{last['state']}: {last['detail'] or 'no answer'}"
    return ""


def _event(row: EventRow) -> Event:
    detail = {name: value for name, value in row.detail.items() if value not in (None, "", False, [], {}, 0)}
    if "round_index" in row.detail:
        detail = {"round": row.detail["round_index"] + 1, **detail}
    said = (f"{name.replace('_', ' ')} {_words(value)}" for name, value in detail.items() if name not in HIDDEN)
    text = ", ".join(word for word in said if word != "attempt 1")
    return Event(row.event_id, row.at, row.kind, row.run_id or "", row.device_id or "", text[:300])


def _words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_words(entry)}" for key, entry in value.items())
    if isinstance(value, str):
        return f"{value[:12]}…" if LONG_HASH.fullmatch(value) else value
    return str(len(value)) if isinstance(value, list) else str(value)
