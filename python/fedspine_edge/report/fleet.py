"""The fleet in pictures: each device's ratio, rank and outcome over the rounds, and the timeline of single rounds.

In: checked records. Out: rows of cells and of bar segments, widths in per cent, for the template.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedspine_edge.report import wording
from fedspine_edge.report.curves import Tick, time_ticks
from fedspine_edge.report.records import DeviceRecord, RoundRecord

LEVELS = 8
MAX_NUMBERED_ROUNDS = 16
MAX_NAMED_DEVICES = 24
MAX_TITLED_CELLS = 2500
MAX_TIMELINE_ROWS = 1200
MAX_TIMELINE_ROUNDS = 60
BOARD_ORDER = ("TX2", "Xavier NX", "AGX Xavier")
MARKS = {"merged": "", "late": "L", "dropped": "D", "rejected": "R", "away": ""}
AWAY = ("away", "", "not taking part")
MEANINGS = {
    "merged": "merged",
    "late": "late (L): missed the deadline, not merged",
    "dropped": "dropped (D): lost during the round",
    "rejected": "rejected (R): update failed a check",
    "away": "away: not taking part",
}


@dataclass(frozen=True)
class Cell:
    """One device in one round; `css` picks the colour, `title` shows on hover."""

    css: str
    text: str
    title: str


@dataclass(frozen=True)
class Row:
    """One line of a heat map."""

    label: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class HeatMap:
    """Devices by rounds.

    Attributes:
        title: What is shown.
        note: How to read it.
        columns: (columns spanned, label) along the top.
        groups: (board, rows) from the slowest board to the fastest.
        legend: (css, meaning).
        named: Whether there is room for each device's name.
        num_rounds: Number of columns.
    """

    title: str
    note: str
    columns: tuple[tuple[int, str], ...]
    groups: tuple[tuple[str, tuple[Row, ...]], ...]
    legend: tuple[tuple[str, str], ...]
    named: bool
    num_rounds: int


@dataclass(frozen=True)
class Lane:
    """One device in a round's timeline; segments are (css, width in per cent)."""

    device: str
    board: str
    state: str
    segments: tuple[tuple[str, float], ...]
    outcome: str
    title: str


@dataclass(frozen=True)
class Timeline:
    """One round: `deadline_at` in per cent from the left, None where there was no deadline."""

    number: int
    heading: str
    deadline_at: float | None
    deadline: str
    ticks: tuple[Tick, ...]
    lanes: tuple[Lane, ...]
    trouble: bool


def fleet_order(device: DeviceRecord) -> tuple[int, str, list[tuple[int, str]]]:
    """Returns a sort key: boards from slow to fast, then names with their numbers in counting order."""
    known = BOARD_ORDER.index(device.board) if device.board in BOARD_ORDER else len(BOARD_ORDER)
    parts = re.split(r"(\d+)", device.device_id)
    return known, device.board, [(int(part) if part.isascii() and part.isdigit() else -1, part) for part in parts]


def name_width(rounds: Sequence[RoundRecord]) -> int:
    """Returns the letters a device's name may take before it is cut."""
    return max([5, *(min(16, len(device.device_id)) for record in rounds for device in record.devices)])


def heat_maps(rounds: Sequence[RoundRecord]) -> tuple[HeatMap, ...]:
    """Returns three maps of devices by rounds: pruning ratio, rank, outcome."""
    devices = [device for record in rounds for device in record.devices]
    top = max([0.1, *(device.pruning_ratio for device in devices)])
    ranks = sorted({device.rank for device in devices if device.state != "away"})
    states = [state for state in MARKS if any(device.state == state for device in devices)]

    def ratio_cell(device: DeviceRecord) -> tuple[str, str, str]:
        share = device.pruning_ratio
        if device.state == "away":
            return AWAY
        return _level(share / top), f"{100 * share:.0f}", f"{wording.percent(share, 0)} pruned"

    def rank_cell(device: DeviceRecord) -> tuple[str, str, str]:
        if device.state == "away":
            return AWAY
        level = 1.0 if len(ranks) < 2 else (1 + ranks.index(device.rank)) / len(ranks)
        return _level(level), str(device.rank), f"rank {device.rank}"

    def outcome_cell(device: DeviceRecord) -> tuple[str, str, str]:
        return device.state, MARKS[device.state], device.state + (f", {device.detail}" if device.detail else "")

    ratio_legend = tuple((f"q{i}", wording.percent(top * i / LEVELS, 0)) for i in range(0, LEVELS + 1, 2))
    rank_legend = tuple(
        (_level(1.0 if len(ranks) < 2 else (1 + i) / len(ranks)), f"rank {rank}") for i, rank in enumerate(ranks)
    )
    schedule = " → ".join(wording.percent(record.schedule_ratio, 0) for record in (rounds[0], rounds[-1]))
    return (
        _heat_map(
            rounds,
            "Pruning ratio",
            f"Share of heads and channels that the device had to be without, in per cent. Schedule: {schedule}.",
            ratio_legend,
            ratio_cell,
        ),
        _heat_map(rounds, "LoRA rank", "Size of the adapter: more learns more, costs more.", rank_legend, rank_cell),
        _heat_map(
            rounds,
            "Outcome",
            "What became of the device's update.",
            tuple((state, MEANINGS[state]) for state in states),
            outcome_cell,
        ),
    )


