"""What came back of a round -> what the coordinator takes, with the seconds that were measured, or recorded ones.

Comes in: result rows and blobs. Goes out: `DeviceResult`s and the round's length. Measured: the device's own stopwatch
for download, work and upload (its clock is never asked for the time), the server's for the round.

Recorded seconds replace measured ones and nothing else: updates are the real devices', admission and aggregation too.
So a run can be compared bit by bit with one of the simulated fleet, whose controller saw those seconds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedspine_edge.errors import CheckpointError, IncompatibleError
from fedspine_edge.protocol import Assignment, Update
from fedspine_edge.wire_format import MAX_MESSAGE_BYTES, assignment_from_bytes, unpack
from fedspine_server.lateness import LateResult
from fedspine_server.link.blobs import BlobStore
from fedspine_server.link.tables import FAILED, KEPT, ResultRow, TaskRow
from fedspine_server.recorded import with_recorded_seconds
from fedspine_server.results import DeviceResult
from fedspine_server.spool import Spool


@dataclass(frozen=True)
class Answers:
    """Everything that is known when a round ends.

    Attributes:
        rows: The round's results.
        facts: device_id -> what the board said of itself.
        opened_at: When the round began, server's clock.
        closing_at: When it ended.
        round_index: Which round.
        timings: Recorded rounds, None to take what was measured.
    """

    rows: Sequence[ResultRow]
    facts: Mapping[str, Mapping[str, Any]]
    opened_at: float
    closing_at: float
    round_index: int
    timings: Sequence[Mapping[str, Any]] | None


def device_results(answers: Answers, blobs: BlobStore, spool: Spool) -> tuple[list[DeviceResult], float]:
    """Returns one result a device that said anything, and the length of the round in seconds."""
    found: dict[str, DeviceResult] = {}
    for row in answers.rows:
        if row.device_id not in found or found[row.device_id].arrival == "dropped":
            found[row.device_id] = _measured(row, answers, blobs, spool)
    results = list(found.values())
    if answers.timings is None:
        return results, answers.closing_at - answers.opened_at
    return with_recorded_seconds(results, answers.timings[answers.round_index])


def late_results(
    rows: Sequence[tuple[ResultRow, TaskRow]],
    facts: Mapping[str, Mapping[str, Any]],
    blobs: BlobStore,
    spool: Spool,
) -> list[LateResult]:
    """Returns answers to earlier rounds with what was asked then; one that cannot be read any more is left out."""
    found = []
    for row, task in rows:
        update = read_update(blobs, row.blob_sha256, spool) if row.blob_sha256 else None
        assignment = _asked(task, blobs)
        if update is not None and assignment is not None:
            found.append(LateResult(assignment, _with_update(row, update, facts.get(row.device_id, {}), "late")))
    return found


def _asked(task: TaskRow, blobs: BlobStore) -> Assignment | None:
    own = {name: task.spec[name] for name in ("pruning_ratio", "num_steps", "seed", "budget_seconds", "min_steps")}
    try:
        shared = unpack(blobs.read(task.blob_sha256), max_bytes=task.spec["message_bytes"])
        return dataclasses.replace(assignment_from_bytes(shared), device_id=task.device_id, **own)
    except (CheckpointError, IncompatibleError, KeyError):
        return None


def _measured(row: ResultRow, answers: Answers, blobs: BlobStore, spool: Spool) -> DeviceResult:
    facts = answers.facts.get(row.device_id, {})
    board, power_mode = facts.get("board") or "", facts.get("power_mode") or ""
    if row.fate != KEPT or row.blob_sha256 is None:
        said = "failed: " if row.fate == FAILED else "refused: "
        return DeviceResult(
            row.device_id, "dropped", detail=said + (row.detail or ""), board=board, power_mode=power_mode
        )
    waiting_seconds = max(0.0, answers.closing_at - row.received_at)
    result = _with_update(row, read_update(blobs, row.blob_sha256, spool), facts, "arrived")
    return dataclasses.replace(result, waiting_seconds=waiting_seconds)


def _with_update(
    row: ResultRow, update: Update | None, facts: Mapping[str, Any], arrival: Literal["arrived", "late"]
) -> DeviceResult:
    return DeviceResult(
        device_id=row.device_id,
        arrival=arrival,
        update=update,
        compute_seconds=_seconds(update),
        download_seconds=row.seconds["download"],
        upload_seconds=row.seconds["upload"],
        board=facts.get("board") or "",
        power_mode=facts.get("power_mode") or "",
    )


def _seconds(update: Update | None) -> float:
    """What a device says its work took; whether it may say so is for admission, but nothing else goes on record."""
    value = update.report.compute_seconds if update else 0.0
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0


def read_update(blobs: BlobStore, sha256: str, spool: Spool) -> Update | None:
    """Returns a kept update, its arrays in the spool; None where it cannot be read any more: then it counts as missing.

    Raises:
        CheckpointError: The disk is full.
    """
    try:
        message = unpack(blobs.read(sha256), max_bytes=MAX_MESSAGE_BYTES)
    except (CheckpointError, IncompatibleError, KeyError):
        return None
    try:
        return spool.keep_message(message)
    except IncompatibleError:
        return None
