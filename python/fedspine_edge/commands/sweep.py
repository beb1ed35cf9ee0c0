"""`fedspine profile --sweep-power-modes`: the same profile in each power mode of a Jetson.

Comes in: models and llama-bench's options. Goes out: a table of speed and energy by mode, the most tokens a joule
marked. The mode that was set is put back whatever happens.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedspine_edge.commands.profile import Wanted, check_paths, conditions_line, energy_note, measured, progress
from fedspine_edge.errors import IncompatibleError, UsageError
from fedspine_edge.hardware import this_machine
from fedspine_edge.profiling import bench_table, figures
from fedspine_edge.profiling.bench import Row
from fedspine_edge.profiling.board import this_board
from fedspine_edge.profiling.intervals import speed_interval
from fedspine_edge.profiling.power import Meter, find_meter
from fedspine_edge.profiling.power_modes import PROGRAM, Mode, available_modes, choose_mode, mode_kept

FORMATS = ("md", "json")


@dataclass(frozen=True)
class ModeRow:
    """A row of a profile and the power mode it was measured in."""

    mode: Mode
    row: Row


def sweep(
    paths: Sequence[Path],
    wanted: Wanted,
    *,
    output: str,
    quiet: bool,
    show: Callable[[str], None],
    root: Path = Path("/"),
    program: str = PROGRAM,
) -> None:
    """Measures models in every power mode and shows the result.

    Args:
        paths: Models.
        wanted: What to run.
        output: `md` or `json`.
        quiet: Whether progress is kept to itself.
        show: Called once with the text.
        root: Root of sysfs and of nvpmodel's files.
        program: nvpmodel.

    Raises:
        UsageError: An option says something that cannot be.
        IncompatibleError: The board has no power modes, or none could be set.
        InterruptedRunError: A signal ended the sweep; the mode is back by then.
        FedSpineError: A model cannot be measured, or the mode could not be put back.
    """
    if output not in FORMATS:
        raise UsageError(f"expected an output of {', '.join(FORMATS)} for a sweep, found {output!r}")
    every, modes, meter = wanted.options(), available_modes(root), find_meter(root)
    check_paths(paths)
    found: list[ModeRow] = []
    left_out: list[Mode] = []
    with progress(quiet) as tell, mode_kept(program):
        for mode in modes:
            tell(f"choosing power mode {mode.name}")
            if not choose_mode(mode.number, program):
                left_out.append(mode)
                continue
            for path, options in itertools.product(paths, every):
                found += [ModeRow(mode, row) for row in measured([path], options, meter, tell, root=root)]
    if not found:
        raise IncompatibleError(
            "expected a power mode that can be set, found none", hint="run with sudo; some modes take a restart"
        )
    show(_as_json(found, left_out, meter, root) if output == "json" else _as_text(found, left_out, meter))


def best_rows(rows: Sequence[ModeRow]) -> list[ModeRow]:
    """Returns, of each model, test and setting, the row with the most tokens a joule; none without a meter."""
    groups: dict[tuple[Any, ...], list[ModeRow]] = {}
    for entry in rows:
        if entry.row.joules_per_token:
            key = (entry.row.path, entry.row.test, entry.row.options)
            groups.setdefault(key, []).append(entry)
    return [min(group, key=lambda entry: entry.row.joules_per_token or 0.0) for group in groups.values()]


def _as_text(rows: Sequence[ModeRow], left_out: Sequence[Mode], meter: Meter | None) -> str:
    best, lines = best_rows(rows), []
    for entry in rows:
        row, joules = entry.row, entry.row.joules_per_token
        speed = bench_table.estimate(speed_interval(row.tokens_per_second))
        lines.append(
            [
                entry.mode.name,
                row.path.name,
                row.test.name,
                speed + (bench_table.DOUBT if row.quiet.reasons() else ""),
                _number(row.energy.watts, 2),
                _number(joules, 4),
                _number(1 / joules if joules else None, 2) + (" best" if entry in best else ""),
            ]
        )
    header = ("power mode", "model", "test", "t/s [95 %]", "W", "J/token", "tokens/J")
    notes = [f"energy: {energy_note(meter)}"]
    notes += [f"left out: {mode.name} could not be set without a restart" for mode in left_out]
    notes += [
        f"(!) do not trust {entry.mode.name} {entry.row.test.name}: {reason}"
        for entry in rows
        for reason in entry.row.quiet.reasons()
    ]
    return "\n".join([bench_table.markdown_table(header, lines, left=(0, 1, 2)), "", *notes, conditions_line()])


def _as_json(rows: Sequence[ModeRow], left_out: Sequence[Mode], meter: Meter | None, root: Path) -> str:
    machine, board, best = this_machine(), this_board(root), best_rows(rows)
    source = "none" if meter is None else meter.source
    records = [
        {
            **figures.record(
                entry.row, dataclasses.replace(board, power_mode=entry.mode.name), machine, energy_source=source
            ),
            "best_tokens_per_joule": entry in best,
        }
        for entry in rows
    ]
    return json.dumps({"rows": records, "left_out": [mode.name for mode in left_out]}, indent=2)


def _number(value: float | None, digits: int) -> str:
    return bench_table.MISSING if value is None else f"{value:.{digits}f}"
