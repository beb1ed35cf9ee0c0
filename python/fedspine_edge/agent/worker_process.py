"""The agent's end of the worker: started when there is work, gone when it dies, stopped when it idles.

Comes in: what the worker is asked. Goes out: what it answers, with its death as one more answer.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fedspine_edge.agent.settings import AgentSettings

STOP_SECONDS = 5.0
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    # glibc otherwise keeps the last round's packed weights.
    "MALLOC_MMAP_THRESHOLD_": "2097152",
    "MALLOC_ARENA_MAX": "2",
}


class WorkerProcess:
    """A worker, running or not.

    Args:
        settings: Model, data, threads.
        command: How it is started.
    """

    def __init__(self, settings: AgentSettings, command: tuple[str, ...] = ()) -> None:
        self._settings = settings
        self._command = command or (sys.executable, "-m", "fedspine_edge.agent.worker")
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> bool:
        """Starts it unless it runs; returns whether it was started. `ready` or `failed` is its first answer."""
        if self.pid is not None:
            return False
        self.stop()
        environment = {**ENVIRONMENT, **os.environ}
        if self._settings.threads:
            environment["OMP_NUM_THREADS"] = str(self._settings.threads)
        self._answers = queue.Queue()
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        threading.Thread(
            target=_listen, args=(self._process, self._answers), name="worker-answers", daemon=True
        ).start()
        wanted = ("model", "data", "threads", "slow_down")
        self.ask("open", **{name: asdict(self._settings)[name] for name in wanted})
        return True

    def ask(self, kind: str, **fields: Any) -> None:
        """Says something to the worker; one that has died answers so by itself."""
        if self._process is None or self._process.stdin is None:
            return
        try:
            self._process.stdin.write(json.dumps({"kind": kind, **fields}) + "\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            return

    def answer(self, seconds: float) -> Mapping[str, Any] | None:
        """Returns the next answer; None when there is none for so long."""
        try:
            return self._answers.get(timeout=seconds)
        except queue.Empty:
            return None

    def stop(self) -> None:
        """Ends the worker and takes its memory back."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.close()
            process.wait(STOP_SECONDS)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            process.kill()
            process.wait()


def _listen(process: subprocess.Popen[str], answers: queue.Queue[dict[str, Any]]) -> None:
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            try:
                answers.put(json.loads(line))
            except ValueError:
                continue  # a line cut off by its death
    code = process.wait()
    answers.put({"kind": "died", "reason": _cause(code)})


def _cause(code: int) -> str:
    if code == -signal.SIGKILL:
        return "the worker was killed, most likely for want of memory"
    return f"the worker ended by signal {-code}" if code < 0 else f"the worker ended with exit code {code}"
