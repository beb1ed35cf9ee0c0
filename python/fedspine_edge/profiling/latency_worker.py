"""One model in one process, timed on command: the measured side of `latency.py`.

In: a GGUF file and sizes as arguments, then one command a line on stdin (`prompt`, `generate`, `memory`). Out: one JSON
line an answer on stdout. A process of its own makes the peak memory that of this model alone; it imports no torch.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedspine_edge.errors import FedSpineError
from fedspine_edge.export.llama_session import LlamaSession, open_session

SEED = 0
WARM_UP_TOKENS = 8


def process_memory() -> dict[str, int | None]:
    """Returns peak resident and current proportional bytes of this process; None where the kernel does not say."""
    return {
        "peak_memory_bytes": _kibibytes(Path("/proc/self/status"), "VmHWM:"),
        "pss_bytes": _kibibytes(Path("/proc/self/smaps_rollup"), "Pss:"),
    }


def _kibibytes(path: Path, label: str) -> int | None:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    values = [line.split()[1] for line in lines if line.startswith(label)]
    return 1024 * int(values[0]) if values else None


def time_prompt(session: LlamaSession, tokens: list[int]) -> dict[str, Any]:
    """Returns wall and CPU seconds from a whole prompt to its first chosen token."""
    session.clear()
    wall, cpu = time.perf_counter(), time.process_time()
    session.decode(
        tokens,
        positions=range(len(tokens)),
        sequences=[0] * len(tokens),
        wanted=[False] * (len(tokens) - 1) + [True],
    )
    session.logits(len(tokens) - 1).argmax()
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def time_generation(session: LlamaSession, tokens: list[int]) -> dict[str, Any]:
    """Returns wall and CPU seconds of tokens decoded one by one, and the wall seconds of each."""
    session.clear()
    each = []
    wall, cpu = time.perf_counter(), time.process_time()
    for position, token in enumerate(tokens):
        start = time.perf_counter()
        session.decode([token], positions=[position], sequences=[0], wanted=[True])
        session.logits(0).argmax()
        each.append(time.perf_counter() - start)
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu, "token_seconds": each}


def _answers(arguments: argparse.Namespace, commands: Iterator[str]) -> Iterator[dict[str, Any]]:
    before = process_memory()["peak_memory_bytes"]
    context = max(arguments.num_prompt, arguments.num_generate)
    with open_session(arguments.path, num_context=context, num_threads=arguments.num_threads) as session:
        tokens = [random.Random(SEED).randrange(session.num_vocab) for _ in range(context)]
        prompt, generated = tokens[: arguments.num_prompt], tokens[: arguments.num_generate]
        time_prompt(session, prompt)
        time_generation(session, generated[:WARM_UP_TOKENS])
        yield {
            "model_type": session.description,
            "num_parameters": session.num_parameters,
            "base_memory_bytes": before,
        }
        for command in commands:
            if command == "prompt":
                yield time_prompt(session, prompt)
            elif command == "generate":
                yield time_generation(session, generated)
            else:
                yield dict(process_memory())


def main() -> int:
    """Answers commands until stdin closes; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    for name in ("--num-prompt", "--num-generate", "--num-threads"):
        parser.add_argument(name, type=int, required=True)
    arguments = parser.parse_args()
    try:
        for answer in _answers(arguments, (line.strip() for line in sys.stdin)):
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
    except FedSpineError as error:
        sys.stdout.write(json.dumps({"error": str(error)}) + "\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
