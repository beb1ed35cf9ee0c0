"""Updates that came after their round's end: merged once, in the next round's closing, with less weight.

Comes in: what was asked then, what came back, and who is merged in the round that closes now. Goes out: a verdict on
each late update: `merged`, `superseded` or `rejected`. The controller learns their seconds, and nothing else of them: a
device that is always late is asked for less, but its progress is not compared with that of another round.

Source: the falling weight is FedAsync's (arXiv 1903.03934), polynomial with exponent 1/2; docs/algorithm.md, section 8.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from fedspine_edge.protocol import Assignment, Update, tensors_nbytes
from fedspine_server.admission import refusal
from fedspine_server.arms import in_cooldown
from fedspine_server.results import DeviceResult, readable
from fedspine_server.reward import Outcome
from fedspine_server.state import RunState


def staleness_weight(staleness: int) -> float:
    """Returns what an update so many rounds behind counts, relative to a fresh one: 1, 0.71, 0.58, 0.5, ..."""
    return 1 / math.sqrt(1 + staleness)


@dataclass(frozen=True)
class LateResult:
    """An answer to an earlier round.

    Attributes:
        assignment: What the device was asked then.
        result: What became of it, with an update.
    """

    assignment: Assignment
    result: DeviceResult


@dataclass(frozen=True)
class LateVerdict:
    """A late result after admission.

    Attributes:
        late: The result.
        state: `merged`, `superseded` or `rejected`.
        detail: Why, where it was not merged.
        update: The update, if it is merged.
    """

    late: LateResult
    state: str
    detail: str | None
    update: Update | None

    def outcome(self, run: RunState) -> Outcome | None:
        """Returns what the controller may learn: seconds, unless the update was rejected."""
        assignment, result = self.late.assignment, self.late.result
        if self.state == "rejected" or result.update is None:
            return None
        return Outcome(
            device_id=result.device_id,
            pruning_ratio=assignment.pruning_ratio,
            last_ratio=run.devices[result.device_id].last_ratio,
            rank=assignment.rank,
            num_steps=result.update.report.num_steps,
            merged=False,
            compute_seconds=result.compute_seconds,
            transfer_seconds=result.download_seconds + result.upload_seconds,
            transfer_bytes=tensors_nbytes(assignment) + tensors_nbytes(result.update),
        )

    def record(self, round_index: int) -> dict[str, Any]:
        """Returns it for the history of the round that closes, JSON-ready."""
        result, asked_in = self.late.result, self.late.assignment.round_index
        staleness = round_index - asked_in
        return {
            "device_id": result.device_id,
            "round_index": asked_in,
            "staleness": staleness,
            "weight": staleness_weight(staleness) if self.state == "merged" else 0.0,
            "state": self.state,
            "detail": self.detail,
            "compute_seconds": result.compute_seconds,
            "download_seconds": result.download_seconds,
            "upload_seconds": result.upload_seconds,
        }


def judge_late(state: RunState, late: Sequence[LateResult], fresh: Collection[str]) -> list[LateVerdict]:
    """Returns the verdicts on late results, sorted by device and round; a device counts once in a closing.

    Args:
        state: The state the closing round began with.
        late: The results; their order does not matter.
        fresh: Devices whose answer to this round is merged: it is newer.
    """
    counted, verdicts = set(fresh), []
    for one in sorted(late, key=lambda one: (one.result.device_id, -one.assignment.round_index)):
        update, unread = readable(state, one.result.update, one.assignment)
        fate, detail = ("rejected", unread) if unread else _fate(state, one, update, counted)
        if fate == "merged":
            counted.add(one.result.device_id)
        verdicts.append(LateVerdict(one, fate, detail, update if fate == "merged" else None))
    return verdicts


def _fate(state: RunState, one: LateResult, update: Update | None, counted: Collection[str]) -> tuple[str, str | None]:
    assignment, settings = one.assignment, state.settings
    if update is None:
        return "rejected", "expected an update, found none"
    if assignment.round_index >= state.round_index:
        return "rejected", f"expected a round before {state.round_index}, found {assignment.round_index}"
    num_examples, max_norm = state.devices[assignment.device_id].num_examples, settings.max_update_norm
    refused = refusal(update, assignment, state.layout, num_examples=num_examples, max_update_norm=max_norm)
    if refused is not None:
        return "rejected", refused
    superseded = _superseded(state, assignment, counted)
    return ("superseded", superseded) if superseded else ("merged", None)


def _superseded(state: RunState, assignment: Assignment, counted: Collection[str]) -> str | None:
    """Returns what has made a good answer useless, None when nothing has."""
    if assignment.device_id in counted:
        return "a newer update of the device is merged"
    if assignment.work != "tune":
        return "made for the opening, which is over"
    if in_cooldown(state.settings, assignment.round_index) != in_cooldown(state.settings, state.round_index):
        # In cool-down members that no device keeps are gone for good; an older mask would bring them back.
        return "made before the final structure was settled"
    return None