def _level(share: float) -> str:
    return f"q{max(0, min(LEVELS, math.ceil(share * LEVELS - 1e-9)))}"


def _heat_map(
    rounds: Sequence[RoundRecord],
    title: str,
    note: str,
    legend: tuple[tuple[str, str], ...],
    describe: Callable[[DeviceRecord], tuple[str, str, str]],
) -> HeatMap:
    last_seen = {device.device_id: device for record in rounds for device in record.devices}
    found = [{device.device_id: device for device in record.devices} for record in rounds]
    titled = len(last_seen) * len(rounds) <= MAX_TITLED_CELLS
    named = len(last_seen) <= MAX_NAMED_DEVICES
    numbered = named and len(rounds) <= MAX_NUMBERED_ROUNDS

    def cell(name: str, index: int) -> Cell:
        device = found[index].get(name)
        css, text, words = AWAY if device is None else describe(device)
        tip = f"{name}, round {rounds[index].round_index + 1}: {words}" if titled else ""
        return Cell(css, text if numbered else "", tip)

    groups: dict[str, list[Row]] = {}
    for device in sorted(last_seen.values(), key=fleet_order):
        cells = tuple(cell(device.device_id, index) for index in range(len(rounds)))
        groups.setdefault(device.board, []).append(Row(device.device_id, cells))
    return HeatMap(
        title=title,
        note=note,
        columns=_columns([record.round_index + 1 for record in rounds]),
        groups=tuple((board, tuple(rows)) for board, rows in groups.items()),
        legend=legend,
        named=named,
        num_rounds=len(rounds),
    )


def _columns(numbers: Sequence[int]) -> tuple[tuple[int, str], ...]:
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 10 ** len(str(len(numbers)))) if len(numbers) / step <= 16)
    starts = range(0, len(numbers), step)
    return tuple((min(step, len(numbers) - start), str(numbers[start])) for start in starts)


def timelines(rounds: Sequence[RoundRecord]) -> tuple[Timeline, ...]:
    """Returns the timelines of the rounds, of an even selection with the first and the last when there are too many."""
    busiest = max(1, max(len(record.devices) for record in rounds))
    room = max(2, min(MAX_TIMELINE_ROUNDS, MAX_TIMELINE_ROWS // busiest))
    if len(rounds) <= room:
        return tuple(_timeline(record) for record in rounds)
    chosen = sorted({round(i * (len(rounds) - 1) / (room - 1)) for i in range(room)})
    return tuple(_timeline(rounds[index]) for index in chosen)


def _timeline(record: RoundRecord) -> Timeline:
    length = record.virtual_end_seconds - record.virtual_start_seconds
    deadline = record.deadline_seconds
    taking_part = sorted((device for device in record.devices if device.state != "away"), key=fleet_order)
    end = 1.02 * max([1e-9, length, deadline or 0.0, *(device.busy_seconds for device in taking_part)])
    num_away = len(record.devices) - len(taking_part)
    heading = [
        f"Round {record.round_index + 1} took {wording.seconds(length)}",
        f"{record.num_merged} of {wording.plural(len(taking_part), 'update')} merged",
        *([f"{num_away} away"] if num_away else []),
        *([f"accuracy {wording.percent(record.accuracy)}"] if record.accuracy is not None else []),
    ]
    return Timeline(
        number=record.round_index + 1,
        heading=", ".join(heading),
        deadline_at=None if deadline is None else round(100 * deadline / end, 2),
        deadline="" if deadline is None else f"deadline {wording.seconds(deadline)}",
        ticks=time_ticks(end, 4),
        lanes=tuple(_lane(device, end) for device in taking_part),
        trouble=any(device.state in ("late", "dropped", "rejected") for device in taking_part),
    )


def _lane(device: DeviceRecord, end_seconds: float) -> Lane:
    parts = (
        ("download", device.download_seconds),
        ("compute", device.compute_seconds),
        ("upload", device.upload_seconds),
        ("waiting", device.waiting_seconds),
    )
    times = ", ".join(f"{name} {wording.seconds(seconds)}" for name, seconds in parts if seconds > 0)
    title = [
        f"{device.device_id} ({device.board}, power mode {device.power_mode})",
        f"{wording.percent(device.pruning_ratio, 0)} pruned, rank {device.rank}, {device.num_steps} steps",
        times or "no time spent",
        device.state + (f": {device.detail}" if device.detail else ""),
        f"chosen because: {device.reason}" if device.reason else "",
    ]
    return Lane(
        device=device.device_id,
        board=device.board,
        state=device.state,
        segments=tuple((name, round(100 * seconds / end_seconds, 2)) for name, seconds in parts if seconds > 0),
        outcome="" if device.state == "merged" else device.state,
        title="\n".join(line for line in title if line),
    )
