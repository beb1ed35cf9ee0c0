"""Rollouts on record: begun, taken back, followed by devices, settled by the process that moves the runs on.

Comes in: what the operator asks and what devices report. Goes out: rows; what each device is to do follows from them by
the pure functions of `rollout`, so that any server process says the same, before and after a restart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import HTTPException
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from fedspine_edge.errors import UsageError
from fedspine_edge.rollout_gate import Condition, from_json, parse, to_json
from fedspine_server import rollout as law
from fedspine_server.link.devices import touch
from fedspine_server.link.hub import Hub
from fedspine_server.link.rollout_schemas import (
    ModelOrder,
    OrderReply,
    RolloutOrder,
    RolloutReply,
    RolloutReport,
    RolloutRequest,
)
from fedspine_server.link.tables import ACCEPTED, DeviceRow, ModelRow, RolloutDeviceRow, RolloutRow

PRESENT_SECONDS = 120.0
AWAY_SECONDS = 600.0  # not waited for: longer than a reboot, and far longer than a device at work is silent
MOST_DETAIL = 500
_NEWEST = select(RolloutRow).order_by(RolloutRow.rollout_id.desc()).limit(1)
_HEAD = select(RolloutRow.rollout_id, RolloutRow.status).order_by(RolloutRow.rollout_id.desc()).limit(1)


def of_row(row: RolloutRow) -> law.Rollout:
    """Returns a rollout as the pure functions see it."""
    devices = row.targets["devices"]
    return law.Rollout(
        row.rollout_id,
        row.status,
        row.model_sha256,
        from_json(row.gate["conditions"]),
        tuple(row.targets["canaries"]),
        None if devices is None else tuple(devices),
    )


def start(hub: Hub, request: RolloutRequest) -> int:
    """Begins a rollout and returns its number.

    Raises:
        HTTPException: 404 for a model that was not uploaded, 409 while another is under way or begun at the same
            moment, 422 for a gate or devices that are none.
    """
    try:
        conditions = parse(request.gate)
    except UsageError as error:
        raise HTTPException(422, f"{error}; {error.hint}" if error.hint else str(error)) from error
    try:
        with hub.database.write() as session:
            number = _added(hub, session, request, conditions)
    except IntegrityError as error:  # two server processes gave the same number
        raise HTTPException(409, "another rollout was begun at the same moment: look at it before the next") from error
    hub.nudge.set()
    return number


def _added(hub: Hub, session: Session, request: RolloutRequest, conditions: tuple[Condition, ...]) -> int:
    model, newest = session.get(ModelRow, request.model_sha256), session.scalars(_NEWEST).first()
    if model is None:
        raise HTTPException(404, f"expected a model, found none of hash {request.model_sha256[:12]}: upload it")
    if newest is not None and newest.status in law.UNSETTLED:
        if newest.status in law.UNDER_WAY and not request.replace:
            raise HTTPException(
                409,
                f"rollout {newest.rollout_id} is under way ({newest.status}): wait for it, roll it back, or replace it",
            )
        told = filter(None, (f"replaced by rollout {newest.rollout_id + 1}", newest.detail))
        newest.status, newest.detail = law.SUPERSEDED, "; ".join(told)[:MOST_DETAIL]
    number = newest.rollout_id + 1 if newest is not None else 1
    canaries = _canaries(hub, session, request)
    session.add(
        RolloutRow(
            rollout_id=number,
            status=law.CANARY,
            model_sha256=model.sha256,
            model_name=model.name,
            model_bytes=model.num_bytes,
            gate={
                "text": " and ".join(map(str, conditions)),
                "conditions": to_json(conditions),
                "passage": request.passage,
            },
            targets={"canaries": canaries, "devices": request.devices},
            created_at=hub.clock(),
            detail="",
        )
    )
    hub.record(session, "rollout_started", rollout=number, model=model.name, canaries=canaries)
    return number


def would_go_first(hub: Hub, request: RolloutRequest) -> tuple[list[str], int]:
    """Returns the canaries a rollout would have now, and how many devices would follow; changes nothing.

    Raises:
        HTTPException: 422 where it could not be begun.
    """
    with hub.database.read() as session:
        accepted = session.scalars(select(DeviceRow.device_id).where(DeviceRow.status == ACCEPTED)).all()
        meant = [name for name in accepted if request.devices is None or name in request.devices]
        canaries = _canaries(hub, session, request)
    return canaries, len(meant) - len(canaries)


def _canaries(hub: Hub, session: Session, request: RolloutRequest) -> list[str]:
    seen = dict(
        session.execute(select(DeviceRow.device_id, DeviceRow.last_seen_at).where(DeviceRow.status == ACCEPTED)).all()
    )
    for name in [*(request.devices or ()), *(request.canaries or ())]:
        if name not in seen:
            raise HTTPException(422, f"expected accepted devices, found {name}")
    meant = [name for name in seen if request.devices is None or name in request.devices]
    if request.canaries is not None:
        strangers = [name for name in request.canaries if name not in meant]
        if strangers:
            raise HTTPException(422, f"expected canaries among the rollout's devices, found {strangers[0]}")
        return list(dict.fromkeys(request.canaries))
    if len(meant) < request.num_canaries:
        raise HTTPException(422, f"expected {request.num_canaries} devices to go first, found {len(meant)} accepted")
    recent = hub.clock() - PRESENT_SECONDS
    present = [name for name in meant if seen[name] > recent]
    away = [name for name in meant if seen[name] <= recent]
    return law.choose_canaries(present, away, request.num_canaries, model_sha256=request.model_sha256)


def roll_back(hub: Hub, rollout_id: int | None = None) -> int:
    """Has every device that took the newest rollout's model go back to the one before; returns its number.

    Args:
        hub: Where rollouts are.
        rollout_id: Which one the operator means; None for the newest.

    Raises:
        HTTPException: 404 where there is none, 409 for one that is not the newest.
    """
    with hub.database.write() as session:
        row = session.scalars(_NEWEST.with_for_update()).first()
        if row is None:
            raise HTTPException(404, "expected a rollout, found none")
        if rollout_id not in (None, row.rollout_id):
            raise HTTPException(409, f"only the newest rollout can be rolled back: that is {row.rollout_id}")
        if row.status != law.ROLLED_BACK:
            row.status, row.detail = law.ROLLED_BACK, ""
            hub.record(session, "rollout_rolled_back", rollout=row.rollout_id, model=row.model_name)
        number = row.rollout_id
    hub.nudge.set()
    return number


def order_for(hub: Hub, device_id: str, done: str) -> OrderReply | None:
    """Returns what the newest rollout asks of an accepted device; None for nothing, or what it has done already.

    Args:
        hub: Where rollouts are.
        device_id: Which device.
        done: The last order it has done, `NUMBER:KIND`.
    """
    heads = hub.database.rows(_HEAD)
    if not heads:
        return None
    with hub.database.read() as session:
        row = session.get_one(RolloutRow, heads[0].rollout_id)
        told = session.get(RolloutDeviceRow, (row.rollout_id, device_id))
        kind = law.order(of_row(row), device_id, told.state if told else None)
    if kind is None or done == f"{row.rollout_id}:{kind}":
        return None
    model = ModelOrder(sha256=row.model_sha256, num_bytes=row.model_bytes, name=row.model_name)
    gate, passage = row.gate["conditions"], row.gate.get("passage", "")
    order = RolloutOrder(rollout_id=row.rollout_id, kind=kind, model=model, gate=gate, passage=passage)  # type: ignore[arg-type]
    return OrderReply(rollout=order)


def model_bytes_for(session: Session, device_id: str, sha256: str) -> int | None:
    """Returns the size of a blob that the newest rollout has a device fetch; None for any other."""
    row = session.scalars(_NEWEST).first()
    if row is None or row.model_sha256 != sha256:
        return None
    return row.model_bytes if law.order(of_row(row), device_id, None) == law.INSTALL else None


def report(hub: Hub, device_id: str, rollout_id: int, message: RolloutReport) -> RolloutReply:
    """Takes a device's word of where it is, if it can be; says whether it is to go on.

    Raises:
        HTTPException: 404 for an unknown rollout, 409 for one that never asked this of the device.
    """
    with hub.database.write() as session:
        touch(hub, session, device_id)
        row = session.get(RolloutRow, rollout_id)
        if row is None:
            raise HTTPException(404, f"expected a rollout, found none of number {rollout_id}")
        rollout, told = of_row(row), session.get(RolloutDeviceRow, (rollout_id, device_id))
        _check_asked(rollout, device_id, told, message)
        figures, base = _figures(message.figures), _figures(message.base)
        lie = law.verdict(rollout, message.state, figures, base)
        state, reason = (law.FAILED, lie) if lie else (message.state, message.reason)
        if told is None:
            told = RolloutDeviceRow(rollout_id=rollout_id, device_id=device_id, state="", report={}, reported_at=0.0)
            session.add(told)
        if told.state != state and state in (*law.DECIDED, law.TAKEN_BACK):
            hub.record(
                session, f"device_{state}", device_id=device_id, rollout=rollout_id, reason=reason, **(figures or {})
            )
        told.state, told.reported_at = state, hub.clock()
        told.report = {
            "reason": reason[:500], "figures": figures, "base": base, "current": message.current,
            "received_bytes": message.received_bytes,
        }  # fmt: skip
        newest = session.execute(_HEAD).one().rollout_id
        go_on = newest == rollout_id and law.order(rollout, device_id, state) == law.INSTALL
    if state in law.DECIDED:
        hub.nudge.set()
    return RolloutReply(go_on=go_on, detail="" if go_on else f"rollout {rollout_id} is {rollout.status}")


def _check_asked(rollout: law.Rollout, device_id: str, told: RolloutDeviceRow | None, message: RolloutReport) -> None:
    if message.sha256 != rollout.model_sha256:
        raise HTTPException(409, f"expected a report of model {rollout.model_sha256[:12]}, found {message.sha256[:12]}")
    # What was once asked may be answered late: the device decided while nobody heard of it.
    asked = told is not None or device_id in rollout.canaries
    asked = asked or (rollout.status != law.CANARY and rollout.is_for(device_id))
    if not asked:
        raise HTTPException(409, f"rollout {rollout.rollout_id} asks nothing of device {device_id}")
    if message.state == law.TAKEN_BACK and rollout.status != law.ROLLED_BACK:
        raise HTTPException(409, f"rollout {rollout.rollout_id} was not rolled back, it is {rollout.status}")


def _figures(found: Any) -> dict[str, Any] | None:
    return None if found is None else found.model_dump()


def settle(hub: Hub) -> bool:
    """Moves the newest rollout on where its devices' reports allow it; returns whether anything changed."""
    heads = hub.database.rows(_HEAD)
    if not heads or heads[0].status not in law.UNSETTLED:
        return False
    with hub.database.read() as session:  # as a rule nothing has changed, which is no reason to write
        row = session.scalars(_NEWEST).one()
        if _settled(hub, session, row) == (row.status, row.detail):
            return False
    with hub.database.write() as session:
        row = session.scalars(_NEWEST.with_for_update()).one()
        before, (row.status, row.detail) = row.status, _settled(hub, session, row)
        if row.status != before:
            states, _ = _told(session, row.rollout_id)
            told: dict[str, Any] = {name: list(states.values()).count(name) for name in law.DECIDED}
            kind = f"rollout_{row.status}"
            hub.record(session, kind, rollout=row.rollout_id, model=row.model_name, why=row.detail, **told)
    return True


