"""A task or an order as the server describes it, checked field by field before anything is done with it.

Comes in: JSON from the server. Goes out: a dict of known fields of known types: data, never code, and no name that
could lead out of the device's own directory.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

from fedspine_edge.agent.rollout import INSTALL, RESTORE, Order
from fedspine_edge.errors import IncompatibleError, UsageError
from fedspine_edge.rollout_gate import from_json

HASH = re.compile(r"[0-9a-f]{64}")
TASK_ID = re.compile(r"[0-9a-f]{32}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
MAX_BYTES = 1 << 31
MAX_MODEL_BYTES = 1 << 40
MOST_PASSAGE = 1 << 16
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,127}")
KIND = re.compile(f"{INSTALL}|{RESTORE}")
COUNTS = ("attempt", "round_index", "rank", "num_steps", "min_steps", "seed", "chunk_bytes", "max_update_bytes")


def checked_task(reply: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a task's known fields.

    Raises:
        IncompatibleError: One is missing, or is not what it must be.
    """
    try:
        blob, recipe = reply["blob"], reply["recipe"]
        task = {
            **{name: _count(reply, name, 1 << 53) for name in COUNTS},
            "task_id": _text(reply, "task_id", TASK_ID),
            "run_id": _text(reply, "run_id", NAME),
            "device_id": _text(reply, "device_id", NAME),
            "base_sha256": _text(reply, "base_sha256", HASH),
            "pruning_ratio": _number(reply, "pruning_ratio", 1.0),
            "lease_seconds": _number(reply, "lease_seconds", math.inf),
            "budget_seconds": None
            if reply.get("budget_seconds") is None
            else _number(reply, "budget_seconds", math.inf),
            "blob": {
                "sha256": _text(blob, "sha256", HASH),
                "num_bytes": _count(blob, "num_bytes", MAX_BYTES),
                "message_bytes": _count(blob, "message_bytes", MAX_BYTES),
            },
            "recipe": _recipe(recipe),
            # An older server has no such field.
            "inline_bytes": _count({"inline_bytes": 0, **reply}, "inline_bytes", MAX_BYTES),
        }
    except (KeyError, TypeError) as error:
        raise IncompatibleError(
            f"expected a whole task, found none of: {error}", hint="upgrade the older side"
        ) from error
    if not task["chunk_bytes"] or not task["num_steps"] or not task["rank"]:
        raise IncompatibleError("expected chunk_bytes, num_steps and rank of at least 1, found 0")
    return task


def inline_message(reply: Mapping[str, Any], task: Mapping[str, Any]) -> bytes | None:
    """Returns the message that came within a checked task; None where it must be fetched."""
    found, blob = reply["blob"].get("content"), task["blob"]
    if not isinstance(found, str):
        return None
    try:
        content = base64.b64decode(found, validate=True)
    except ValueError:
        return None
    return content if hashlib.sha256(content).hexdigest() == blob["sha256"] else None


def checked_order(found: Mapping[str, Any]) -> Order:
    """Returns what a rollout asks.

    Raises:
        IncompatibleError: A field is missing, or is not what it must be.
    """
    try:
        model = found["model"]
        return Order(
            _count(found, "rollout_id", 1 << 53),
            _text(found, "kind", KIND),
            _text(model, "sha256", HASH),
            _count(model, "num_bytes", MAX_MODEL_BYTES),
            _text(model, "name", MODEL_NAME),
            from_json(found["gate"]),
            _passage(found.get("passage", "")),
        )
    except (KeyError, TypeError) as error:
        raise IncompatibleError(
            f"expected a whole order of a rollout, found none of: {error}", hint="upgrade the older side"
        ) from error
    except UsageError as error:
        raise IncompatibleError(str(error), hint="upgrade the older side") from error


def _passage(found: Any) -> str:
    if not isinstance(found, str) or len(found) > MOST_PASSAGE:
        raise IncompatibleError(f"expected a passage of at most {MOST_PASSAGE} characters, found {found!r:.80}")
    return found


def own_part(reply: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what names a task, enough to give it back.

    Raises:
        IncompatibleError: Not even that can be read.
    """
    try:
        return {"task_id": _text(reply, "task_id", TASK_ID), "attempt": _count(reply, "attempt", 1 << 53)}
    except (KeyError, TypeError) as error:
        raise IncompatibleError(f"expected a task's id and attempt, found none of: {error}") from error


def _text(fields: Mapping[str, Any], name: str, pattern: re.Pattern[str]) -> str:
    value = fields[name]
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise IncompatibleError(f"expected {name} as {pattern.pattern}, found {value!r:.80}")
    return value


def _count(fields: Mapping[str, Any], name: str, most: int) -> int:
    value = fields[name]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise IncompatibleError(f"expected {name} as a whole number of 0 to {most}, found {value!r:.80}")
    return value


def _number(fields: Mapping[str, Any], name: str, most: float) -> float:
    value = fields[name]
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= most:
        raise IncompatibleError(f"expected {name} as a number of 0 to {most}, found {value!r:.80}")
    return float(value)


def _recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    classes, prompt = recipe["classes"], recipe["prompt"]
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise IncompatibleError(f"expected the names of the classes, found {classes!r:.80}")
    if prompt is not None and not (isinstance(prompt, str) and prompt.count("{text}") == 1):
        raise IncompatibleError(f"expected a prompt with {{text}} once, found {prompt!r:.80}")
    return {"classes": classes, "prompt": prompt}
