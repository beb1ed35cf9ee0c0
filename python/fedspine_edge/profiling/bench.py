"""The measurement itself: warm-up, interleaved runs, memory by phase, energy, and whether the machine was quiet.

Comes in: measuring children and what to test. Goes out: one `Row` a model and test, with every sample. The tests are
llama-bench's: `pp512`, one prompt; `tg128`, one token at a time; `pp512+tg128`, both in a row. Runs of several models
interleave (A B, then B A), so that a slow minute of the machine hits all alike; never do two run at once.

Source: llama.cpp's tools/llama-bench, its tests and their names.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fedspine_edge.hardware import usable_cores
from fedspine_edge.profiling.child import Child, Run
from fedspine_edge.profiling.energy import Energy, energy_of
from fedspine_edge.profiling.memory import Memory, PeakMemory, highest
from fedspine_edge.profiling.noise import Quiet, QuietWatch, cpu_times
from fedspine_edge.profiling.watch import BoardWatch, Seen

MAX_WARM_UPS = 3
SETTLED = 0.95
"""A warm-up run this near the time of the one before it, or slower, is the last: there is nothing left to warm."""

IDLE_SECONDS = 1.0


class Trial(NamedTuple):
    """Prompt tokens, then generated ones; 0 of either for none."""

    num_prompt: int
    num_generate: int

    @property
    def name(self) -> str:
        """As llama-bench prints it."""
        parts = ("pp", self.num_prompt), ("tg", self.num_generate)
        return "+".join(f"{word}{count}" for word, count in parts if count)

    @property
    def num_tokens(self) -> int:
        """Tokens of one run."""
        return self.num_prompt + self.num_generate


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        tests: What to run.
        repetitions: Timed runs of each test.
        num_threads: Threads.
        num_batch: Tokens of one step of a prompt, at most.
    """

    tests: tuple[Trial, ...]
    repetitions: int
    num_threads: int
    num_batch: int

    @property
    def num_context(self) -> int:
        """Tokens the longest test holds."""
        return max(test.num_tokens for test in self.tests)


@dataclass(frozen=True)
class Phases:
    """Peak memory by phase; the later ones hold the earlier ones' as well.

    Attributes:
        base: Before loading: the interpreter itself.
        load: While loading.
        prompt: While a prompt was fed; all None without such a test.
        generation: While tokens were generated.
    """

    base: Memory
    load: Memory
    prompt: Memory
    generation: Memory

    @property
    def peak(self) -> Memory:
        """The highest of all phases."""
        return highest(highest(self.load, self.prompt), self.generation)


@dataclass(frozen=True)
class Row:
    """What one model did in one test; samples are in the order they were taken.

    Attributes:
        child: The model and its process.
        options: How it was measured.
        test: The test.
        test_time: Unix time of the first run.
        warm_ups: Untimed runs before.
        runs: The timed runs.
        run_energies: Energy of each run.
        energy: Energy of all runs.
        memory: Peaks by phase, of all tests of this model.
        quiet: Whether the machine was.
        seen: What was seen of the board.
    """

    child: Child
    options: Options
    test: Trial
    test_time: float
    warm_ups: int
    runs: tuple[Run, ...]
    run_energies: tuple[Energy, ...]
    energy: Energy
    memory: Phases
    quiet: Quiet
    seen: Seen

    @property
    def path(self) -> Path:
        """The model."""
        return self.child.path

    @property
    def seconds(self) -> tuple[float, ...]:
        """Time of each run."""
        return tuple(run.seconds for run in self.runs)

    @property
    def tokens_per_second(self) -> tuple[float, ...]:
        """Speed of each run."""
        return tuple(self.test.num_tokens / run.seconds for run in self.runs)

    @property
    def ttft_seconds(self) -> tuple[float, ...]:
        """Time from the prompt to the first token, of each run; empty without a prompt."""
        return tuple(run.prompt_end - run.start for run in self.runs) if self.test.num_prompt else ()

    @property
    def itl_seconds(self) -> tuple[float, ...]:
        """Times between tokens, of all runs together; empty when none are generated."""
        return tuple(seconds for run in self.runs for seconds in run.token_seconds)

    @property
    def joules_per_token(self) -> float | None:
        """Energy of one token; None without a meter."""
        return _per(self.energy.joules, self.test.num_tokens * len(self.runs))

    @property
    def net_joules_per_token(self) -> float | None:
        """Energy of one token beyond the idle draw; None without a meter."""
        return _per(self.energy.net_joules, self.test.num_tokens * len(self.runs))


