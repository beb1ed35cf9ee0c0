"""Profiles as people and programs read them: llama-bench's Markdown table, our tables below it, JSON, JSONL, CSV.

Comes in: rows of one or more models. Goes out: text, at most 100 columns wide for usual figures. What was not measured
reads `n/a`, in JSON null, never 0.

Source: llama.cpp's tools/llama-bench, columns and number formats of its Markdown.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from fedspine_edge.profiling.bench import Row
from fedspine_edge.profiling.figures import MEBIBYTE, percentiles
from fedspine_edge.profiling.intervals import Estimate, speed_interval
from fedspine_edge.profiling.memory import Memory
from fedspine_edge.profiling.runtimes import LLAMA_BENCH_NAMES
from fedspine_edge.progress import printable

MISSING = "n/a"
WIDTH = 100
DOUBT = " (!)"


def as_markdown(rows: Sequence[Row], *, energy_note: str, conditions: str) -> str:
    """Returns the tables of rows, model by model.

    Args:
        rows: Rows, those of a model side by side.
        energy_note: Where the energy is from, or why there is none.
        conditions: The machine, in one line.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.child.pid, row.path), []).append(row)
    blocks = [_block(group, energy_note) for group in groups.values()]
    return "\n\n".join([*blocks, conditions])


def as_csv(records: Sequence[dict[str, Any]]) -> str:
    """Returns records as CSV; nested figures become columns, sample lists are left out."""
    flat = [dict(_flat(document)) for document in records]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval=MISSING, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue().rstrip("\n")


def as_json(records: Sequence[dict[str, Any]]) -> str:
    """Returns records as one JSON array, as llama-bench prints them."""
    return json.dumps(list(records), indent=2)


def as_jsonl(records: Sequence[dict[str, Any]]) -> str:
    """Returns records as one JSON object a line."""
    return "\n".join(json.dumps(document) for document in records)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> str:
    """Returns a table whose columns stand at the right, save those whose index is in `left`."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i in left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def size(count: int | None) -> str:
    """Returns bytes as llama-bench prints them."""
    if count is None:
        return MISSING
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / MEBIBYTE:.2f} MiB"


def estimate(found: Estimate | None, *, factor: float = 1.0, digits: int = 2) -> str:
    """Returns a figure with its 95 % interval; a bound too few samples cannot give is `n/a`."""
    if found is None:
        return MISSING
    value, low, high = (None if part is None else f"{part * factor:.{digits}f}" for part in found)
    return f"{value}" if low is None and high is None else f"{value} [{low or MISSING}, {high or MISSING}]"


def wrapped(text: str) -> str:
    """Returns a sentence in lines that fit a terminal."""
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)


def _block(rows: Sequence[Row], energy_note: str) -> str:
    tables = [printable(rows[0].path.name), _llama_bench_table(rows), _latency_table(rows), _memory_table(rows[0])]
    notes = [_speeds(rows), _energy(rows, energy_note), _board(rows), *_warnings(rows)]
    return "\n\n".join([*tables, "\n".join(map(wrapped, notes))])


def _llama_bench_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        facts, rates = row.child.facts, row.tokens_per_second
        deviation = statistics.stdev(rates) if len(rates) > 1 else 0.0
        lines.append(
            [
                facts.model_type,
                size(facts.model_bytes),
                _count(facts.num_parameters),
                LLAMA_BENCH_NAMES.get(row.child.backend, row.child.backend),
                str(row.options.num_threads),
                row.test.name,
                f"{statistics.fmean(rates):.2f} ± {deviation:.2f}" + (DOUBT if row.quiet.reasons() else ""),
            ]
        )
    return markdown_table(("model", "size", "params", "backend", "threads", "test", "t/s"), lines, left=(0, 3))


def _latency_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        for name, samples in (("to the first token", row.ttft_seconds), ("between tokens", row.itl_seconds)):
            if samples:
                found = percentiles(samples).values()
                lines.append([row.test.name, name, *(estimate(part, factor=1e3) for part in found)])
    return markdown_table(("test", "time, ms", "p50 [95 % interval]", "p95", "p99"), lines, left=(0, 1))


def _speeds(rows: Sequence[Row]) -> str:
    told = [f"{row.test.name} {estimate(speed_interval(row.tokens_per_second))}" for row in rows]
    return f"mean t/s with its 95 % interval: {', '.join(told)}"


def _memory_table(row: Row) -> str:
    phases = row.memory
    named = {
        "before loading": phases.base,
        "loading": phases.load,
        "prompt": phases.prompt,
        "generation": phases.generation,
    }
    lines = [[name, *map(_mebibytes, _columns(memory))] for name, memory in named.items() if memory != Memory()]
    return markdown_table(("peak memory, MiB", "proportional (PSS)", "resident (RSS)", "anonymous"), lines)


def _columns(memory: Memory) -> tuple[int | None, ...]:
    return memory.pss_bytes, memory.rss_bytes, memory.anonymous_bytes


def _energy(rows: Sequence[Row], note: str) -> str:
    if all(row.energy.joules is None for row in rows):
        return f"energy: n/a, {note}"
    told = [
        f"{row.test.name} {_number(row.joules_per_token, 4)} J/token"
        f" ({_number(row.net_joules_per_token, 4)} above idle) at {_number(row.energy.watts, 2)} W"
        for row in rows
    ]
    idle = _number(rows[0].energy.idle_watts, 2)
    return f"energy from {note}, idle {idle} W: {', '.join(told)}"


def _board(rows: Sequence[Row]) -> str:
    celsius = [row.seen.celsius_max for row in rows if row.seen.celsius_max is not None]
    ratios = [row.seen.clock_ratio_min for row in rows if row.seen.clock_ratio_min is not None]
    held = [name for row in rows for name in row.seen.held_back or ()]
    unknown = all(row.seen.held_back is None for row in rows)
    throttled = MISSING if unknown else f"yes, by {', '.join(dict.fromkeys(held))}" if held else "no"
    hottest = f"{max(celsius):.1f} °C" if celsius else MISSING
    clock = f"{min(ratios):.0%} of its maximum" if ratios else MISSING
    return f"board: at most {hottest}, lowest CPU clock {clock}, throttled {throttled}"


def _warnings(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        for reason in row.quiet.reasons():
            yield f"(!) do not trust {row.test.name}: {reason}"


def _flat(document: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in document.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}_")
        elif isinstance(value, list):
            if all(isinstance(entry, str) for entry in value):
                yield prefix + name, "; ".join(value)
        else:
            yield prefix + name, MISSING if value is None else value


def _count(value: int | None) -> str:
    if value is None:
        return MISSING
    return f"{value / 1e9:.2f} B" if value >= 1e9 else f"{value / 1e6:.2f} M"


def _mebibytes(count: int | None) -> str:
    return MISSING if count is None else f"{count / MEBIBYTE:.1f}"


def _number(value: float | None, digits: int) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"
