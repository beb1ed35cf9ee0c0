"""How fast GGUF files run in llama.cpp, side by side: prompt and generation tokens/s, TTFT, ITL, memory.

In: GGUF files. Out: one `Speed` a file and, against the first of them, one `SpeedRatio` a file. The tests are
llama-bench's (`pp512`: one batch of prompt; `tg128`: one token at a time). Every file has a process of its own, kept
alive and driven in turn, so runs interleave (A B A B) and a slow minute of the machine hits all files alike; never do
two run at once, for llama.cpp's threads spin at barriers and would halve each other.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fedspine_edge.profiling.child import Child, Run, open_child
from fedspine_edge.profiling.memory import peak_rss_bytes, process_memory

DISTURBED_SHARE = 0.9
"""Below this share of the CPU time its threads could have had, a run shared the cores with others and is repeated."""

MAX_REPEATS = 2
WARM_UP_TOKENS = 8


class Spread(NamedTuple):
    """Median of samples, with their first and third quartile."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Speed:
    """What one file does; the tuples hold one sample a repetition, in the order they were taken.

    Attributes:
        path: The file.
        model_type: As llama-bench names it.
        size_bytes: Size of the file.
        num_parameters: Weights in the file.
        num_threads: Threads.
        num_prompt: Tokens of the prompt test.
        num_generate: Tokens of the generation test.
        prompt_tokens_per_second: Samples of the prompt test.
        generate_tokens_per_second: Samples of the generation test.
        ttft_seconds: Samples of the time from a prompt of `num_prompt` tokens to the first token.
        itl_seconds: Time between tokens: 50th, 95th and 99th percentile over all repetitions.
        peak_memory_bytes: Peak resident memory of the process; None where the kernel does not say.
        base_memory_bytes: What that process held before it loaded the model (Python itself).
        pss_bytes: Proportional resident memory at the end.
        cpu_share: Smallest share of its threads' CPU time that a kept run got: well below 1 on a busy machine.
    """

    path: Path
    model_type: str
    size_bytes: int
    num_parameters: int
    num_threads: int
    num_prompt: int
    num_generate: int
    prompt_tokens_per_second: tuple[float, ...]
    generate_tokens_per_second: tuple[float, ...]
    ttft_seconds: tuple[float, ...]
    itl_seconds: tuple[float, float, float]
    peak_memory_bytes: int | None
    base_memory_bytes: int | None
    pss_bytes: int | None
    cpu_share: float


@dataclass(frozen=True)
class SpeedRatio:
    """One file against the first: above 1 is faster, smaller, leaner.

    Attributes:
        path: The file.
        prompt: Speed-up of the prompt test, over the repetitions, each against its neighbour in time.
        generate: Speed-up of the generation test.
        ttft: Speed-up of the time to the first token.
        size: How many times smaller the file is.
        memory: How many times smaller the peak memory beyond Python's own is; None where it was not measured.
    """

    path: Path
    prompt: Spread
    generate: Spread
    ttft: Spread
    size: float
    memory: float | None


class _Sample(NamedTuple):
    """One kept run: seconds by the chosen clock, the share of its threads' CPU time it got, seconds a token."""

    seconds: float
    cpu_share: float
    token_seconds: list[float]


@dataclass(frozen=True)
class _Runs:
    """Kept runs of one file so far."""

    prompts: list[_Sample] = field(default_factory=list)
    generations: list[_Sample] = field(default_factory=list)


def compare_speed(
    paths: Sequence[Path],
    *,
    num_prompt: int = 512,
    num_generate: int = 128,
    repetitions: int = 5,
    num_threads: int,
    clock: str = "wall",
) -> list[Speed]:
    """Measures files in turn, after a warm-up of each.

    Args:
        paths: GGUF files; all are held in memory at once.
        num_prompt: Tokens of the prompt test.
        num_generate: Tokens of the generation test.
        repetitions: Samples of each test and file.
        num_threads: Threads; more than the free cores makes llama.cpp tens of times slower.
        clock: `wall`, what a user waits; or `cpu`, one thread only, for a machine that has other work.

    Returns:
        One `Speed` a path, in their order.

    Raises:
        ValueError: A count is below 1, or the clock is unknown or does not suit the threads.
        IncompatibleError: llama.cpp does not run a file.
    """
    if min(num_prompt, num_generate, repetitions, num_threads) < 1:
        raise ValueError("expected counts of at least 1 for tokens, repetitions and threads")
    if clock not in ("wall", "cpu") or (clock == "cpu" and num_threads != 1):
        raise ValueError(f"expected clock wall, or cpu with 1 thread, found {clock!r} with {num_threads}")
    options = {"num_prompt": num_prompt, "num_generate": num_generate, "num_threads": num_threads}
    with contextlib.ExitStack() as stack:
        children = [_open(stack, Path(path), options) for path in paths]
        runs = [_Runs() for _ in children]
        for _ in range(repetitions):
            for child, run in zip(children, runs, strict=True):
                run.prompts.append(_sample(child, (num_prompt, 0), num_threads, clock))
            for child, run in zip(children, runs, strict=True):
                run.generations.append(_sample(child, (0, num_generate), num_threads, clock))
        return [_speed(child, run, options) for child, run in zip(children, runs, strict=True)]


