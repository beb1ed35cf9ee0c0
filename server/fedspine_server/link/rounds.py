"""The rounds of a run with real devices: opened, closed and kept, around the coordinator's pure functions.

Comes in: a run's row. Goes out: the next one. Each step is one transaction on the condition that nobody else made it
meanwhile, so a server may die at any point and several may look after one run: what counts is what is committed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.orm import Session

from fedspine_server import coordinator
from fedspine_server.closing import round_end
from fedspine_server.link.answers import Answers, device_results, late_results
from fedspine_server.link.hub import Hub
from fedspine_server.link.offers import offer, task_deadline_seconds
from fedspine_server.link.tables import (
    ACCEPTED,
    EXPIRED,
    FINISHED,
    KEPT,
    LATE,
    LEASED,
    OFFERED,
    RUNNING,
    DeviceRow,
    ResultRow,
    RunRow,
    TaskRow,
)
from fedspine_server.spool import Spool
from fedspine_server.state import RunState, adapter_sha256

logger = logging.getLogger(__name__)


class _OvertakenError(Exception):
    """Another process, or the operator, changed the run in the meantime."""


def advance(hub: Hub, run_id: str) -> bool:
    """Does the next thing that is due for a run; returns whether there was one.

    Raises:
        CheckpointError: A blob is damaged or the disk is full; the run stands where it stood.
    """
    with hub.database.read() as session:
        run = session.get(RunRow, run_id)
    if run is None or run.status != RUNNING:
        return False
    try:
        return _open(hub, run) if run.opened_at is None else _close(hub, run)
    except _OvertakenError:
        logger.info("round overtaken run=%s round=%d", run_id, run.round_index)
        return False


def say_why(hub: Hub, run_id: str, detail: str) -> bool:
    """Shows the operator why a run stands where it stands; returns whether that is new."""
    new = (RunRow.run_id == run_id, RunRow.detail != detail)
    with hub.database.write() as session:
        done: Any = session.execute(update(RunRow).where(*new).values(detail=detail))
        return bool(done.rowcount)


def renew_leases(hub: Hub) -> int:
    """Offers tasks again whose lease ran out, and returns how many."""
    now = hub.clock()
    # A task of a round that is over stays with who has it: nobody waits for it, but it may still come late.
    current = TaskRow.round_index == select(RunRow.round_index).where(RunRow.run_id == TaskRow.run_id).scalar_subquery()
    expired = select(TaskRow).where(TaskRow.status == LEASED, TaskRow.lease_until < now, current)
    with hub.database.read() as session:
        if session.scalars(expired.limit(1)).first() is None:
            return 0
    with hub.database.write() as session:
        tasks = session.scalars(expired.with_for_update()).all()
        for task in tasks:
            task.status = OFFERED
            hub.record(
                session, "lease_ran_out", run_id=task.run_id, device_id=task.device_id, round_index=task.round_index
            )
    return len(tasks)


def _open(hub: Hub, run: RunRow) -> bool:
    """Hands out the assignments of the next round once enough devices are there."""
    present = _present(hub, run)
    if len(present) < run.options["min_devices"]:
        _say(hub, run, f"waiting for {run.options['min_devices']} devices with this base model, found {len(present)}")
        return False
    state = coordinator.enlist(
        hub.state(run.state_sha256),
        (coordinator.Participant(d.device_id, d.num_examples, d.memory_bytes) for d in present),
    )
    assignments, state = coordinator.assign(state)
    packed: dict[bytes, tuple[str, int]] = {}
    tasks = [offer(hub, run, state, assignment, packed) for assignment in assignments]
    state_sha256 = hub.keep_state(state)
    with hub.database.write() as session:
        _commit(session, run, state_sha256=state_sha256, opened_at=hub.clock(), closing_at=None, detail="")
        session.add_all(tasks)
        hub.record(session, "round_opened", run_id=run.run_id, round_index=run.round_index, devices=len(tasks))
    hub.bell.ring([task.device_id for task in tasks])
    return True


def _present(hub: Hub, run: RunRow) -> list[DeviceRow]:
    """The devices that can take part: accepted, with this base model and examples, heard of lately."""
    since = hub.clock() - run.options["present_seconds"]
    fit: list[ColumnElement[bool]] = [
        DeviceRow.status == ACCEPTED,
        DeviceRow.base_sha256 == run.base_sha256,
        DeviceRow.num_examples > 0,
        DeviceRow.last_seen_at >= since,
    ]
    with hub.database.read() as session:
        return list(session.scalars(select(DeviceRow).where(*fit).order_by(DeviceRow.device_id)))


def _close(hub: Hub, run: RunRow) -> bool:
    """Ends the round that is open, if its time has come."""
    assert run.opened_at is not None
    state = hub.state(run.state_sha256)
    if run.closing_at is None:
        end = _end(hub, run, state)
        if end is None:
            return False
        with hub.database.write() as session:
            # From here on results are late: what counts is settled before the work of merging begins.
            _commit(session, run, closing_at=end)
        run.closing_at = end
    with hub.database.read() as session:
        # Not by the time they came: what was committed before the closing was not late, whatever a clock says.
        rows = [row for row in _results(session, run) if row.fate != LATE]
        facts = {device.device_id: device.facts for device in session.scalars(select(DeviceRow))}
        # Recorded seconds are those of a fleet that had no late updates to merge.
        late_rows = [] if run.options.get("timings") else _late(session, run)
    answers = Answers(rows, facts, run.opened_at, run.closing_at, run.round_index, run.options.get("timings"))
    with Spool(hub.blobs.scratch) as spool:
        results, round_seconds = device_results(answers, hub.blobs, spool)
        late = late_results(late_rows, facts, hub.blobs, spool)
        state = coordinator.close_round(state, results, round_seconds=round_seconds, late=late)
    _keep(hub, run, state, [row.task_id for row, _ in late_rows])
    return True


def _end(hub: Hub, run: RunRow, state: RunState) -> float | None:
    """When the round ends, on the server's clock; None while it goes on."""
    assert run.opened_at is not None
    now = hub.clock()
    with hub.database.read() as session:
        own = (TaskRow.run_id == run.run_id, TaskRow.round_index == run.round_index)
        counts = session.execute(select(TaskRow.status, func.count()).where(*own).group_by(TaskRow.status)).all()
        kept = (ResultRow.run_id == run.run_id, ResultRow.round_index == run.round_index, ResultRow.fate == KEPT)
        came = session.scalars(select(ResultRow.received_at).where(*kept)).all()
    waiting = sum(count for status, count in counts if status in (OFFERED, LEASED))
    if not waiting:
        return now
    limit = math.inf if run.options.get("timings") else min(_deadlines(state), default=math.inf)
    quorum = math.ceil(state.settings.min_quorum * sum(count for _, count in counts))
    arrivals = [at - run.opened_at for at in came]
    end = round_end(arrivals, num_waiting=waiting, limit=limit, quorum=quorum)
    end = run.opened_at + min(end, run.options["round_timeout_seconds"])
    return now if end <= now else None