@dataclass
class _Bench:
    """One model and test while they are measured."""

    child: Child
    test: Trial
    test_time: float = 0.0
    warm_ups: int = 0
    peak: Memory = field(default_factory=Memory)
    runs: list[Run] = field(default_factory=list)
    quiet: QuietWatch = field(default_factory=lambda: QuietWatch(usable_cores()))

    @property
    def windows(self) -> list[tuple[float, float]]:
        """When it ran."""
        return [(run.start, run.end) for run in self.runs]


def measure(
    children: Sequence[Child], options: Options, watch: BoardWatch, *, tell: Callable[[str], None] = lambda _: None
) -> list[Row]:
    """Measures models in turn.

    Args:
        children: A process for each model, loaded.
        options: What to run.
        watch: A running watch of the board.
        tell: Called with what is going on, for a progress line.

    Returns:
        Rows, model by model, each in the order of the tests. An encoder has no rows of tests that generate.

    Raises:
        IncompatibleError: A process died.
    """
    benches = [
        [_Bench(child, test) for test in options.tests if child.facts.generates or not test.num_generate]
        for child in children
    ]
    for bench in (bench for row in benches for bench in row):
        tell(f"{bench.child.path.name}: warming up {bench.test.name}")
        _warm_up(bench)
    idle_watts = _idle_watts(watch, tell)
    for repetition in range(options.repetitions):
        for test in options.tests:
            turn = [bench for row in benches for bench in row if bench.test == test]
            for bench in turn if repetition % 2 == 0 else reversed(turn):
                tell(f"{bench.child.path.name}: {test.name}, run {repetition + 1} of {options.repetitions}")
                _run(bench, watch)
    return [_row(bench, row, options, watch, idle_watts) for row in benches for bench in row]


def _warm_up(bench: _Bench) -> None:
    """Runs once under the memory sampler, then until a run is hardly faster than the one before it."""
    with PeakMemory(bench.child.pid) as memory:
        seconds = [bench.child.run(*bench.test).seconds]
    bench.peak = memory.peak
    while len(seconds) < MAX_WARM_UPS:
        seconds.append(bench.child.run(*bench.test).seconds)
        if seconds[-1] >= SETTLED * seconds[-2]:
            break
    bench.warm_ups = len(seconds)


def _idle_watts(watch: BoardWatch, tell: Callable[[str], None]) -> float | None:
    """Returns the mean power of the board with the models loaded and nothing running."""
    if watch.trace is None:
        return None
    tell("measuring the idle board")
    start = watch.sample()
    time.sleep(IDLE_SECONDS)
    return watch.trace.watts(start, watch.sample())


def _run(bench: _Bench, watch: BoardWatch) -> None:
    watch.sample()
    own, before = time.process_time(), cpu_times()
    bench.test_time = bench.test_time or time.time()
    run = bench.child.run(*bench.test)
    after = cpu_times()
    watch.sample()
    own_seconds = run.cpu_seconds + time.process_time() - own
    bench.runs.append(run)
    bench.quiet.add(before, after, seconds=run.seconds, own_seconds=own_seconds)


def _row(bench: _Bench, row: Sequence[_Bench], options: Options, watch: BoardWatch, idle_watts: float | None) -> Row:
    seen = watch.seen(bench.windows)
    return Row(
        child=bench.child,
        options=options,
        test=bench.test,
        test_time=bench.test_time,
        warm_ups=bench.warm_ups,
        runs=tuple(bench.runs),
        run_energies=tuple(energy_of(watch.trace, [window], idle_watts) for window in bench.windows),
        energy=energy_of(watch.trace, bench.windows, idle_watts),
        memory=_phases(bench.child, row),
        quiet=bench.quiet.quiet(clock_kept=seen.clock_kept, held_back=seen.held_back or (), spread=_spread(bench.runs)),
        seen=seen,
    )


def _phases(child: Child, row: Sequence[_Bench]) -> Phases:
    prompt = generation = Memory()
    for bench in row:
        if bench.test.num_prompt:
            prompt = highest(prompt, bench.peak)
        if bench.test.num_generate:
            generation = highest(generation, bench.peak)
    return Phases(child.base_memory, child.load_memory, prompt, generation)


def _spread(runs: Sequence[Run]) -> float | None:
    seconds = [run.seconds for run in runs]
    return statistics.stdev(seconds) / statistics.fmean(seconds) if len(seconds) > 1 else None


def _per(value: float | None, count: int) -> float | None:
    return None if value is None else value / count
