"""The agent's end of a health check: a process that measures, its death one more answer.

Comes in: files. Goes out: what the process says, or why it says nothing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

LONGEST_SECONDS = 3600.0
POLL_SECONDS = 1.0
NOT_STOCK = ("OMP_", "OPENBLAS_", "MALLOC_")  # a model is measured as its users run it


def check_health(
    model: Path,
    base: Path | None,
    *,
    num_threads: int,
    beat: Callable[[], None],
    passage: Path | None = None,
    seconds: float = LONGEST_SECONDS,
) -> dict[str, Any]:
    """Has a model measured and returns `figures` and `base`, or `failure` with the reason.

    Args:
        model: What is to be judged.
        base: The model before; None for none.
        num_threads: Threads.
        beat: Called every second meanwhile.
        passage: Text whose perplexity is measured; None for the built-in one.
        seconds: How long it may take.
    """
    command = [sys.executable, "-m", "fedspine_edge.agent.health", str(num_threads), str(passage or ""), str(model)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(NOT_STOCK)}
    process = subprocess.Popen(
        [*command, *([str(base)] if base is not None else [])],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    try:
        waited = 0.0
        while waited < seconds:
            beat()
            try:
                # stdin stays open meanwhile: its end would be the agent's.
                code = process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                waited += POLL_SECONDS
            else:
                assert process.stdout is not None
                return _read(process.stdout.read(), code)
        return {"failure": f"the check did not end within {seconds:.0f} s"}
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def _read(said: str, code: int) -> dict[str, Any]:
    if code != 0:
        cause = "was killed, most likely for want of memory" if code == -signal.SIGKILL else f"ended with {code}"
        return {"failure": f"the health check {cause}"}
    try:
        found: dict[str, Any] = json.loads(said)
    except ValueError:
        return {"failure": f"the health check said nothing that can be read: {said[:80]!r}"}
    return found
