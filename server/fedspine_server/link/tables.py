"""What the server remembers, as tables: devices, credentials, runs, tasks, results, models, rollouts, events.

Comes in: nothing. Goes out: the mapped classes. Arrays are never in the database: a run's state and every message are
blobs on disk, named here by their SHA-256. Times are the server's own clock, seconds since 1970.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, Integer, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

SCHEMA_VERSION = 3
ONLY_FEWER_TABLES = (2,)
"""Older versions that lack whole tables and differ in nothing else."""

PENDING, ACCEPTED, REVOKED = "pending", "accepted", "revoked"
"""Status of a device: it may do nothing but wait until the operator accepts it."""

RUNNING, STOPPED, FINISHED = "running", "stopped", "finished"
"""Status of a run."""

OFFERED, LEASED, DONE, FAILED, EXPIRED = "offered", "leased", "done", "failed", "expired"
"""Status of a task: waiting to be fetched, being worked on, answered, answered with a reason, no longer wanted."""

KEPT, LATE, REFUSED = "kept", "late", "refused"
"""What became of a result when it came; `FAILED` where the device says why it has none."""


class Table(DeclarativeBase):
    """The tables' common ancestor."""

    # Bytes and seeds need 64 bits; SQLite's integers have them, and number its rows only under their plain name.
    type_annotation_map = {dict[str, Any]: JSON, int: BigInteger().with_variant(Integer, "sqlite")}  # noqa: RUF012


class SchemaRow(Table):
    """The version of these tables that a database was made with."""

    __tablename__ = "fedspine_schema"

    version: Mapped[int] = mapped_column(primary_key=True)


class CredentialRow(Table):
    """A claim token or an operator's token; only its hash is kept."""

    __tablename__ = "credentials"

    sha256: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    created_at: Mapped[float]
    expires_at: Mapped[float | None]


class DeviceRow(Table):
    """A device that has enrolled; `facts` is what it said of itself last, `sample` what its sensors said last."""

    __tablename__ = "devices"

    device_id: Mapped[str] = mapped_column(primary_key=True)
    secret_sha256: Mapped[str]
    status: Mapped[str]
    facts: Mapped[dict[str, Any]]
    sample: Mapped[dict[str, Any]]
    num_examples: Mapped[int]
    memory_bytes: Mapped[int]
    base_sha256: Mapped[str]
    boot_id: Mapped[str]
    link_version: Mapped[int]
    enrolled_at: Mapped[float]
    last_seen_at: Mapped[float]


class RunRow(Table):
    """A run; `state_sha256` names the coordinator's state and changes only together with the events that explain it.

    `experiment` is the operator's file as it was given; the server keeps it for `runs fetch` and reads nothing of it.
    """

    __tablename__ = "runs"

    run_id: Mapped[str] = mapped_column(primary_key=True)
    status: Mapped[str]
    recipe: Mapped[dict[str, Any]]
    experiment: Mapped[dict[str, Any]]
    options: Mapped[dict[str, Any]]
    base_sha256: Mapped[str]
    state_sha256: Mapped[str]
    adapter_sha256: Mapped[str]
    round_index: Mapped[int]
    rounds: Mapped[int]
    created_at: Mapped[float]
    opened_at: Mapped[float | None]
    closing_at: Mapped[float | None]
    detail: Mapped[str]


class TaskRow(Table):
    """One assignment of one device; `attempt` counts how often it was handed out."""

    __tablename__ = "tasks"
    __table_args__ = (
        UniqueConstraint("run_id", "round_index", "device_id"),
        Index("tasks_of_device", "device_id", "status"),
        Index("tasks_by_status", "status"),
    )

    task_id: Mapped[str] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.run_id"))
    round_index: Mapped[int]
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.device_id"))
    status: Mapped[str]
    attempt: Mapped[int]
    spec: Mapped[dict[str, Any]]
    blob_sha256: Mapped[str]
    blob_bytes: Mapped[int]
    max_update_bytes: Mapped[int]
    created_at: Mapped[float]
    lease_until: Mapped[float | None]


class ResultRow(Table):
    """What came back for one attempt of a task; the primary key is what makes a second delivery change nothing.

    `closed_with` is the round in whose closing a late result was judged; it changes together with the run's state.
    """

    __tablename__ = "results"

    task_id: Mapped[str] = mapped_column(ForeignKey("tasks.task_id"), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[str]
    round_index: Mapped[int]
    device_id: Mapped[str]
    fate: Mapped[str]
    staleness: Mapped[int]
    closed_with: Mapped[int | None]
    blob_sha256: Mapped[str | None]
    seconds: Mapped[dict[str, Any]]
    detail: Mapped[str | None]
    received_at: Mapped[float]


class ModelRow(Table):
    """A model file that can be rolled out; its bytes are the blob of that hash."""

    __tablename__ = "models"

    sha256: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    num_bytes: Mapped[int]
    added_at: Mapped[float]


class RolloutRow(Table):
    """What the operator wants the devices to run; the highest number counts.

    `gate` has the operator's `text` and its `conditions`, `targets` the `canaries` and the `devices` (null: all).
    """

    __tablename__ = "rollouts"

    rollout_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    status: Mapped[str]
    model_sha256: Mapped[str]
    model_name: Mapped[str]
    model_bytes: Mapped[int]
    gate: Mapped[dict[str, Any]]
    targets: Mapped[dict[str, Any]]
    created_at: Mapped[float]
    detail: Mapped[str]


class RolloutDeviceRow(Table):
    """What a device reported of a rollout last."""

    __tablename__ = "rollout_devices"

    rollout_id: Mapped[int] = mapped_column(ForeignKey("rollouts.rollout_id"), primary_key=True)
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.device_id"), primary_key=True)
    state: Mapped[str]
    report: Mapped[dict[str, Any]]
    reported_at: Mapped[float]


class EventRow(Table):
    """One thing that happened, for people and for the audit; never read to decide anything."""

    __tablename__ = "events"
    __table_args__ = (Index("events_of_run", "run_id"),)

    event_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    at: Mapped[float]
    kind: Mapped[str]
    run_id: Mapped[str | None]
    device_id: Mapped[str | None]
    detail: Mapped[dict[str, Any]]
