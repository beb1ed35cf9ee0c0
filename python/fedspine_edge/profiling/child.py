"""The measuring processes, seen from the one that asks: one a model, kept alive and driven in turn.

Comes in: paths and sizes. Goes out: `Child`ren whose `run` and `losses` answer with what `worker.py` measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import fedspine_edge
from fedspine_edge import errors
from fedspine_edge.errors import FedSpineError, IncompatibleError
from fedspine_edge.profiling.memory import Memory, PeakMemory, process_memory
from fedspine_edge.profiling.runtimes import Facts, backend_of

WORKER = "fedspine_edge.profiling.worker"
NOT_STOCK = ("OMP_", "OPENBLAS_", "MALLOC_")


class Run(NamedTuple):
    """One timed run; times by the monotonic clock all processes share, seconds.

    Attributes:
        start: When it began.
        prompt_end: When the first token was chosen; `start` without a prompt.
        end: When the last one was.
        cpu_seconds: CPU time of the process.
        token_seconds: Time of each generated token.
    """

    start: float
    prompt_end: float
    end: float
    cpu_seconds: float
    token_seconds: list[float]

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


@dataclass(frozen=True)
class Child:
    """A process that holds one loaded model.

    Attributes:
        path: The model.
        backend: A key of `RUNTIMES`.
        facts: What the runtime tells of it.
        base_memory: What the process held before it loaded anything.
        load_memory: Its peak while it loaded.
    """

    path: Path
    backend: str
    facts: Facts
    base_memory: Memory
    load_memory: Memory
    _process: subprocess.Popen[str]
    _messages: IO[bytes]

    @property
    def pid(self) -> int:
        """Id of the process."""
        return self._process.pid

    def run(self, num_prompt: int, num_generate: int) -> Run:
        """Feeds a prompt at once, then tokens one by one, and returns when."""
        return Run(**self._ask({"do": "run", "num_prompt": num_prompt, "num_generate": num_generate}))

    def losses(self, text: str) -> list[float]:
        """Returns the loss of each token of a text, nats; empty for an encoder or without a tokenizer."""
        found: list[float] = self._ask({"do": "losses", "text": text})["losses"]
        return found

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        return _ask(self._process, self._messages, self.path, command)


def open_child(stack: contextlib.ExitStack, path: Path, *, num_context: int, num_threads: int, num_batch: int) -> Child:
    """Returns a process that has loaded a model; it ends with the stack.

    Raises:
        CheckpointError: There is no such model, or it is damaged.
        IncompatibleError: Its runtime does not load it or is not installed.
    """
    backend = backend_of(path)
    messages = tempfile.TemporaryFile()  # noqa: SIM115  # Closed with the stack.
    stack.callback(messages.close)
    process = subprocess.Popen(
        [sys.executable, "-m", WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=messages,
        text=True,
        env=_stock_environment(),
    )
    stack.callback(_stop, process)
    _read(process, messages, path)
    base = process_memory(process.pid)
    with PeakMemory(process.pid) as memory:
        sizes = {"num_context": num_context, "num_threads": num_threads, "num_batch": num_batch}
        command = {"do": "load", "backend": backend, "path": str(path.absolute()), **sizes}
        facts = Facts(**_ask(process, messages, path, command))
    return Child(path, backend, facts, base, memory.peak, process, messages)


def _stock_environment() -> dict[str, str]:
    """The environment without what our program sets for its own threads: a model is measured as a user runs it.

    OMP_WAIT_POLICY=passive makes each barrier of llama.cpp a system call and halves the speed of generation.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(NOT_STOCK)}
    # The package may have been found through sys.path alone, which a child does not inherit.
    package_root = str(Path(fedspine_edge.__file__).resolve().parents[1])
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))}


def _stop(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
    process.terminate()
    process.wait()


def _ask(process: subprocess.Popen[str], messages: IO[bytes], path: Path, command: dict[str, Any]) -> dict[str, Any]:
    if process.stdin is not None:
        # A process that died is told apart by its missing answer.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
    return _read(process, messages, path)


def _read(process: subprocess.Popen[str], messages: IO[bytes], path: Path) -> dict[str, Any]:
    line = process.stdout.readline() if process.stdout is not None else ""
    if not line:
        raise IncompatibleError(
            f"expected a measurement of {path.name}, its process ended {_ending(process.wait())}{_last(messages)}",
            hint="run the model in another program of that runtime; free some memory if the process was killed",
        )
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        kind = getattr(errors, answer["kind"], FedSpineError)
        raise kind(answer["error"], hint=answer["hint"])
    return answer


def _ending(code: int) -> str:
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with {code}"


def _last(messages: IO[bytes]) -> str:
    messages.seek(0)
    lines = messages.read().decode("utf-8", "replace").strip().splitlines()
    return f": {lines[-1]}" if lines else ""
