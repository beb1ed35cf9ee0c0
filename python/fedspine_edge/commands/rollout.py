"""`fedspine rollout`: models to the server, from there to the devices, and where they are.

Comes in: a GGUF file, or the name of one the server has. Goes out: what the server says, and tables of it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedspine_edge.commands.operate import Operator, columns
from fedspine_edge.errors import CheckpointError, UsageError, VerificationError
from fedspine_edge.rollout_gate import parse

OVER = ("finished", "awaiting", "stopped", "rolled_back", "superseded")
LOOK_SECONDS = 1.0
MEBIBYTE = 1 << 20
SHORTEST_HASH = 6
MOST_PASSAGE = 32_768


def upload(operator: Operator, file: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """Sends a GGUF file to the server, going on where an earlier try broke off; returns the model.

    Args:
        operator: The server.
        file: The file.
        tell: Is told how far it is.

    Raises:
        CheckpointError: It cannot be read.
        LinkError: The server does not take it.
    """
    try:
        with file.open("rb") as content:
            sha256 = _digest(content)
            size = content.tell()
            there = operator.get(f"models/{sha256}/upload")
            if not there["complete"]:
                content.seek(there["num_chunks"] * there["chunk_bytes"])
                index = there["num_chunks"]
                while chunk := content.read(there["chunk_bytes"]):
                    operator.put(f"models/{sha256}/upload/{index}", chunk)
                    index += 1
                    tell(f"{file.name}: {content.tell() / size:.0%}")
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}", hint="check --model") from error
    found: dict[str, Any] = operator.post(f"models/{sha256}", {"name": _name_of(file), "num_bytes": size})
    return found


def _digest(content: Any) -> str:
    digest = hashlib.sha256()
    while part := content.read(MEBIBYTE):
        digest.update(part)
    return digest.hexdigest()


def _name_of(file: Path) -> str:
    name = "".join(c if c.isascii() and (c.isalnum() or c in "-_.+") else "-" for c in file.name)
    return name.lstrip("-_.+")[:128] or "model.gguf"


def model_of(operator: Operator, wanted: str, tell: Callable[[str], None]) -> dict[str, Any]:
    """Returns a model of the server: a file here is sent, else it is one by name or the beginning of its hash.

    Raises:
        UsageError: There is no such file, and no such model or more than one.
    """
    if Path(wanted).is_file():
        return upload(operator, Path(wanted), tell)
    by_hash = wanted if len(wanted) >= SHORTEST_HASH else "none"
    models = operator.get("models")
    found = [model for model in models if model["name"] == wanted or model["sha256"].startswith(by_hash)]
    if len(found) != 1:
        raise UsageError(
            f"expected a GGUF file or one model of the server, found {len(found) or 'none'} named {wanted}",
            hint="fedspine rollout models",
        )
    return dict(found[0])


def read_passage(file: Path) -> str:
    """Returns a text whose perplexity devices are to measure.

    Raises:
        UsageError: It cannot be read, is no UTF-8, empty or too long.
    """
    try:
        passage = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"expected a UTF-8 text in {file}, found: {error}") from error
    if not 0 < len(passage.strip()) <= len(passage) <= MOST_PASSAGE:
        raise UsageError(f"expected a text of 1 to {MOST_PASSAGE} characters, found {len(passage)}")
    return passage


def start(operator: Operator, model: str, request: Mapping[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    """Begins a rollout and returns it; the gate is looked at before anything is sent.

    Raises:
        UsageError: The gate is none, or there is no such model.
        LinkError: The server refuses.
    """
    parse(request["gate"])
    chosen = model_of(operator, model, tell)
    found: dict[str, Any] = operator.post("rollouts", {**request, "model_sha256": chosen["sha256"]})
    return found


def newest(operator: Operator) -> dict[str, Any]:
    """Returns the newest rollout; raises UsageError where there is none."""
    found = operator.get("rollouts")
    if not found:
        raise UsageError("there was no rollout yet", hint="fedspine rollout start --model FILE.gguf")
    return dict(found[0])


def wait(operator: Operator, rollout_id: int, show: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Waits until a rollout is over, showing each change, and returns it; who is away for long is not waited for.

    Raises:
        VerificationError: It was stopped or taken back, or a device failed or is away.
    """
    last = None
    while True:
        found: dict[str, Any] = operator.get(f"rollouts/{rollout_id}")
        if (found["status"], found["counts"]) != last:
            last = found["status"], found["counts"]
            show(found)
        if found["status"] in OVER:
            break
        time.sleep(LOOK_SECONDS)
    if found["status"] != "finished" or found["counts"].get("failed"):
        told = ", ".join(f"{count} {state}" for state, count in sorted(found["counts"].items()))
        raise VerificationError(f"rollout {rollout_id} is {found['status']}: {found['detail'] or told}")
    return found


def standing(rollout: Mapping[str, Any]) -> tuple[str, str]:
    """Returns how a rollout stands, and why where that is more than the status says."""
    if rollout["status"] == "awaiting":
        return rollout["detail"], ""
    return rollout["status"].replace("_", " "), rollout["detail"]


def text(rollout: Mapping[str, Any]) -> str:
    """Returns a rollout and its devices as a table."""
    model = rollout["model"]
    told = ", ".join(f"{count} {state.replace('_', ' ')}" for state, count in sorted(rollout["counts"].items()))
    status, why = standing(rollout)
    text_told = ", on your text" if rollout["own_passage"] else ""
    head = [
        f"rollout {rollout['rollout_id']}  {status}  {told}",
        f"model     {model['name']}  {model['num_bytes'] / MEBIBYTE:.1f} MiB  {model['sha256'][:12]}",
        f"gate      {rollout['gate'] or 'none: it has to run'}{text_told}",
        *([f"why       {why}"] if why else []),
    ]
    rows = [("DEVICE", "", "STATE", "SEEN", "PPL", "BASE", "T/S", "BASE", "WHY")]
    for device in rollout["devices"]:
        own, base = device["figures"] or {}, device["base"] or {}
        rows.append(
            (
                device["device_id"],
                "canary" if device["canary"] else "",
                _state(device, model["num_bytes"]),
                f"{device['last_seen_seconds']:.0f} s ago",
                _number(own.get("ppl")),
                _number(base.get("ppl")),
                _number(own.get("tokens_per_second")),
                _number(base.get("tokens_per_second")),
                device["reason"],
            )
        )
    return "\n".join([*head, "", columns(rows)])


def _state(device: Mapping[str, Any], num_bytes: int) -> str:
    if device["state"] == "downloading":
        return f"downloading {device['received_bytes'] / max(1, num_bytes):.0%}"
    return str(device["state"]).replace("_", " ")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def models_text(models: list[dict[str, Any]]) -> str:
    """Returns one line a model."""
    rows = [("MODEL", "MIB", "SHA-256")]
    rows += [(m["name"], f"{m['num_bytes'] / MEBIBYTE:.1f}", m["sha256"][:12]) for m in models]
    return columns(rows)
