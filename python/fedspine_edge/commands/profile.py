"""`fedspine profile`: speed, latency, memory and energy of models, as llama-bench prints them and beyond.

Comes in: paths and llama-bench's options. Goes out: text for stdout; gates that are hit end as `VerificationError`.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedspine_edge.errors import InterruptedRunError, UsageError, VerificationError
from fedspine_edge.hardware import this_machine, usable_cores
from fedspine_edge.profiling import bench_table, figures, gates
from fedspine_edge.profiling.bench import Options, Row, Trial, measure
from fedspine_edge.profiling.board import this_board
from fedspine_edge.profiling.child import open_child
from fedspine_edge.profiling.power import Meter, find_meter, why_no_meter
from fedspine_edge.profiling.runtimes import backend_of
from fedspine_edge.profiling.watch import BoardWatch
from fedspine_edge.progress import printable

FORMATS = ("md", "csv", "json", "jsonl")
DEFAULT_PROMPT, DEFAULT_GENERATE, DEFAULT_BATCH = (512,), (128,), (2048,)
DEFAULT_REPETITIONS = 6
"""The fewest runs whose median has a 95 % interval."""

MAX_TOKENS = 1 << 20


@dataclass(frozen=True)
class Wanted:
    """What the user asked for, as given; None stands for the default.

    Attributes:
        prompts: `-p`: prompt lengths, with commas.
        generates: `-n`: generated tokens, with commas.
        pairs: `-pg`: prompt and generation in one test, each `P,G`.
        batches: `-b`, with commas.
        threads: `-t`, with commas.
        repetitions: `-r`.
    """

    prompts: str | None = None
    generates: str | None = None
    pairs: tuple[str, ...] = ()
    batches: str | None = None
    threads: str | None = None
    repetitions: int = DEFAULT_REPETITIONS

    def options(self) -> list[Options]:
        """Returns how to measure, one for each number of threads and size of batch.

        Raises:
            UsageError: Something is not a list of numbers, or nothing is left to run.
        """
        tests = [
            *(Trial(count, 0) for count in numbers("-p", self.prompts, DEFAULT_PROMPT, lowest=0) if count),
            *(Trial(0, count) for count in numbers("-n", self.generates, DEFAULT_GENERATE, lowest=0) if count),
            *map(_pair, self.pairs),
        ]
        if not tests:
            raise UsageError(
                "expected something to run, found -p 0 and -n 0", hint="give -p 512, -n 128 or -pg 512,128"
            )
        threads = numbers("-t", self.threads, (usable_cores(),), lowest=1)
        batches = numbers("-b", self.batches, DEFAULT_BATCH, lowest=1)
        return [
            Options(tuple(dict.fromkeys(tests)), self.repetitions, num_threads, num_batch)
            for num_threads, num_batch in itertools.product(threads, batches)
        ]


def profile(
    paths: Sequence[Path],
    wanted: Wanted,
    *,
    output: str,
    fail_if: Sequence[str],
    quiet: bool,
    show: Callable[[str], None],
) -> None:
    """Measures models one after the other and shows the result.

    Args:
        paths: GGUF files, ONNX files, model directories.
        wanted: What to run.
        output: One of `FORMATS`.
        fail_if: Gates, e.g. `itl_p95_ms>120`.
        quiet: Whether progress is kept to itself.
        show: Called once with the text.

    Raises:
        UsageError: An option or a gate says something that cannot be.
        VerificationError: A gate was hit; what was measured is shown first.
        FedSpineError: A model is not there, is damaged, or its runtime does not run it.
    """
    if output not in FORMATS:
        raise UsageError(f"expected an output of {', '.join(FORMATS)}, found {output!r}")
    conditions = [gates.parse_gate(text, figures.GATE_FIGURES) for text in fail_if]
    every, meter = wanted.options(), find_meter()
    check_paths(paths)
    rows: list[Row] = []
    with progress(quiet) as tell:
        for path, options in itertools.product(paths, every):
            rows += measured([path], options, meter, tell)
    if not rows:
        raise UsageError("expected a test these models can do, found only generation by encoders", hint="give -p 128")
    show(rendered(rows, output, meter))
    hits = [line for gate in conditions for line in gates.failures(gate, _by_name(rows))]
    if hits:
        noisy = any(row.quiet.reasons() for row in rows)
        hint = "the machine was not quiet: repeat before you believe it" if noisy else "see the profile above"
        raise VerificationError(f"expected no gate to be hit, found {'; '.join(hits)}", hint=hint)


def measured(
    paths: Sequence[Path],
    options: Options,
    meter: Meter | None,
    tell: Callable[[str], None],
    *,
    root: Path = Path("/"),
) -> list[Row]:
    """Returns the rows of models that are loaded together and measured in turn."""
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(BoardWatch(meter, root=root))
        children = []
        for path in paths:
            tell(f"{path.name}: loading")
            sizes = {"num_context": options.num_context, "num_threads": options.num_threads}
            children.append(open_child(stack, path, num_batch=options.num_batch, **sizes))
        return measure(children, options, watch, tell=tell)


def rendered(rows: Sequence[Row], output: str, meter: Meter | None) -> str:
    """Returns rows in one of `FORMATS`."""
    if output == "md":
        return bench_table.as_markdown(rows, energy_note=energy_note(meter), conditions=conditions_line())
    board, machine = this_board(), this_machine()
    source = "none" if meter is None else meter.source
    records = [figures.record(row, board, machine, energy_source=source) for row in rows]
    writers: dict[str, Callable[[Sequence[dict[str, Any]]], str]] = {
        "csv": bench_table.as_csv,
        "json": bench_table.as_json,
        "jsonl": bench_table.as_jsonl,
    }
    return writers[output](records)


def check_paths(paths: Sequence[Path]) -> None:
    """Raises for a path that no runtime takes, before anything is measured."""
    if not paths:
        raise UsageError("expected a model to measure, found none", hint="fedspine profile model.gguf")
    for path in paths:
        backend_of(path)


def energy_note(meter: Meter | None) -> str:
    """Returns where the energy is from, or why there is none."""
    return why_no_meter() if meter is None else f"{meter.source}, whole board"


def conditions_line() -> str:
    """Returns the machine and its state in one line."""
    board, machine = this_board(), this_machine()
    parts = [board.model, machine.cpu, f"{machine.cores} cores", board.l4t and f"L4T {board.l4t}"]
    mode = f"power mode {board.power_mode or bench_table.MISSING}"
    return "measured on " + ", ".join(part for part in [*parts, mode] if part)


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Yields a function that shows what is going on, in one line of a terminal; nothing elsewhere or when quiet.

    Raises:
        InterruptedRunError: The user pressed Ctrl-C.
    """
    shown = not quiet and sys.stderr.isatty()

    def tell(text: str) -> None:
        if shown:
            sys.stderr.write(f"\r\x1b[K{printable(text)[:99]}")
            sys.stderr.flush()

    try:
        yield tell
    except KeyboardInterrupt:
        raise InterruptedRunError("interrupted; nothing is shown of an unfinished measurement") from None
    finally:
        tell("")


def _by_name(rows: Sequence[Row]) -> dict[str, dict[str, float | None]]:
    names = [f"{row.path.name} {row.test.name}, {row.options.num_threads} threads" for row in rows]
    return {name: figures.gate_figures(row) for name, row in zip(names, rows, strict=True)}


def _pair(text: str) -> Trial:
    counts = numbers("-pg", text, (), lowest=1)
    if len(counts) != 2:
        raise UsageError(f"expected two numbers for -pg, found {text!r}", hint="give -pg 512,128")
    return Trial(*counts)


def numbers(option: str, text: str | None, default: tuple[int, ...], *, lowest: int) -> tuple[int, ...]:
    """Returns the numbers of an option, with commas; raises UsageError for anything else."""
    if text is None:
        return default
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() and lowest <= int(word) <= MAX_TOKENS for word in words):
        raise UsageError(
            f"expected numbers from {lowest} to {MAX_TOKENS} for {option}, found {text!r}",
            hint=f"several with commas: {option} 64,512",
        )
    return tuple(int(word) for word in words)
