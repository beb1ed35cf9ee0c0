"""What became of an assignment, and the server's verdict on it.

Comes in: a result from whatever carries the messages. Goes out: a `Verdict`: merged, late, dropped or rejected, what
the controller may learn from it, and the round's record for the history.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fedspine_edge.errors import IncompatibleError
from fedspine_edge.protocol import Assignment, Update, tensors_nbytes
from fedspine_edge.quantized import as_float16
from fedspine_server.admission import refusal
from fedspine_server.arms import schedule_ratio
from fedspine_server.assignments import RoundArrays, build_assignment, change_norm
from fedspine_server.controllers import Choice
from fedspine_server.reward import Outcome, rewards
from fedspine_server.state import RunState


@dataclass(frozen=True)
class DeviceResult:
    """What became of one assignment.

    Attributes:
        device_id: Which device.
        arrival: `arrived` in time, `late` after the round's end, or `dropped` without an answer.
        update: What came back; may be None unless it arrived.
        compute_seconds: Seconds of local work; 0 where unknown.
        download_seconds: Seconds until the assignment was there.
        upload_seconds: Seconds the update took.
        waiting_seconds: Seconds from the update's arrival to the end of the round.
        board: The device's board, for the history.
        power_mode: The board's power mode, for the history.
        detail: What happened, where there is something to say.
    """

    device_id: str
    arrival: Literal["arrived", "late", "dropped"]
    update: Update | None = None
    compute_seconds: float = 0.0
    download_seconds: float = 0.0
    upload_seconds: float = 0.0
    waiting_seconds: float = 0.0
    board: str = ""
    power_mode: int | str = 0
    detail: str | None = None


@dataclass(frozen=True)
class Verdict:
    """A result after admission.

    Attributes:
        result: The result.
        choice: What the device was asked.
        state: `merged`, `late`, `dropped` or `rejected`.
        detail: Why, where it was not merged.
        download_bytes: Bytes of the assignment's arrays.
        outcome: What the controller may learn.
        update: What may be merged, its factors of float16.
    """

    result: DeviceResult
    choice: Choice
    state: str
    detail: str | None
    download_bytes: int
    outcome: Outcome
    update: Update | None


def judge(state: RunState, result: DeviceResult, arrays: RoundArrays) -> Verdict:
    """Returns the verdict on one result; a rejected update teaches nothing but that it was rejected."""
    choice, device = state.open_choices[result.device_id], state.devices[result.device_id]
    assignment = build_assignment(state, choice, arrays)
    update, refused = readable(state, result.update, assignment)
    fate, detail = str(result.arrival), result.detail
    if fate == "arrived":
        refused = refused or _refused(state, update, assignment)
        fate, detail = ("rejected", refused) if refused else ("merged", detail)
    trusted = update if fate in ("merged", "late") else None
    report = trusted.report if trusted else None
    download_bytes = tensors_nbytes(assignment)
    outcome = Outcome(
        device_id=result.device_id,
        pruning_ratio=choice.pruning_ratio,
        last_ratio=device.last_ratio,
        rank=choice.rank,
        num_steps=report.num_steps if report else choice.num_steps,
        merged=fate == "merged",
        compute_seconds=result.compute_seconds if report else None,
        transfer_seconds=result.download_seconds + result.upload_seconds if report else None,
        transfer_bytes=download_bytes + (tensors_nbytes(result.update) if trusted and result.update else 0),
        loss_before=report.loss_before if report else None,
        loss_after=report.loss_after if report else None,
        update_norm=_change(state, assignment, trusted) if trusted and fate == "merged" else None,
    )
    return Verdict(result, choice, fate, detail, download_bytes, outcome, trusted if fate == "merged" else None)


def _change(state: RunState, assignment: Assignment, update: Update) -> float | None:
    return change_norm(state.layout, assignment, update) if assignment.work == "tune" else None


def readable(state: RunState, update: Update | None, assignment: Assignment) -> tuple[Update | None, str | None]:
    """Returns an update with factors of float16, or None and why it cannot be read."""
    if update is None:
        return None, None
    try:
        return as_float16(update, assignment.update_dtype, state.layout), None
    except IncompatibleError as error:
        return None, str(error)


def _refused(state: RunState, update: Update | None, assignment: Assignment) -> str | None:
    if update is None:
        return "expected an update, found none"
    num_examples, max_norm = state.devices[assignment.device_id].num_examples, state.settings.max_update_norm
    return refusal(update, assignment, state.layout, num_examples=num_examples, max_update_norm=max_norm)


def round_record(state: RunState, verdicts: Sequence[Verdict], round_seconds: float) -> dict[str, Any]:
    """Returns the round on record, JSON-ready; registered devices that took no part are `away`.

    Args:
        state: The state the round began with.
        verdicts: One for each assignment, sorted by device_id.
        round_seconds: Length of the round.
    """
    merged = [verdict for verdict in verdicts if verdict.state == "merged"]
    worth = rewards([verdict.outcome for verdict in verdicts])
    deadlines = [choice.deadline_seconds for choice in state.open_choices.values()]
    devices = {v.result.device_id: _device_record(state, v, worth.get(v.result.device_id)) for v in verdicts}
    away = {name: _away_record(state, name) for name in state.devices if name not in devices}
    return {
        "round_index": state.round_index,
        "virtual_start_seconds": state.clock_seconds,
        "virtual_end_seconds": state.clock_seconds + round_seconds,
        "deadline_seconds": deadlines[0] if deadlines else None,
        "schedule_ratio": schedule_ratio(state.settings, state.round_index),
        "loss_before": _mean_loss(state, merged, "loss_before"),
        "loss_after": _mean_loss(state, merged, "loss_after"),
        "accuracy": None,
        "num_merged": len(merged),
        "devices": [record for _, record in sorted((devices | away).items())],
    }


def _device_record(state: RunState, verdict: Verdict, reward: float | None) -> dict[str, Any]:
    result, outcome = verdict.result, verdict.outcome
    return {
        "device_id": result.device_id,
        "board": result.board,
        "power_mode": result.power_mode,
        "pruning_ratio": verdict.choice.pruning_ratio,
        "rank": verdict.choice.rank,
        "num_steps": outcome.num_steps,
        "reason": verdict.choice.reason,
        "compute_seconds": result.compute_seconds,
        "download_seconds": result.download_seconds,
        "upload_seconds": result.upload_seconds,
        "waiting_seconds": result.waiting_seconds,
        "download_bytes": verdict.download_bytes,
        "upload_bytes": tensors_nbytes(result.update) if result.update else 0,
        "state": verdict.state,
        "detail": verdict.detail,
        "loss_before": outcome.loss_before,
        "loss_after": outcome.loss_after,
        "num_examples": state.devices[result.device_id].num_examples,
        "reward": reward,
    }


def _away_record(state: RunState, device_id: str) -> dict[str, Any]:
    nothing: Mapping[str, Any] = dict.fromkeys(("reason", "detail", "loss_before", "loss_after", "reward"))
    zeros = ("pruning_ratio", "compute_seconds", "download_seconds", "upload_seconds", "waiting_seconds")
    return {
        "device_id": device_id,
        "board": "",
        "power_mode": 0,
        "rank": 0,
        "num_steps": 0,
        "download_bytes": 0,
        "upload_bytes": 0,
        "state": "away",
        "num_examples": state.devices[device_id].num_examples,
        **dict.fromkeys(zeros, 0.0),
        **nothing,
    }


def _mean_loss(state: RunState, merged: Sequence[Verdict], name: str) -> float | None:
    if not merged:
        return None
    weights = [state.devices[verdict.result.device_id].num_examples for verdict in merged]
    return float(np.average([getattr(verdict.outcome, name) for verdict in merged], weights=weights))