def speed_ratios(speeds: Sequence[Speed]) -> list[SpeedRatio]:
    """Returns each file against the first, repetition by repetition; the first itself is all ones."""
    first = speeds[0]
    return [
        SpeedRatio(
            path=speed.path,
            prompt=_ratio(speed.prompt_tokens_per_second, first.prompt_tokens_per_second),
            generate=_ratio(speed.generate_tokens_per_second, first.generate_tokens_per_second),
            ttft=_ratio(first.ttft_seconds, speed.ttft_seconds),
            size=first.size_bytes / speed.size_bytes,
            memory=_memory_ratio(first, speed),
        )
        for speed in speeds
    ]


def spread(samples: Sequence[float]) -> Spread:
    """Returns median and quartiles of at least one sample."""
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0])
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(median, low, high)


def _ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    return spread([above / below for above, below in zip(numerators, denominators, strict=True)])


def _memory_ratio(first: Speed, speed: Speed) -> float | None:
    own, other = _model_memory(first), _model_memory(speed)
    return own / other if own and other else None


def _model_memory(speed: Speed) -> int | None:
    if speed.peak_memory_bytes is None or speed.base_memory_bytes is None:
        return None
    return speed.peak_memory_bytes - speed.base_memory_bytes


def _open(stack: contextlib.ExitStack, path: Path, options: dict[str, int]) -> Child:
    """Returns a process that has loaded a file and warmed up; it ends with the stack."""
    num_prompt, num_generate = options["num_prompt"], options["num_generate"]
    context = max(num_prompt, num_generate)
    child = open_child(stack, path, num_context=context, num_threads=options["num_threads"], num_batch=context)
    child.run(num_prompt, 0)
    child.run(0, min(WARM_UP_TOKENS, num_generate))
    return child


def _sample(child: Child, sizes: tuple[int, int], num_threads: int, clock: str) -> _Sample:
    """Returns a run by the CPU's clock; by the wall's, one that had the cores to itself or the calmer of two."""
    best: tuple[float, Run] | None = None
    for _ in range(MAX_REPEATS if clock == "wall" else 1):
        run = child.run(*sizes)
        share = min(1.0, run.cpu_seconds / (run.seconds * num_threads))
        if best is None or share > best[0]:
            best = share, run
        if best[0] >= DISTURBED_SHARE:
            break
    assert best is not None
    share, run = best
    return _Sample(run.cpu_seconds if clock == "cpu" else run.seconds, share, run.token_seconds)


def _speed(child: Child, runs: _Runs, options: dict[str, int]) -> Speed:
    each = sorted(seconds for run in runs.generations for seconds in run.token_seconds)
    percentiles = [each[min(len(each) - 1, int(share * len(each)))] for share in (0.5, 0.95, 0.99)]
    return Speed(
        path=child.path,
        model_type=child.facts.model_type,
        size_bytes=child.path.stat().st_size,
        num_parameters=child.facts.num_parameters or 0,
        **options,
        prompt_tokens_per_second=tuple(options["num_prompt"] / run.seconds for run in runs.prompts),
        generate_tokens_per_second=tuple(options["num_generate"] / run.seconds for run in runs.generations),
        ttft_seconds=tuple(run.seconds for run in runs.prompts),
        itl_seconds=(percentiles[0], percentiles[1], percentiles[2]),
        peak_memory_bytes=peak_rss_bytes(child.pid),
        base_memory_bytes=child.base_memory.rss_bytes,
        pss_bytes=process_memory(child.pid).pss_bytes,
        cpu_share=min(run.cpu_share for run in [*runs.prompts, *runs.generations]),
    )
