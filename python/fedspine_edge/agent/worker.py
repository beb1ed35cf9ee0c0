"""The process that tunes: opens the base model once, keeps it between rounds, does one task after another.

Comes in: one JSON object a line on stdin. Goes out: one JSON object a line on what was stdout (what libraries print
goes to stderr). Nothing here knows of a network. It ends with its agent; when the kernel kills it for memory, one
task is lost and the agent lives.

| asked | answered |
|---|---|
| `open` {model, data, threads, slow_down} | `ready` {base_sha256, num_examples} |
| `tune` {task, blob, states, update} | `step` {step, loss}, then `done` {sha256, num_bytes} or `failed` {reason} |
| `pause`, `resume`, `cancel` | |
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fedspine_edge.atomic import write_bytes
from fedspine_edge.base_model import BaseModel, open_base
from fedspine_edge.batches import Encoding, TokenSet
from fedspine_edge.checkpoint import load_device_state, save_device_state
from fedspine_edge.config import cache_directory
from fedspine_edge.data import Example, read_examples
from fedspine_edge.device import run_round
from fedspine_edge.errors import DataError, FedSpineError
from fedspine_edge.protocol import Assignment
from fedspine_edge.sources import model_directory
from fedspine_edge.wire_format import assignment_from_bytes, pack, to_bytes, unpack
from fedspine_edge.workbench import Workbench, open_workbench


class _CancelledError(Exception):
    """The server no longer wants this task."""


class _Control:
    """What the agent says while a task runs."""

    def __init__(self) -> None:
        self.requests: queue.Queue[dict[str, Any]] = queue.Queue()
        self.going = threading.Event()
        self.going.set()
        self.cancelled = threading.Event()

    def listen(self) -> None:
        """Reads stdin to its end, which is the agent's end, and ends the process."""
        for line in sys.stdin:
            message = json.loads(line)
            kind = message["kind"]
            if kind == "pause":
                self.going.clear()
            elif kind == "resume":
                self.going.set()
            elif kind == "cancel":
                self.cancelled.set()
                self.going.set()
            else:
                self.requests.put(message)
        os._exit(0)


@dataclasses.dataclass
class _Opened:
    """The base model and this device's examples."""

    base: BaseModel
    examples: list[Example]
    slow_down: float
    recipe: Mapping[str, Any] | None = None
    bench: Workbench | None = None
    tokens: TokenSet | None = None

    def prepare(self, recipe: Mapping[str, Any]) -> tuple[Workbench, TokenSet]:
        """Returns the model and the tokens for a run's classes; loaded once as long as these stay the same."""
        if recipe != self.recipe or self.bench is None or self.tokens is None:
            classes = tuple(recipe["classes"])
            unknown = sorted({example.label for example in self.examples} - set(classes))
            if unknown:
                raise DataError(f"expected labels among {', '.join(classes)}, found {unknown[0]!r}")
            encoding = Encoding(self.base.tokenizer(), classes, recipe["prompt"])
            choices = encoding.choice_tokens() if recipe["prompt"] is not None else None
            self.tokens = encoding.encode(self.examples)
            self.bench = open_workbench(
                self.base.path, sha256=self.base.sha256, num_labels=len(classes), choices=choices
            )
            self.recipe = recipe
        return self.bench, self.tokens


def main() -> None:
    """Serves the agent until it ends."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    control = _Control()
    threading.Thread(target=control.listen, name="control", daemon=True).start()

    def say(kind: str, **fields: Any) -> None:
        channel.write(json.dumps({"kind": kind, **fields}) + "\n")
        channel.flush()

    opened: _Opened | None = None
    while True:
        message = control.requests.get()
        try:
            if message["kind"] == "open":
                opened = _open(message)
                say("ready", base_sha256=opened.base.sha256, num_examples=len(opened.examples))
            else:
                assert opened is not None
                control.cancelled.clear()
                say("done", **_tune(opened, message, control, say))
        except _CancelledError:
            say("failed", reason="cancelled")
        except (FedSpineError, ValueError, KeyError, RuntimeError, OSError) as error:
            # Whatever a task does to us is that task's end, not the worker's; torch's own trouble is RuntimeError.
            say("failed", reason=f"{type(error).__name__}: {error}")


def _open(message: Mapping[str, Any]) -> _Opened:
    if message["threads"]:
        torch.set_num_threads(message["threads"])
    base = open_base(model_directory(message["model"], cache_directory()))
    return _Opened(base, read_examples(message["data"]), message["slow_down"])


def _tune(opened: _Opened, message: Mapping[str, Any], control: _Control, say: Any) -> dict[str, Any]:
    task = message["task"]
    frame = Path(message["blob"]).read_bytes()
    assignment = own_assignment(unpack(frame, max_bytes=task["blob"]["message_bytes"]), task)
    bench, tokens = opened.prepare(task["recipe"])
    states = Path(message["states"]) / assignment.run_id
    state = load_device_state(states, assignment.device_id, assignment.round_index)
    last = time.perf_counter()

    def on_step(step: int, loss: float) -> None:
        nonlocal last
        # A slower board is emulated where its time would go, so that everything that is measured agrees.
        time.sleep((time.perf_counter() - last) * (opened.slow_down - 1))
        say("step", step=step, num_steps=assignment.num_steps, loss=loss)
        control.going.wait()
        if control.cancelled.is_set():
            raise _CancelledError
        last = time.perf_counter()

    update, state = run_round(bench, assignment, tokens, state, on_step=on_step)
    save_device_state(states, assignment.device_id, assignment.round_index, state)
    content = pack(to_bytes(update))
    write_bytes(Path(message["update"]), content)
    return {"sha256": hashlib.sha256(content).hexdigest(), "num_bytes": len(content)}


OWN = ("device_id", "pruning_ratio", "num_steps", "seed", "budget_seconds", "min_steps")


def own_assignment(message: bytes, task: Mapping[str, Any]) -> Assignment:
    """Returns the assignment in a message that devices share, with what is this device's own put in."""
    own = {name: task[name] for name in OWN}
    return dataclasses.replace(assignment_from_bytes(message), **own)


if __name__ == "__main__":
    main()
