"""What the page shows, as values: devices, runs, events; made by a source, read by everything that draws.

Comes in: nothing. Goes out: frozen dataclasses, and the interface of a source. A source reads a database or a
directory; no view remembers anything by itself, so any server process gives the same page.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fedspine_server.page.story import Mark, Story

WORKING, WAITING, PAUSED, SILENT, PENDING, REVOKED = "working", "waiting", "paused", "silent", "pending", "revoked"
"""Condition of a device: what it is doing now, as far as anybody has heard."""

ACCEPTED_CONDITIONS = (WORKING, WAITING, PAUSED)
"""Those of a device that is there."""


@dataclass(frozen=True)
class Device:
    """A device; None and empty where nobody knows.

    Attributes:
        device_id: Its name.
        condition: `WORKING`, ... above.
        board: What the board calls itself.
        l4t: Its release of Jetson Linux.
        seen_at: When it was heard of last, on the source's clock; None for a simulated one.
        memory_bytes: Memory of the board.
        memory_available_bytes: What is free of it.
        temperature_celsius: Of the hottest zone.
        power_watts: At the input.
        energy_joules: Counted by the board.
        throttled_by: What holds its clocks back.
        step: Step of the task in hand.
        num_steps: Steps of that task.
        done_at: When it should be done, on the source's clock.
        pruning_ratio: What it is asked for now, or was last.
        rank: Likewise.
        reason: Why the controller chose so.
        run_id: The run it works for.
        marks: Its latest rounds.
        last_state: What became of its latest answer.
        problem: What is wrong, in words that came from it or about it.
        num_examples: Examples it trains on.
        model: The model file that a rollout left it with; empty for none.
        rollout_state: Where it is with the newest rollout; empty where that asks nothing of it.
        facts: What the board said of itself.
        sample: What its sensors said last.
    """

    device_id: str
    condition: str
    board: str = ""
    l4t: str = ""
    seen_at: float | None = None
    memory_bytes: int = 0
    memory_available_bytes: int | None = None
    temperature_celsius: float | None = None
    power_watts: float | None = None
    energy_joules: float | None = None
    throttled_by: tuple[str, ...] = ()
    step: int = 0
    num_steps: int = 0
    done_at: float | None = None
    pruning_ratio: float | None = None
    rank: int | None = None
    reason: str = ""
    run_id: str = ""
    marks: tuple[Mark, ...] = ()
    last_state: str = ""
    problem: str = ""
    num_examples: int = 0
    model: str = ""
    rollout_state: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict, compare=False)
    sample: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        run_id: Its name.
        status: `running`, `stopped`, `finished`.
        round_index: The round under way, from 0.
        rounds: How many there are.
        detail: Why it stands, where it does.
        story: Its closed rounds.
        asked: Devices that were asked in the open round.
        answered: Those of them that have answered.
        opened_at: When the open round began; None between rounds.
        deadline_at: Its deadline.
        controller: Which controller chooses.
        target_sparsity: Share to be gone at the end.
        schedule_ratio: Share that the schedule asks of this round.
        simulated: Whether its seconds are virtual.
        recorded: Whether its seconds are a recording's.
        started_at: When it began.
        phase: What a simulation does outside its rounds.
        summary: What a finished simulation measured.
    """

    run_id: str
    status: str
    round_index: int
    rounds: int
    detail: str = ""
    story: Story = field(default_factory=Story)
    asked: int = 0
    answered: int = 0
    opened_at: float | None = None
    deadline_at: float | None = None
    controller: str = ""
    target_sparsity: float = 0.0
    schedule_ratio: float | None = None
    simulated: bool = False
    recorded: bool = False
    started_at: float | None = None
    phase: str = ""
    summary: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Event:
    """One thing that happened."""

    event_id: int
    at: float
    kind: str
    run_id: str
    device_id: str
    text: str


@dataclass(frozen=True)
class RolloutPart:
    """One device in a rollout: its state, why it failed, what the model does there and what the one before did."""

    device_id: str
    canary: bool
    state: str
    reason: str = ""
    received_bytes: int = 0
    figures: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rollout:
    """A rollout; `parts` are its devices, canaries first, of the newest one alone."""

    rollout_id: int
    status: str
    model: str
    model_bytes: int
    gate: str
    created_at: float
    detail: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    parts: tuple[RolloutPart, ...] = ()

    @property
    def under_way(self) -> bool:
        """Whether devices that are there are still to take it."""
        return self.status in ("canary", "rolling")


@dataclass(frozen=True)
class ModelFile:
    """A model that can be rolled out."""

    sha256: str
    name: str
    num_bytes: int
    added_at: float


@dataclass(frozen=True)
class Fleet:
    """Everything at one moment; `runs`, `rollouts` and `models` newest first."""

    now: float
    devices: tuple[Device, ...]
    runs: tuple[Run, ...]
    events: tuple[Event, ...] = ()
    rollouts: tuple[Rollout, ...] = ()
    models: tuple[ModelFile, ...] = ()

    @property
    def current(self) -> Run | None:
        """The run to look at: one that runs, else the newest."""
        return next((run for run in self.runs if run.status == "running"), self.runs[0] if self.runs else None)

    def run(self, run_id: str) -> Run | None:
        """Returns a run by its name."""
        return next((run for run in self.runs if run.run_id == run_id), None)

    def device(self, device_id: str) -> Device | None:
        """Returns a device by its name."""
        return next((device for device in self.devices if device.device_id == device_id), None)


@dataclass(frozen=True)
class Group:
    """The heads or channels of one layer: for each cell the share of devices that keep it, and the mean kept share."""

    layer: int
    kind: str
    num_members: int
    kept_share: float
    cells: tuple[float, ...]


class Source(Protocol):
    """Where a page's content comes from."""

    writable: bool

    def stamp(self) -> Hashable:
        """Returns a value that differs whenever something shown may have changed; cheap."""

    def fleet(self) -> Fleet:
        """Returns everything at this moment."""

    def structure(self, run_id: str) -> tuple[Group, ...]:
        """Returns what is left of each layer; empty before anybody pruned."""

    def file(self, run_id: str, name: str) -> Path | None:
        """Returns a file of a run that may be downloaded; None for any other name."""
