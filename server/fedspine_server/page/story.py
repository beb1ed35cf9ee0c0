"""What happened in a run, from its round records: series over time, lanes of a round, marks of a device.

Comes in: the records of closed rounds, as the coordinator keeps them and a run's `rounds.jsonl` holds them. Goes out:
numbers ready to be drawn. Nothing here reads a file or a database.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

Record = Mapping[str, Any]
PARTS = ("download", "compute", "upload", "waiting")
LETTERS = {"merged": "m", "late": "l", "dropped": "d", "rejected": "r", "away": "a"}
SPARK_ROUNDS = 16


@dataclass(frozen=True)
class Mark:
    """A device in one round, as small as it can be drawn: what became of it, and its time against the slowest's."""

    state: str
    share: float


@dataclass(frozen=True)
class Lane:
    """A device's time in one round; segments are (part, start, width) in per cent of the lane."""

    device_id: str
    board: str
    state: str
    segments: tuple[tuple[str, float, float], ...]
    total_seconds: float
    record: Record = field(compare=False)


@dataclass(frozen=True)
class RoundView:
    """One round, drawn: lanes from the slowest to the fastest."""

    index: int
    record: Record
    seconds: float
    end_seconds: float
    deadline_at: float | None
    lanes: tuple[Lane, ...]


def busy_seconds(device: Record) -> float:
    """Returns the seconds from a round's start until a device's answer was there."""
    return math.fsum(float(device[f"{part}_seconds"] or 0.0) for part in PARTS[:3])


@dataclass(frozen=True)
class Story:
    """The closed rounds of a run.

    Attributes:
        rounds: Their records, in order.
        wall: When each was closed, seconds on the wall since the run began; None where nobody noted it.
    """

    rounds: tuple[Record, ...] = ()
    wall: tuple[float | None, ...] = ()

    @cached_property
    def by_device(self) -> dict[str, list[Record | None]]:
        """Device -> its record in each round; None before it joined."""
        found: dict[str, list[Record | None]] = {}
        for index, record in enumerate(self.rounds):
            for device in record["devices"]:
                found.setdefault(device["device_id"], [None] * len(self.rounds))[index] = device
        return found

    @cached_property
    def _longest(self) -> list[float]:
        return [max((busy_seconds(d) for d in record["devices"]), default=0.0) for record in self.rounds]

    def last(self, device_id: str) -> Record | None:
        """Returns a device's latest record in which it took part."""
        known = self.by_device.get(device_id, [])
        return next((d for d in reversed(known) if d is not None and d["state"] != "away"), None)

    def marks(self, device_id: str, rounds: int = SPARK_ROUNDS) -> tuple[Mark, ...]:
        """Returns a device's latest rounds as marks."""
        known = self.by_device.get(device_id, [])
        start = max(0, len(known) - rounds)
        marks = []
        for index in range(start, len(known)):
            device = known[index]
            state = "away" if device is None else device["state"]
            longest = self._longest[index]
            share = busy_seconds(device) / longest if device is not None and longest else 0.0
            marks.append(Mark(state, round(share, 2)))
        return tuple(marks)

    def seconds(self, index: int) -> float:
        """Returns how long a round took."""
        record = self.rounds[index]
        return float(record["virtual_end_seconds"] - record["virtual_start_seconds"])

    @property
    def virtual_seconds(self) -> float:
        """The run's clock at its last closed round."""
        return float(self.rounds[-1]["virtual_end_seconds"]) if self.rounds else 0.0

    def seconds_left(self, rounds: int) -> float | None:
        """Returns what the remaining rounds will take at the pace of the last few; None before the first."""
        if not self.rounds:
            return None
        recent = [self.seconds(index) for index in range(max(0, len(self.rounds) - 5), len(self.rounds))]
        return statistics.median(recent) * max(0, rounds - len(self.rounds))

    def values(self, name: str) -> list[tuple[int, float]]:
        """Returns (round, value) of everything that was measured: `accuracy`, `loss_before`, `loss_after`."""
        found = ((index, record.get(name)) for index, record in enumerate(self.rounds))
        return [(index, float(value)) for index, value in found if value is not None and math.isfinite(value)]

    def latest(self, name: str) -> float | None:
        """Returns the last measured value."""
        values = self.values(name)
        return values[-1][1] if values else None

    def transfer_bytes(self) -> tuple[int, int]:
        """Returns the bytes to the devices and from them, whole run."""
        devices = [device for record in self.rounds for device in record["devices"]]
        return sum(d["download_bytes"] for d in devices), sum(d["upload_bytes"] for d in devices)

    def waiting_share(self) -> float | None:
        """Returns the share of the devices' time spent waiting for others."""
        devices = [device for record in self.rounds for device in record["devices"]]
        waiting = math.fsum(device["waiting_seconds"] for device in devices)
        total = waiting + math.fsum(busy_seconds(device) for device in devices)
        return waiting / total if total else None

    def round_view(self, index: int) -> RoundView:
        """Returns one round, drawn."""
        record, length = self.rounds[index], self.seconds(index)
        taking_part = [device for device in record["devices"] if device["state"] != "away"]
        deadline = record["deadline_seconds"]
        end = max([length, *(busy_seconds(device) for device in taking_part)], default=0.0) or 1.0
        if deadline is not None and deadline < 1.5 * end:
            end = max(end, float(deadline))
        lanes = sorted((_lane(device, end) for device in taking_part), key=lambda lane: -lane.total_seconds)
        at = None if deadline is None or deadline > end else round(100 * deadline / end, 2)
        return RoundView(index, record, length, end, at, tuple(lanes))

    def matrix(self) -> dict[str, Any]:
        """Returns every device in every round, compact: a letter for its state, per cent pruned, rank, seconds."""
        names = sorted(self.by_device)
        cells = [[d or {"state": "away"} for d in self.by_device[name]] for name in names]
        return {
            "devices": names,
            "rounds": len(self.rounds),
            "states": ["".join(LETTERS.get(d["state"], "a") for d in row) for row in cells],
            "ratios": [[round(100 * d.get("pruning_ratio", 0)) for d in row] for row in cells],
            "ranks": [[d.get("rank", 0) for d in row] for row in cells],
            "seconds": [[round(busy_seconds(d), 1) if "rank" in d else 0 for d in row] for row in cells],
        }


def _lane(device: Record, end: float) -> Lane:
    segments, at = [], 0.0
    for part in PARTS:
        value = float(device[f"{part}_seconds"] or 0.0)
        width = min(value, end - at)
        if width > 0:
            segments.append((part, round(100 * at / end, 2), round(100 * width / end, 2)))
        at += max(0.0, width)
    return Lane(
        device["device_id"], device["board"], device["state"], tuple(segments), busy_seconds(device), record=device
    )


def why_slow(device: Record, others: Sequence[Record]) -> str:
    """Returns what sets a slow device apart from the others of its round, in words with figures."""
    said = []
    for part, words in (("compute", "computing"), ("upload", "upload"), ("download", "download")):
        own = float(device[f"{part}_seconds"] or 0.0)
        usual = statistics.median([float(d[f"{part}_seconds"] or 0.0) for d in others] or [0.0])
        said.append((own - usual, part, words, own, usual))
    extra, part, words, own, usual = max(said)
    if extra <= 0:
        return "as fast as the others"
    times = f"{own / usual:.1f}× the median" if usual > 0 else f"{own:.0f} s"
    per_step = ""
    if part == "compute" and device["num_steps"]:
        per_step = f", {own / device['num_steps']:.2f} s a step"
    return f"{words} takes {times}{per_step}"
