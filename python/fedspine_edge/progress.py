"""How far a run is, as a value: the events of a run in, what to show of them out.

`advance` makes the next `Progress` of an event; `plain_line` says an event in one line of a log. Nothing here draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Progress:
    """Everything shown; `devices` maps a device's name to its latest record in the round that runs.

    Attributes:
        phase: What is going on outside rounds, empty inside them.
        phase_done: Parts of the phase that are done.
        phase_total: Parts of the phase, None when unknown.
        round_index: The round that runs or ended last, None before the first.
        rounds: Rounds of the run.
        rounds_done: Rounds that ended.
        rounds_started: Clock reading when the first round of this session started.
        round_ended: Clock reading when the last round ended.
        rounds_done_before: Rounds that had ended before this session (a resumed run).
        virtual_seconds: Virtual time so far.
        deadline_seconds: Deadline of the round.
        accuracies: Accuracy after each round that measured it.
        devices: Latest record of each device, in the order of the assignment.
        latest: Name of the device heard of last.
    """

    phase: str = ""
    phase_done: int = 0
    phase_total: int | None = None
    round_index: int | None = None
    rounds: int = 0
    rounds_done: int = 0
    rounds_started: float | None = None
    round_ended: float | None = None
    rounds_done_before: int = 0
    virtual_seconds: float = 0.0
    deadline_seconds: float | None = None
    accuracies: tuple[float, ...] = ()
    devices: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    latest: str = ""


def advance(progress: Progress, event: Mapping[str, Any], *, now: float) -> Progress:
    """Returns the progress after an event.

    Args:
        progress: The progress before.
        event: As `LiveView.handle` takes it.
        now: Clock reading, seconds.

    Raises:
        ValueError: The event is of no known kind.
    """
    kind = event["kind"]
    if kind == "phase":
        return replace(progress, phase=event["text"], phase_done=event["done"] or 0, phase_total=event["total"])
    if kind == "round_start":
        # A round that is not later than the last one begins another run, such as the unpruned reference.
        first = progress.rounds_started is None or event["round_index"] < progress.rounds_done
        return replace(
            progress,
            phase="",
            round_index=event["round_index"],
            rounds=event["rounds"],
            rounds_started=now if first else progress.rounds_started,
            rounds_done_before=event["round_index"] if first else progress.rounds_done_before,
            rounds_done=event["round_index"],
            round_ended=None if first else progress.round_ended,
            accuracies=() if first else progress.accuracies,
            virtual_seconds=event["virtual_seconds"],
            deadline_seconds=event["deadline_seconds"],
            devices={device["device_id"]: {"state": "queued", **device} for device in event["devices"]},
            latest="",
        )
    if kind == "device":
        name = event["device_id"]
        return replace(
            progress, devices={**progress.devices, name: {**progress.devices.get(name, {}), **event}}, latest=name
        )
    if kind == "round_end":
        record = event["record"]
        accuracy = record["accuracy"]
        return replace(
            progress,
            round_index=record["round_index"],
            rounds_done=record["round_index"] + 1,
            round_ended=now,
            virtual_seconds=record["virtual_end_seconds"],
            accuracies=progress.accuracies if accuracy is None else (*progress.accuracies, accuracy),
            devices={device["device_id"]: device for device in record["devices"]},
        )
    raise ValueError(f"expected an event of kind phase, round_start, device or round_end, found {kind!r}")


def plain_line(before: Progress, after: Progress, event: Mapping[str, Any], *, wall_seconds: float) -> str | None:
    """Returns the line that says an event in a log, None when it is not worth one: new phases and ended rounds are.

    Args:
        before: The progress before the event.
        after: The progress after it.
        event: The event.
        wall_seconds: Since the view was opened.
    """
    if event["kind"] == "phase":
        total, done = after.phase_total, after.phase_done
        if after.phase == before.phase and not (total and done == total):
            return None
        return printable(after.phase) + (f" ({done}/{total})" if total else "")
    if event["kind"] != "round_end":
        return None
    record = event["record"]
    states = [device["state"] for device in record["devices"]]
    missed = [f"{states.count(state)} {state}" for state in ("late", "dropped", "rejected", "away") if state in states]
    parts = [
        *([f"accuracy {percent(record['accuracy'])}"] if record["accuracy"] is not None else []),
        f"loss {loss(record['loss_before'])} -> {loss(record['loss_after'])}",
        f"merged {record['num_merged']}/{len(states)}" + (f" ({', '.join(missed)})" if missed else ""),
        f"virtual {duration(after.virtual_seconds)}",
        f"wall {duration(wall_seconds)}",
    ]
    rounds = f"/{after.rounds}" if after.rounds else ""
    return f"round {record['round_index'] + 1}{rounds}: " + ", ".join(parts)


def seconds_left(progress: Progress, *, now: float) -> float | None:
    """Returns the wall seconds the remaining rounds will take at the pace of the ended ones; None before the first."""
    done = progress.rounds_done - progress.rounds_done_before
    if progress.rounds_started is None or progress.round_ended is None or done < 1:
        return None
    pace = (progress.round_ended - progress.rounds_started) / done
    return max(0.0, (progress.rounds - progress.rounds_done) * pace - (now - progress.round_ended))


def duration(value: float | None) -> str:
    """Returns seconds in at most seven letters: `8.4s`, `2m05s`, `3h07m`; `-` for None."""
    if value is None or not math.isfinite(value):
        return "-"
    if value < 59.95:
        return f"{value:.1f}s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes}m{seconds:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def printable(text: str) -> str:
    """Returns the text without control characters: a device's name must not move the cursor."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def percent(share: float) -> str:
    """Returns a share of 1 as `81.2%`."""
    return f"{100 * share:.1f}%"


def loss(value: float | None) -> str:
    """Returns a loss with three decimals, `-` where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.3f}"