def _settled(hub: Hub, session: Session, row: RolloutRow) -> tuple[str, str]:
    if row.status not in law.UNSETTLED:  # taken back a moment ago
        return row.status, row.detail
    states, reasons = _told(session, row.rollout_id)
    status, detail = law.settled(of_row(row), states, reasons, *_heard_of(hub, session))
    return status, detail[:MOST_DETAIL]


def _heard_of(hub: Hub, session: Session) -> tuple[set[str], set[str]]:
    """Accepted devices, and those of them that are away: a server that was down itself misses nobody at first."""
    seen = session.execute(select(DeviceRow.device_id, DeviceRow.last_seen_at).where(DeviceRow.status == ACCEPTED))
    heard = {device_id: max(last_seen_at, hub.started_at) for device_id, last_seen_at in seen}
    since = hub.clock() - AWAY_SECONDS
    return set(heard), {device_id for device_id, at in heard.items() if at < since}


def _told(session: Session, rollout_id: int) -> tuple[Mapping[str, str], Mapping[str, str]]:
    rows = session.scalars(select(RolloutDeviceRow).where(RolloutDeviceRow.rollout_id == rollout_id)).all()
    return {row.device_id: row.state for row in rows}, {row.device_id: row.report["reason"] for row in rows}


def head(hub: Hub) -> tuple[int, str] | None:
    """Returns number and status of the newest rollout: when it changes, devices are to be woken."""
    heads = hub.database.rows(_HEAD)
    return tuple(heads[0]) if heads else None