def _deadlines(state: RunState) -> list[float]:
    each = (task_deadline_seconds(state, device_id) for device_id in state.open_choices)
    return [seconds for seconds in each if seconds is not None]


def _results(session: Session, run: RunRow) -> list[ResultRow]:
    own = (ResultRow.run_id == run.run_id, ResultRow.round_index == run.round_index)
    return list(session.scalars(select(ResultRow).where(*own).order_by(ResultRow.device_id, ResultRow.attempt)))


def _late(session: Session, run: RunRow) -> list[tuple[ResultRow, TaskRow]]:
    """The late results of earlier rounds that no closing has judged yet."""
    unjudged = (ResultRow.fate == LATE, ResultRow.closed_with.is_(None))
    own = (ResultRow.run_id == run.run_id, ResultRow.round_index < run.round_index)
    rows = select(ResultRow, TaskRow).join(TaskRow, TaskRow.task_id == ResultRow.task_id).where(*own, *unjudged)
    return [(result, task) for result, task in session.execute(rows)]


def _keep(hub: Hub, run: RunRow, state: RunState, late_tasks: Sequence[str]) -> None:
    state_sha256, record = hub.keep_state(state), state.history[-1]
    over = state.round_index == state.settings.rounds
    with hub.database.write() as session:
        _commit(
            session,
            run,
            state_sha256=state_sha256,
            adapter_sha256=adapter_sha256(state),
            round_index=state.round_index,
            status=FINISHED if over else RUNNING,
            detail="",
            opened_at=None,
            closing_at=None,
        )
        judged = (ResultRow.task_id.in_(late_tasks), ResultRow.fate == LATE)
        session.execute(update(ResultRow).where(*judged).values(closed_with=run.round_index))
        # Who has fetched a task may still answer late; one nobody fetched is no longer wanted, nor is any at the end.
        still_open = (TaskRow.run_id == run.run_id, TaskRow.status.in_((OFFERED, LEASED)))
        unfetched = (TaskRow.attempt == 0, TaskRow.round_index == run.round_index)
        session.execute(update(TaskRow).where(*still_open, *(() if over else unfetched)).values(status=EXPIRED))
        session.execute(update(TaskRow).where(*still_open).values(status=LEASED))
        _record_round(hub, session, run, record)
    logger.info("round closed run=%s round=%d merged=%d", run.run_id, run.round_index, record["num_merged"])


def _record_round(hub: Hub, session: Session, run: RunRow, record: Mapping[str, Any]) -> None:
    devices = record["devices"]
    for device in devices:
        if device["state"] == "rejected":
            hub.record(
                session,
                "update_rejected",
                run_id=run.run_id,
                device_id=device["device_id"],
                round_index=run.round_index,
                reason=device["detail"],
            )
    hub.record(
        session,
        "round_closed",
        run_id=run.run_id,
        round_index=run.round_index,
        merged=[device["device_id"] for device in devices if device["state"] == "merged"],
        late={late["device_id"]: late["detail"] or late["state"] for late in record["late"]},
        missing={d["device_id"]: d["detail"] for d in devices if d["state"] not in ("merged", "away")},
        loss_after=record["loss_after"],
        recorded_timings=bool(run.options.get("timings")),
    )


def _commit(session: Session, run: RunRow, **values: Any) -> None:
    """Changes a run on the condition that it still is what this process read."""
    same = (RunRow.run_id == run.run_id, RunRow.state_sha256 == run.state_sha256, RunRow.status == RUNNING)
    done: Any = session.execute(update(RunRow).where(*same).values(**values))
    if done.rowcount != 1:
        raise _OvertakenError


def _say(hub: Hub, run: RunRow, detail: str) -> None:
    if run.detail != detail:
        with hub.database.write() as session:
            _commit(session, run, detail=detail)
