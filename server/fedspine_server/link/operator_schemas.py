"""What the operator may say and is told, checked field by field; see `schemas` for what devices say.

Comes in: JSON from outside. Goes out: typed, bounded values.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Base64Bytes, Field

from fedspine_server.link.schemas import Message, Name, Recipe


class RunOptions(Message):
    """How rounds are held with real devices.

    Attributes:
        min_devices: Devices that must be there before a round begins.
        present_seconds: A device not heard of for so long is not asked.
        round_timeout_seconds: A round ends after so long whatever is missing.
        max_staleness: Rounds by which a result may come late and still count.
        timings: Recorded rounds (`rounds.jsonl` of a run) whose seconds the coordinator is given instead of the
            measured ones; None measures. A run made so says it in its history, its events and wherever it is shown.
    """

    min_devices: Annotated[int, Field(ge=1, le=100_000)] = 1
    present_seconds: Annotated[float, Field(gt=0, le=1e7)] = 120.0
    round_timeout_seconds: Annotated[float, Field(gt=0, le=1e7)] = 3600.0
    max_staleness: Annotated[int, Field(ge=0, le=100)] = 1
    timings: list[dict[str, Any]] | None = None


class RunRequest(Message):
    """A run to begin."""

    run_id: Name
    settings: dict[str, Any]
    layout: dict[str, Any]
    recipe: Recipe
    options: RunOptions = RunOptions()
    experiment: dict[str, Any] = Field(default_factory=dict)
    task_head: Base64Bytes = b""


class ClaimRequest(Message):
    """A new claim token."""

    hours: Annotated[float, Field(gt=0, le=24 * 365)] = 24.0


class Claim(Message):
    """It is told once and kept as a hash."""

    claim: str
    expires_at: float


class DeviceView(Message):
    """A device, as the operator sees it."""

    device_id: str
    status: str
    last_seen_seconds: float
    num_examples: int
    memory_bytes: int
    base_sha256: str
    link_version: int
    task: dict[str, Any] | None
    facts: dict[str, Any]
    sample: dict[str, Any]


class RunView(Message):
    """A run, as the operator sees it."""

    run_id: str
    status: str
    round_index: int
    rounds: int
    recorded_timings: bool
    adapter_sha256: str
    state_sha256: str
    base_sha256: str
    detail: str
    recipe: dict[str, Any]
    options: dict[str, Any]
    experiment: dict[str, Any]
    tasks: dict[str, int]


class EventView(Message):
    """One thing that happened."""

    event_id: int
    at: float
    kind: str
    run_id: str | None
    device_id: str | None
    detail: dict[str, Any]
