"""The operator's commands: the same HTTPS API as the devices', with the operator's token.

Comes in: `operator.json` (from `fedspine serve --init`), which may be copied to any desk. Goes out: what the server
says.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import urllib3

from fedspine_edge.agent.link import open_pool, pinned_context, request
from fedspine_edge.errors import LinkError, UsageError

OPERATOR_FILE = "operator.json"
DEFAULT_DIRECTORY = Path("fedspine-server")
CALL_SECONDS = 120.0
OK = 200


class Operator:
    """Calls with the operator's token.

    Args:
        file: `operator.json`; `FEDSPINE_OPERATOR` or the one in `fedspine-server/` when None.

    Raises:
        UsageError: It is missing or is no such file.
    """

    def __init__(self, file: Path | None) -> None:
        file = file or Path(os.environ.get("FEDSPINE_OPERATOR") or DEFAULT_DIRECTORY / OPERATOR_FILE)
        try:
            document = json.loads(file.read_text())
            self.url, self.ca, token = document["url"], document["ca"], document["token"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"expected the operator's file {file}, found: {error}",
                hint="give it with --operator or FEDSPINE_OPERATOR; `fedspine serve --init` made it",
            ) from error
        self._headers = {"Authorization": f"Bearer {token}"}
        self._pool = open_pool(pinned_context(self.ca))

    def get(self, path: str) -> Any:
        """Returns what the server says."""
        return request(self._pool, "GET", f"{self.url}/v1/{path}", self._headers, None, CALL_SECONDS)

    def overview(self) -> Any:
        """Returns the fleet at this moment and what is to be said of it."""
        return request(self._pool, "GET", f"{self.url}/overview.json", self._headers, None, CALL_SECONDS)

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Has the server do something and returns what it says."""
        return request(self._pool, "POST", f"{self.url}/v1/{path}", self._headers, body or {}, CALL_SECONDS)

    def put(self, path: str, content: bytes) -> None:
        """Sends bytes, with their hash."""
        headers = {**self._headers, "X-Chunk-SHA256": hashlib.sha256(content).hexdigest()}
        headers["Content-Type"] = "application/octet-stream"
        request(self._pool, "PUT", f"{self.url}/v1/{path}", headers, content, CALL_SECONDS)

    def content(self, path: str) -> bytes:
        """Returns what the server keeps as bytes, of any length.

        Raises:
            LinkError: It does not come, or not whole.
        """
        try:
            reply = self._pool.request("GET", f"{self.url}/v1/{path}", headers=self._headers, timeout=CALL_SECONDS)
        except urllib3.exceptions.HTTPError as error:
            raise LinkError(f"expected {path} of {self.url}, found: {error}", hint="try again") from error
        if reply.status != OK:
            raise LinkError(f"server answered {reply.status} to {path}: {reply.data[:500].decode(errors='replace')}")
        return reply.data

    def close(self) -> None:
        """Closes the connection."""
        self._pool.clear()


def accept(operator: Operator, device_ids: list[str], *, everyone: bool) -> list[dict[str, Any]]:
    """Accepts these devices, or every pending one; returns them."""
    if everyone:
        device_ids = [device["device_id"] for device in operator.get("devices") if device["status"] == "pending"]
    return [operator.post(f"devices/{device_id}/accept") for device_id in device_ids]


def devices_text(devices: list[dict[str, Any]]) -> str:
    """Returns one line a device."""
    rows = [("DEVICE", "STATUS", "SEEN", "EXAMPLES", "BOARD", "AT WORK ON")]
    for device in devices:
        task = device["task"]
        rows.append(
            (
                device["device_id"],
                device["status"],
                f"{device['last_seen_seconds']:.0f} s ago",
                str(device["num_examples"]),
                device["facts"].get("board") or "unknown",
                f"{task['run_id']} round {task['round_index']}" if task else "-",
            )
        )
    return columns(rows)


def runs_text(runs: list[dict[str, Any]]) -> str:
    """Returns one line a run."""
    rows = [("RUN", "STATUS", "ROUND", "SECONDS", "ADAPTER", "")]
    for run in runs:
        seconds = "recorded" if run["recorded_timings"] else "measured"
        done = f"{run['round_index']} of {run['rounds']}"
        rows.append((run["run_id"], run["status"], done, seconds, run["adapter_sha256"][:12], run["detail"]))
    return columns(rows)


def run_text(run: Mapping[str, Any], events: list[dict[str, Any]]) -> str:
    """Returns a run and what happened in it."""
    lines = [runs_text([dict(run)]), ""]
    for event in events:
        about = " ".join(f"{name}={value}" for name, value in event["detail"].items() if value not in (None, ""))
        lines.append(f"{event['kind']} {event['device_id'] or ''} {about}".replace("  ", " "))
    return "\n".join(lines)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows of text as columns."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows)  # noqa: B905
