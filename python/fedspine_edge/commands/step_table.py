"""What was measured of tuning steps, beside the law they follow: for people and for programs.

Comes in: rows of arms. Goes out: the law fitted to every other arm of their grid and judged by the
rest; text and JSON.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedspine_edge.commands.profile import conditions_line, energy_note
from fedspine_edge.hardware import this_machine
from fedspine_edge.profiling import bench_table
from fedspine_edge.profiling.board import this_board
from fedspine_edge.profiling.figures import MEBIBYTE
from fedspine_edge.profiling.intervals import percentile_interval
from fedspine_edge.profiling.power import Meter
from fedspine_edge.profiling.train_steps import StepRow
from fedspine_server import step_law
from fedspine_server.step_law import StepLaw, StepTime

CLASSES = ("runtime", "weights", "adapter", "gradients", "moments", "activations")


@dataclass(frozen=True)
class FittedLaw:
    """A law and how good it is.

    Attributes:
        law: In seconds.
        held_out: Which rows were not fitted.
        fit_error: Median relative error at the fitted rows.
        held_out_error: At the others; None where every row was needed.
        worst_error: The largest of all rows.
    """

    law: StepLaw
    held_out: tuple[bool, ...]
    fit_error: float
    held_out_error: float | None
    worst_error: float


def fitted_law(rows: Sequence[StepRow]) -> FittedLaw | None:
    """Returns the law of some rows, fitted to every other arm of their grid; None where they are too few for one."""
    ratios, ranks = sorted({row.arm.pruning_ratio for row in rows}), sorted({row.arm.rank for row in rows})
    if len(ratios) < 2 or len(ranks) < 2:
        return None
    times = [StepTime(*row.arm, row.median_seconds) for row in rows]
    held_out = tuple((ratios.index(t.pruning_ratio) + ranks.index(t.rank)) % 2 == 1 for t in times)
    if len(ratios) < 3 or len(ranks) < 3:
        held_out = (False,) * len(times)
    fitted = [t for t, out in zip(times, held_out, strict=True) if not out]
    others = [t for t, out in zip(times, held_out, strict=True) if out]
    law = step_law.fit(fitted)
    return FittedLaw(
        law=law,
        held_out=held_out,
        fit_error=step_law.median_error(law, fitted) or 0.0,
        held_out_error=step_law.median_error(law, others),
        worst_error=max(law.errors(times)),
    )


def as_text(name: str, rows: Sequence[StepRow], fitted: FittedLaw | None, meter: Meter | None) -> str:
    """Returns what a person reads: the times beside the law's, the memory by class, and what the law is worth."""
    shape = rows[0].shape
    what = (
        f"{name}: steps of {shape.batch_size} x {shape.num_tokens} tokens, {shape.num_threads} threads,"
        f" {len(rows[0].seconds)} passes in turn; medians"
    )
    times = bench_table.markdown_table(
        ("ratio", "rank", "s/step [95 % interval]", "tokens/s", "J/step", "law, s"),
        [_time_cells(row, fitted, index) for index, row in enumerate(rows)],
        left=(),
    )
    memory = bench_table.markdown_table(
        ("ratio", "rank", "peak, MiB", *CLASSES),
        [
            [
                *_arm_cells(row),
                _mebibytes(row.memory.peak),
                *(_mebibytes(getattr(row.memory, kind)) for kind in CLASSES),
            ]
            for row in rows
        ],
        left=(),
    )
    unknown = f"{bench_table.MISSING}, " if all(row.energy.joules is None for row in rows) else ""
    notes = [*_law_lines(fitted), f"energy: {unknown}{energy_note(meter)}"]
    notes += [
        f"(!) do not trust ratio {row.arm.pruning_ratio:g}, rank {row.arm.rank}: {'; '.join(reasons)}"
        for row in rows
        if (reasons := row.quiet.reasons())
    ]
    return "\n\n".join([what, times, memory, "\n".join(map(bench_table.wrapped, [*notes, conditions_line()]))])


def _arm_cells(row: StepRow) -> list[str]:
    return [f"{row.arm.pruning_ratio:g}", str(row.arm.rank)]


def _time_cells(row: StepRow, fitted: FittedLaw | None, index: int) -> list[str]:
    joules = row.joules_per_step
    told = bench_table.MISSING
    if fitted is not None:
        seconds = fitted.law.work(*row.arm)
        told = (
            f"{seconds:.4f} ({seconds / row.median_seconds - 1:+.1%}{', held out' if fitted.held_out[index] else ''})"
        )
    return [
        *_arm_cells(row),
        bench_table.estimate(percentile_interval(row.seconds, 0.5), digits=4)
        + (bench_table.DOUBT if row.quiet.reasons() else ""),
        f"{row.tokens_per_second:.1f}",
        bench_table.MISSING if joules is None else f"{joules:.2f}",
        told,
    ]


def _law_lines(fitted: FittedLaw | None) -> list[str]:
    if fitted is None:
        return ["no law: it takes two ratios and two ranks, and three of each to check it"]
    parts, whole = fitted.law.relative(), fitted.law.work(0.0, step_law.REFERENCE_RANK)
    lines = [
        f"law: a step takes {parts.constant:.3f} + {parts.kept:.3f} (1 - p) + {parts.lora:.3f} r / 16 of the"
        f" {whole:.4f} s of an unpruned one at rank 16"
    ]
    held_out = "none was held out" if fitted.held_out_error is None else f"{fitted.held_out_error:.1%} where held out"
    lines.append(f"median error {fitted.fit_error:.1%} where fitted, {held_out}; largest {fitted.worst_error:.1%}")
    return lines


def as_document(name: str, rows: Sequence[StepRow], fitted: FittedLaw | None, meter: Meter | None) -> dict[str, Any]:
    """Returns what `--json` prints; its `law` is what the file of a law holds, None where the arms are too few."""
    shape = rows[0].shape
    facts = {
        "model": name,
        "batch_size": shape.batch_size,
        "num_tokens": shape.num_tokens,
        "num_threads": shape.num_threads,
        "machine": asdict(this_machine()),
        "board": asdict(this_board()),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "trusted": not any(row.quiet.reasons() for row in rows),
    }
    document: dict[str, Any] = {
        **facts,
        "energy_source": "none" if meter is None else meter.source,
        "rows": [_record(row) for row in rows],
        "law": None,
    }
    if fitted is not None:
        errors = {
            "fit_error": fitted.fit_error,
            "held_out_error": fitted.held_out_error,
            "worst_error": fitted.worst_error,
        }
        points = [
            {
                "pruning_ratio": row.arm.pruning_ratio,
                "rank": row.arm.rank,
                "seconds": row.median_seconds,
                "held_out": out,
            }
            for row, out in zip(rows, fitted.held_out, strict=True)
        ]
        document["law"] = step_law.document(fitted.law, {**facts, **errors, "points": points})
    return document


def _record(row: StepRow) -> dict[str, Any]:
    return {
        **row.arm._asdict(),
        "step_seconds": row.median_seconds,
        "samples_seconds": list(row.seconds),
        "train_ts": row.tokens_per_second,
        "energy_j_per_step": row.joules_per_step,
        "power_avg_w": row.energy.watts,
        "memory": {**asdict(row.memory), "peak": row.memory.peak},
        "trusted": not row.quiet.reasons(),
        "noise": list(row.quiet.reasons()),
    }


def _mebibytes(count: int) -> str:
    return f"{count / MEBIBYTE:.1f}"
