"""`fedspine compare`: models side by side, measured in turn, with ratios and their 95 % intervals.

Comes in: two models or more, llama-bench's options and a text. Goes out: text for stdout and, if asked, a picture.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedspine_edge.atomic import write_bytes
from fedspine_edge.commands.evaluate import evaluate
from fedspine_edge.commands.profile import Wanted, check_paths, conditions_line, energy_note, progress
from fedspine_edge.errors import DataError, UsageError
from fedspine_edge.hardware import this_machine
from fedspine_edge.profiling import comparison, figures
from fedspine_edge.profiling.bench import Options, Row, measure
from fedspine_edge.profiling.bench_table import wrapped
from fedspine_edge.profiling.board import this_board
from fedspine_edge.profiling.child import Child, open_child
from fedspine_edge.profiling.comparison import LETTERS, Metric, Subject
from fedspine_edge.profiling.plot import Point, pareto_svg
from fedspine_edge.profiling.power import Meter, find_meter
from fedspine_edge.profiling.watch import BoardWatch
from fedspine_edge.report.comparison import comparison_page

PASSAGE = Path(__file__).resolve().parents[1] / "profiling" / "passage.txt"
FORMATS = ("md", "json")
MAX_TEXT_BYTES = 1 << 20


@dataclass(frozen=True)
class Labelled:
    """Examples to judge models by.

    Attributes:
        source: A packaged data set or the user's file.
        prompt: A decoder's template; the one it was tuned with when None.
    """

    source: str
    prompt: str | None = None


@dataclass(frozen=True)
class Compared:
    """A finished comparison.

    Attributes:
        subjects: The models, in the order given.
        metrics: What was measured.
        options: How.
    """

    subjects: list[Subject]
    metrics: list[Metric]
    options: Options


def compare(
    paths: Sequence[Path],
    wanted: Wanted,
    *,
    text: Path | None,
    data: Labelled | None,
    plot: Path | None,
    output: str,
    quiet: bool,
    show: Callable[[str], None],
) -> None:
    """Measures models in turn and shows how each stands to the first.

    Args:
        paths: Two models or more; all are held in memory at once.
        wanted: What to run; one number of threads and one size of batch.
        text: UTF-8 text whose perplexity is measured; a short passage of our own when None.
        data: Labelled examples whose accuracy is measured; none when None.
        plot: SVG file to write: wrong answers, or without examples the perplexity, against latency; or an HTML file:
            all figures, and that picture where it can be drawn.
        output: `md` or `json`.
        quiet: Whether progress is kept to itself.
        show: Called once with the text.

    Raises:
        UsageError: An option says something that cannot be, or there is nothing to plot.
        DataError: The text cannot be read.
        FedSpineError: A model is not there, is damaged, or its runtime does not run it.
    """
    options = _checked(paths, wanted, output)
    words, meter = _text(text or PASSAGE), find_meter()
    check_paths(paths)
    with progress(quiet) as tell:
        subjects = _measured(paths, options, words, meter, tell)
        if data is not None:
            subjects = [_judged(subject, data, tell) for subject in subjects]
    done = Compared(subjects, comparison.compare(subjects, options.tests), options)
    show(_as_json(done, meter) if output == "json" else _as_text(done, meter, own_text=text is not None))
    if plot is not None and plot.suffix == ".html":
        write_bytes(plot, _as_html(done, meter, own_text=text is not None).encode())
    elif plot is not None:
        write_bytes(plot, picture(done).encode())


def picture(done: Compared) -> str:
    """Returns the picture of a comparison.

    Raises:
        UsageError: No model has both a latency and a perplexity.
    """
    able = [t for t in done.options.tests if any(subject.row(t) is not None for subject in done.subjects)]
    trial = next((t for t in able if t.num_generate), able[0])
    judged = all(subject.right is not None for subject in done.subjects)
    points = [
        Point(subject.rows[0].path.name, 1e3 * latency, loss, comparison.model_memory_bytes(subject))
        for subject in done.subjects
        if (latency := _latency(subject.row(trial))) is not None
        and (loss := _wrong_percent(subject) if judged else comparison.perplexity(subject)) is not None
    ]
    if not points:
        raise UsageError(
            "expected an accuracy or a perplexity to plot, found models without one",
            hint="give labelled examples with --data, or compare decoders that have their tokenizer",
        )
    name = "time between tokens" if trial.num_generate else "time to the first token"
    loss_name = "wrong answers, %" if judged else "perplexity"
    return pareto_svg(points, latency_name=f"{name}, median, ms ({trial.name})", loss_name=loss_name)


def _wrong_percent(subject: Subject) -> float | None:
    share = comparison.accuracy(subject)
    return None if share is None else 100 * (1 - share)


def _judged(subject: Subject, data: Labelled, tell: Callable[[str], None]) -> Subject:
    """A model with what it gets right, counted in its own runtime."""
    path = subject.rows[0].path
    tell(f"{path.name}: accuracy")
    score = evaluate(str(path), data.source, prompt=data.prompt)
    return replace(subject, right=(round(score.accuracy * score.rows), score.rows))


def _checked(paths: Sequence[Path], wanted: Wanted, output: str) -> Options:
    if output not in FORMATS:
        raise UsageError(f"expected an output of {', '.join(FORMATS)}, found {output!r}")
    if not 2 <= len(paths) <= len(LETTERS):
        raise UsageError(
            f"expected 2 to {len(LETTERS)} models, found {len(paths)}", hint="fedspine compare dense.gguf pruned.gguf"
        )
    every = wanted.options()
    if len(every) > 1:
        raise UsageError("expected one number for -t and for -b, found several", hint="compare once for each")
    return every[0]


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_TEXT_BYTES).decode("utf-8", "ignore")
    except OSError as error:
        raise DataError(
            f"expected a text at {path}, found {error.strerror}", hint="give a UTF-8 file with --text"
        ) from error


def _measured(
    paths: Sequence[Path], options: Options, text: str, meter: Meter | None, tell: Callable[[str], None]
) -> list[Subject]:
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(BoardWatch(meter))
        children: list[Child] = []
        for path in paths:
            tell(f"{path.name}: loading")
            sizes = {"num_context": options.num_context, "num_threads": options.num_threads}
            children.append(open_child(stack, path, num_batch=options.num_batch, **sizes))
        rows = measure(children, options, watch, tell=tell)
        subjects = []
        for child in children:
            tell(f"{child.path.name}: perplexity")
            own = tuple(row for row in rows if row.child is child)
            if not own:
                raise UsageError(
                    f"expected a test {child.path.name} can do, found generation by an encoder", hint="give -p 128"
                )
            subjects.append(Subject(own, tuple(child.losses(text))))
        return subjects


def _as_text(done: Compared, meter: Meter | None, *, own_text: bool) -> str:
    lines = [comparison.as_markdown(done.metrics, _names(done)), ""]
    return "\n".join([*lines, *map(wrapped, _notes(done, meter, own_text=own_text)), conditions_line()])


def _as_html(done: Compared, meter: Meter | None, *, own_text: bool) -> str:
    drawn = ""
    with contextlib.suppress(UsageError):  # encoders without examples have nothing to plot
        drawn = picture(done)
    notes = [*_notes(done, meter, own_text=own_text), conditions_line()]
    return comparison_page(done.metrics, _names(done), notes, drawn[drawn.find("<svg") :] if drawn else "")


def _names(done: Compared) -> list[str]:
    return [f"{subject.rows[0].path.name} ({subject.rows[0].child.facts.model_type})" for subject in done.subjects]


def _notes(done: Compared, meter: Meter | None, *, own_text: bool) -> list[str]:
    options = done.options
    lines = [
        f"{options.repetitions} runs of each test in turn, -t {options.num_threads}; medians, and ratios of neighbours"
        " in time.",
        "memory: peak PSS of the process less the interpreter's own.",
        *_about_text(done, own_text=own_text),
    ]
    if all(energy.joules is None for row in _rows(done) for energy in row.run_energies):
        lines.append(f"energy: n/a, {energy_note(meter)}")
    return [*lines, *(f"(!) do not trust {reason}" for reason in _noise(done))]


def _about_text(done: Compared, *, own_text: bool) -> list[str]:
    counts = {len(subject.losses) for subject in done.subjects}
    if counts == {0}:
        return []
    what = "your text" if own_text else "a built-in English passage"
    line = f"perplexity: {what}, {max(counts)} tokens in windows of {done.options.num_context}."
    if len(counts) > 1:
        return [line, "(!) the models cut the text into different tokens: their perplexities do not compare"]
    return [line]


def _as_json(done: Compared, meter: Meter | None) -> str:
    board, machine = this_board(), this_machine()
    source = "none" if meter is None else meter.source
    document: dict[str, Any] = {
        "models": [str(subject.rows[0].path) for subject in done.subjects],
        "metrics": comparison.as_record(done.metrics),
        "text_tokens": [len(subject.losses) for subject in done.subjects],
        "trusted": not _noise(done),
        "noise": _noise(done),
        "rows": [figures.record(row, board, machine, energy_source=source) for row in _rows(done)],
        "board": asdict(board),
    }
    return json.dumps(document, indent=2)


def _noise(done: Compared) -> list[str]:
    return [
        f"{letter} {row.test.name}: {reason}"
        for letter, subject in zip(LETTERS, done.subjects, strict=False)
        for row in subject.rows
        for reason in row.quiet.reasons()
    ]


def _rows(done: Compared) -> list[Row]:
    return [row for subject in done.subjects for row in subject.rows]


def _latency(row: Row | None) -> float | None:
    if row is None:
        return None
    samples = row.itl_seconds or row.ttft_seconds
    found = figures.percentiles(samples)["p50"]
    return None if found is None else found.value
