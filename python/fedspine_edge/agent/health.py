"""`python -m fedspine_edge.agent.health THREADS PASSAGE MODEL [BASE]`: is a model whole, what does it do on this board?

Comes in: a text's file (empty for the built-in one), GGUF files. Goes out: a JSON line, `{"figures": ..., "base": ...}`
or `{"failure": "..."}`. It is a process of its own, and llama.cpp runs in one below it: what crashes or runs out of
memory there is an answer, and the agent lives. It ends with its agent, whose end closes its stdin.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import sys
import threading
from pathlib import Path
from typing import Any

from fedspine_edge.agent.gguf_file import check_gguf
from fedspine_edge.errors import CheckpointError, FedSpineError, IncompatibleError
from fedspine_edge.profiling.child import Child, open_child
from fedspine_edge.profiling.memory import peak_rss_bytes

PASSAGE = Path(__file__).parents[1] / "profiling" / "passage.txt"
NUM_CONTEXT, NUM_PROMPT, NUM_GENERATE, REPETITIONS = 128, 64, 32, 3


def figures_of(path: Path, num_threads: int, passage: str) -> dict[str, Any]:
    """Returns what a model does here: perplexity of a passage, tokens/s, peak memory.

    Raises:
        FedSpineError: It is no whole model, or llama.cpp does not run it.
    """
    check_gguf(path)
    with contextlib.ExitStack() as stack:
        child = open_child(stack, path, num_context=NUM_CONTEXT, num_threads=num_threads, num_batch=NUM_CONTEXT)
        child.run(NUM_PROMPT, NUM_GENERATE)  # warms up
        losses = child.losses(passage)
        ppl = math.exp(min(statistics.fmean(losses), 700.0)) if losses else None
        if ppl is not None and not math.isfinite(ppl):
            raise IncompatibleError("expected finite losses, found NaN")
        return {
            "ppl": ppl,
            "tokens_per_second": _speed(child, 0, NUM_GENERATE),
            "prompt_tokens_per_second": _speed(child, NUM_PROMPT, 0),
            "peak_memory_bytes": peak_rss_bytes(child.pid),
        }


def _speed(child: Child, num_prompt: int, num_generate: int) -> float:
    seconds = [child.run(num_prompt, num_generate).seconds for _ in range(REPETITIONS)]
    return (num_prompt + num_generate) / statistics.median(seconds)


def answer(num_threads: int, passage: str, model: Path, base: Path | None) -> dict[str, Any]:
    """Returns what is said of a model, and of the one before it where there is one."""
    try:
        figures = figures_of(model, num_threads, passage)
    except FedSpineError as error:
        return {"failure": str(error)}
    try:
        before = figures_of(base, num_threads, passage) if base is not None else None
    except (IncompatibleError, CheckpointError) as error:
        sys.stderr.write(f"the model before cannot be measured: {error}\n")
        before = None
    return {"figures": figures, "base": before}


def _end_with_agent() -> None:
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    """Answers on stdout."""
    threading.Thread(target=_end_with_agent, name="agent", daemon=True).start()
    with contextlib.suppress(OSError):  # when memory runs out, the kernel is to take this one
        Path("/proc/self/oom_score_adj").write_text("1000")
    num_threads, text, *files = sys.argv[1:]
    passage = Path(text or PASSAGE).read_text(encoding="utf-8")
    model, base = Path(files[0]), Path(files[1]) if len(files) > 1 else None
    sys.stdout.write(json.dumps(answer(int(num_threads), passage, model, base)) + "\n")
    sys.stdout.flush()
    os._exit(0)  # not to wait for the thread that waits for the agent


if __name__ == "__main__":
    main()
