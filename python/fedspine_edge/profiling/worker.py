"""One model in one process, timed on command: the measured side of `child.py`.

Comes in: one command a line on stdin, a JSON object whose `do` is `load`, `run` or `losses`. Goes out: one JSON line an
answer on stdout. A process of its own makes the peak memory that of this model alone.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from fedspine_edge.errors import FedSpineError
from fedspine_edge.profiling.runtimes import RUNTIMES, Opening, Runtime

SEED = 0


def timed_run(runtime: Runtime, tokens: Sequence[int], *, num_prompt: int) -> dict[str, Any]:
    """Feeds a prompt at once and the rest one by one, and returns when.

    Args:
        runtime: The model.
        tokens: Prompt and generated tokens; the latter are given, so that every run does the same work.
        num_prompt: How many of them are the prompt; 0 for none.

    Returns:
        `start`, `prompt_end` and `end` by the monotonic clock all processes share, `cpu_seconds`, and `token_seconds`,
        the time of each generated token.
    """
    runtime.clear()
    each = []
    cpu, start = time.process_time(), time.perf_counter()
    if num_prompt:
        runtime.feed(tokens[:num_prompt])
    prompt_end = before = time.perf_counter()
    for token in tokens[num_prompt:]:
        runtime.feed([token])
        now = time.perf_counter()
        each.append(now - before)
        before = now
    return {
        "start": start,
        "prompt_end": prompt_end,
        "end": before,
        "cpu_seconds": time.process_time() - cpu,
        "token_seconds": each,
    }


def text_losses(runtime: Runtime, text: str, *, num_context: int) -> dict[str, Any]:
    """Returns `losses`, nats of each token of a text but the first of each window of a context; none for an encoder."""
    tokens = runtime.tokenize(text) if runtime.facts.generates else []
    windows = [tokens[start : start + num_context] for start in range(0, len(tokens), num_context)]
    return {"losses": [loss for window in windows if len(window) > 1 for loss in runtime.losses(window)]}


class Worker:
    """Answers commands with one model."""

    def __init__(self) -> None:
        self._runtime: Runtime | None = None
        self._num_context = 0
        self._tokens: list[int] = []

    def answer(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the answer to one command."""
        if command["do"] == "load":
            return self._load(command)
        if self._runtime is None:
            raise ValueError("expected load before any other command")
        if command["do"] == "losses":
            return text_losses(self._runtime, command["text"], num_context=self._num_context)
        num_prompt, num_generate = command["num_prompt"], command["num_generate"]
        return timed_run(self._runtime, self._tokens[: num_prompt + num_generate], num_prompt=num_prompt)

    def _load(self, command: Mapping[str, Any]) -> dict[str, Any]:
        sizes = {name: command[name] for name in ("num_context", "num_threads", "num_batch")}
        self._runtime = RUNTIMES[command["backend"]](Opening(Path(command["path"]), **sizes))
        self._num_context = sizes["num_context"]
        facts, chooser = self._runtime.facts, random.Random(SEED)
        self._tokens = [chooser.randrange(facts.num_vocab) for _ in range(self._num_context)]
        return facts._asdict()


def serve(lines: Iterable[str], answers: IO[str]) -> int:
    """Answers commands until there are no more and returns the exit code."""
    worker = Worker()
    _say(answers, {"ready": True})
    for line in lines:
        try:
            _say(answers, worker.answer(json.loads(line)))
        except FedSpineError as error:
            _say(answers, {"error": str(error), "hint": error.hint, "kind": type(error).__name__})
            return error.exit_code
    return 0


def main() -> int:
    """Serves stdin; what libraries print to stdout goes to stderr, so that it is no answer."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        return serve(sys.stdin, answers)


def _say(answers: IO[str], answer: Mapping[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    sys.exit(main())
