"""Rollouts as the operator sees them: desired against reported, device by device.

Comes in: the tables. Goes out: `RolloutView`s.
"""

from __future__ import annotations

from collections import Counter

from fastapi import HTTPException
from sqlalchemy import select
from sqlalchemy.orm import Session

from fedspine_server import rollout as law
from fedspine_server.link.hub import Hub
from fedspine_server.link.rollout_schemas import ModelOrder, RolloutDevice, RolloutView
from fedspine_server.link.rollouts import of_row
from fedspine_server.link.tables import ACCEPTED, REVOKED, DeviceRow, RolloutDeviceRow, RolloutRow

MOST_ROLLOUTS = 20


def views(hub: Hub, rollout_id: int | None = None) -> list[RolloutView]:
    """Returns the latest rollouts, newest first, or one.

    Raises:
        HTTPException: 404 for an unknown one.
    """
    wanted = select(RolloutRow).order_by(RolloutRow.rollout_id.desc()).limit(MOST_ROLLOUTS)
    if rollout_id is not None:
        wanted = wanted.where(RolloutRow.rollout_id == rollout_id)
    with hub.database.read() as session:
        rows = list(session.scalars(wanted))
        if rollout_id is not None and not rows:
            raise HTTPException(404, f"expected a rollout, found none of number {rollout_id}")
        seen = session.execute(select(DeviceRow.device_id, DeviceRow.status, DeviceRow.last_seen_at)).all()
        known = {device_id: (status, last_seen_at) for device_id, status, last_seen_at in seen}
        return [_view(session, row, known, hub.clock(), newest=index == 0) for index, row in enumerate(rows)]


def _view(
    session: Session, row: RolloutRow, known: dict[str, tuple[str, float]], now: float, *, newest: bool
) -> RolloutView:
    told = {
        found.device_id: found
        for found in session.scalars(select(RolloutDeviceRow).where(RolloutDeviceRow.rollout_id == row.rollout_id))
    }
    rollout = of_row(row)
    waits = newest and row.status in (*law.UNSETTLED, law.FINISHED)
    # Devices that joined since belong to the newest rollout alone.
    meant = {name for name, (status, _) in known.items() if waits and status == ACCEPTED and rollout.is_for(name)}
    names = sorted(
        {*told, *meant, *rollout.canaries} & set(known), key=lambda name: (name not in rollout.canaries, name)
    )
    devices = [_device(name, rollout, told.get(name), known[name], now) for name in names]
    return RolloutView(
        rollout_id=row.rollout_id,
        status=row.status,
        detail=row.detail,
        model=ModelOrder(sha256=row.model_sha256, num_bytes=row.model_bytes, name=row.model_name),
        gate=row.gate["text"],
        own_passage=bool(row.gate.get("passage")),
        canaries=list(rollout.canaries),
        for_devices=None if rollout.devices is None else list(rollout.devices),
        created_at=row.created_at,
        counts=dict(Counter(device.state for device in devices)),
        devices=devices,
    )


def _device(
    name: str, rollout: law.Rollout, told: RolloutDeviceRow | None, known: tuple[str, float], now: float
) -> RolloutDevice:
    status, last_seen_at = known
    report = told.report if told else {}
    state = told.state if told else law.WAITING
    undecided = state not in (*law.DECIDED, law.TAKEN_BACK)
    return RolloutDevice(
        device_id=name,
        canary=name in rollout.canaries,
        state=REVOKED if status == REVOKED and undecided else state,
        reason=report.get("reason", ""),
        received_bytes=report.get("received_bytes", 0),
        figures=report.get("figures"),
        base=report.get("base"),
        reported_at=told.reported_at if told else None,
        last_seen_seconds=max(0.0, now - last_seen_at),
    )
