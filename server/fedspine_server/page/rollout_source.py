"""Rollouts and models as the page shows them, from a server's database.

Comes in: a hub. Goes out: values; the newest rollout with every device, the earlier ones as counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import func, select

from fedspine_server.link import models, rollout_views
from fedspine_server.link.hub import Hub
from fedspine_server.link.rollout_schemas import RolloutDevice
from fedspine_server.link.tables import RolloutDeviceRow, RolloutRow
from fedspine_server.page.views import ModelFile, Rollout, RolloutPart

MOST_ROLLOUTS = 12


def read_rollouts(hub: Hub) -> tuple[Rollout, ...]:
    """Returns the latest rollouts, newest first."""
    with hub.database.read() as session:
        rows = list(session.scalars(select(RolloutRow).order_by(RolloutRow.rollout_id.desc()).limit(MOST_ROLLOUTS)))
        ids = [row.rollout_id for row in rows]
        asked = select(RolloutDeviceRow.rollout_id, RolloutDeviceRow.state, func.count())
        grouped = asked.group_by(RolloutDeviceRow.rollout_id, RolloutDeviceRow.state)
        told = session.execute(grouped.where(RolloutDeviceRow.rollout_id.in_(ids))).all() if ids else []
    newest = rollout_views.views(hub, ids[0])[0] if ids else None
    return tuple(
        Rollout(
            rollout_id=row.rollout_id,
            status=row.status,
            model=row.model_name,
            model_bytes=row.model_bytes,
            gate=row.gate["text"],
            created_at=row.created_at,
            detail=row.detail,
            counts=newest.counts if newest and not index else {s: n for i, s, n in told if i == row.rollout_id},
            parts=_parts(newest.devices) if newest and not index else (),
        )
        for index, row in enumerate(rows)
    )


def _parts(devices: Sequence[RolloutDevice]) -> tuple[RolloutPart, ...]:
    """Who needs a look first, then who is at work, canaries before others."""
    place = {name: index for index, name in enumerate(("failed", "checking", "installed", "downloading", "waiting"))}
    ordered = sorted(devices, key=lambda d: (place.get(d.state, len(place)), not d.canary, d.device_id))
    return tuple(map(_part, ordered))


def _part(device: RolloutDevice) -> RolloutPart:
    return RolloutPart(
        device.device_id, device.canary, device.state, device.reason, device.received_bytes,
        device.figures or {}, device.base or {},
    )  # fmt: skip


def read_models(hub: Hub) -> tuple[ModelFile, ...]:
    """Returns the models that can be rolled out, newest first."""
    return tuple(ModelFile(row.sha256, row.name, row.num_bytes, row.added_at) for row in models.views(hub))


def served_models(hub: Hub) -> Mapping[str, str]:
    """Returns device_id -> name of the model it said it serves when it reported last."""
    with hub.database.read() as session:
        named = session.execute(select(RolloutRow.model_sha256, RolloutRow.model_name)).all()
        told = session.execute(
            select(RolloutDeviceRow.device_id, RolloutDeviceRow.report).order_by(RolloutDeviceRow.rollout_id)
        ).all()
    names = {row.model_sha256: row.model_name for row in named}
    latest = {row.device_id: row.report.get("current") for row in told}
    return {device_id: names.get(sha256, sha256[:12]) for device_id, sha256 in latest.items() if sha256}
