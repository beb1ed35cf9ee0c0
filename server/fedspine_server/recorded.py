"""Recorded seconds in place of measured ones, so that a real run can be compared bit by bit with a simulated one.

Comes in: results of a round and the record of the same round of another run. Goes out: the results with its seconds,
and what the recording says of who was late or missing. Updates are untouched: they are the real devices'.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fedspine_server.results import DeviceResult


def with_recorded_seconds(
    results: Sequence[DeviceResult], record: Mapping[str, Any]
) -> tuple[list[DeviceResult], float]:
    """Returns the results as if they had taken the seconds on record, and the recorded length of the round."""
    by_device = {device["device_id"]: device for device in record["devices"]}
    timed = [_recorded(result, by_device.get(result.device_id)) for result in results]
    return timed, record["virtual_end_seconds"] - record["virtual_start_seconds"]


def _recorded(result: DeviceResult, record: Mapping[str, Any] | None) -> DeviceResult:
    if record is None or result.arrival == "dropped" or record["state"] in ("dropped", "away"):
        detail = result.detail or "not in the recording"
        return dataclasses.replace(result, arrival="dropped", update=None, detail=detail)
    return dataclasses.replace(
        result,
        arrival="late" if record["state"] == "late" else "arrived",
        **{name: record[name] for name in ("compute_seconds", "download_seconds", "upload_seconds", "waiting_seconds")},
        **{name: record[name] for name in ("board", "power_mode")},
    )
