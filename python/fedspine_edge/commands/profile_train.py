"""`fedspine profile --train`: what a tuning step takes at pruning ratios and ranks, and the law it follows.

Comes in: a model, ratios, ranks, batch and length. Goes out: text for stdout, and a law for `fedspine simulate --law`.
Every other arm of the grid is kept out of the fit, and says how far the law is off where nobody measured.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedspine_edge.atomic import write_bytes
from fedspine_edge.commands.profile import numbers, progress
from fedspine_edge.commands.step_table import FittedLaw, as_document, as_text, fitted_law
from fedspine_edge.commands.targets import model_target
from fedspine_edge.errors import UsageError, VerificationError
from fedspine_edge.hardware import usable_cores
from fedspine_edge.profiling import gates
from fedspine_edge.profiling.figures import MEBIBYTE
from fedspine_edge.profiling.power import find_meter
from fedspine_edge.profiling.train_steps import StepArm, StepRow, StepShape, measure_steps
from fedspine_edge.profiling.watch import BoardWatch

FORMATS = ("md", "json")
DEFAULT_RATIOS, DEFAULT_RANKS = (0.0, 0.25, 0.5), (4, 16, 32)
DEFAULT_BATCH, DEFAULT_TOKENS = 8, 32
MAX_RATIO = 0.9
MAX_LAW_ERROR = 0.1
"""Median error at held-out arms, beyond which a law is not worth a file."""

GATE_FIGURES = ("step_ms", "train_ts", "energy_j_per_step", "peak_mib")


@dataclass(frozen=True)
class WantedSteps:
    """What the user asked for, as given; None stands for the default.

    Attributes:
        ratios: Pruning ratios, with commas.
        ranks: LoRA ranks, with commas.
        batch_size: Examples a step.
        num_tokens: Tokens of each.
        threads: Threads.
        repetitions: Passes over all arms.
    """

    ratios: str | None = None
    ranks: str | None = None
    batch_size: str | None = None
    num_tokens: str | None = None
    threads: str | None = None
    repetitions: int = 6

    def grid(self) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """Returns the ratios and the ranks, ascending.

        Raises:
            UsageError: Something is not a list of such numbers.
        """
        ranks = numbers("--rank", self.ranks, DEFAULT_RANKS, lowest=1)
        return tuple(sorted(set(_ratios(self.ratios)))), tuple(sorted(set(ranks)))

    def shape(self) -> StepShape:
        """Returns what a step is.

        Raises:
            UsageError: Something is not one number.
        """
        found = (
            numbers("-b", self.batch_size, (DEFAULT_BATCH,), lowest=1),
            numbers("--seq", self.num_tokens, (DEFAULT_TOKENS,), lowest=1),
            numbers("-t", self.threads, (usable_cores(),), lowest=1),
        )
        if any(len(one) > 1 for one in found):
            raise UsageError(
                "expected one number each for -b, --seq and -t, found several", hint="profile once for each"
            )
        return StepShape(*(one[0] for one in found))


def profile_train(
    model: str,
    wanted: WantedSteps,
    *,
    law: Path | None,
    output: str,
    fail_if: Sequence[str],
    quiet: bool,
    show: Callable[[str], None],
) -> None:
    """Measures steps and shows the result.

    Args:
        model: A run, a model directory or a packaged model.
        wanted: What to measure.
        law: File the law goes to, None for none.
        output: `md` or `json`.
        fail_if: Gates, e.g. `step_ms>900`.
        quiet: Whether progress is kept to itself.
        show: Called once with the text.

    Raises:
        UsageError: An option says something that cannot be, or the arms are too few for a law that was asked for.
        VerificationError: A gate was hit, or the law is too far off to be kept; what was measured is shown first.
        FedSpineError: The model is not there, is damaged or not known.
    """
    if output not in FORMATS:
        raise UsageError(f"expected an output of {', '.join(FORMATS)} with --train, found {output!r}")
    conditions = [gates.parse_gate(text, GATE_FIGURES) for text in fail_if]
    ratios, ranks = wanted.grid()
    arms, shape = [StepArm(ratio, rank) for ratio in ratios for rank in ranks], wanted.shape()
    if law is not None and (len(ratios) < 2 or len(ranks) < 2):
        raise UsageError(
            "expected two ratios and two ranks or more to fit a law to, found fewer",
            hint="--ratio 0,0.25,0.5 --rank 4,16,32",
        )
    target, meter = model_target(model), find_meter()
    with progress(quiet) as tell, contextlib.ExitStack() as stack:
        watch = stack.enter_context(BoardWatch(meter))
        rows = measure_steps(target.path, arms, shape, passes=wanted.repetitions, watch=watch, tell=tell)
    fitted, name = fitted_law(rows), Path(model).name
    document = as_document(name, rows, fitted, meter)
    show(json.dumps(document, indent=2) if output == "json" else as_text(name, rows, fitted, meter))
    _judge(rows, fitted, conditions, law)
    if law is not None:
        write_bytes(law, (json.dumps(document["law"], indent=2) + "\n").encode())


def _judge(
    rows: Sequence[StepRow], fitted: FittedLaw | None, conditions: Sequence[gates.Gate], law: Path | None
) -> None:
    figures = {f"ratio {row.arm.pruning_ratio:g}, rank {row.arm.rank}": _figures(row) for row in rows}
    hits = [line for gate in conditions for line in gates.failures(gate, figures)]
    noisy = any(row.quiet.reasons() for row in rows)
    hint = "the machine was not quiet: repeat before you believe it" if noisy else "see the profile above"
    if hits:
        raise VerificationError(f"expected no gate to be hit, found {'; '.join(hits)}", hint=hint)
    error = None if fitted is None else fitted.held_out_error
    if law is not None and error is not None and error > MAX_LAW_ERROR:
        raise VerificationError(
            f"expected a law within {MAX_LAW_ERROR:.0%} of arms it was not fitted to, found {error:.0%} (median)",
            hint=f"nothing is written to {law}; {hint}",
        )


def _figures(row: StepRow) -> dict[str, float | None]:
    return {
        "step_ms": 1e3 * row.median_seconds,
        "train_ts": row.tokens_per_second,
        "energy_j_per_step": row.joules_per_step,
        "peak_mib": row.memory.peak / MEBIBYTE,
    }


def _ratios(text: str | None) -> tuple[float, ...]:
    if text is None:
        return DEFAULT_RATIOS
    try:
        found = tuple(float(word) for word in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 <= ratio <= MAX_RATIO for ratio in found):
        raise UsageError(
            f"expected ratios from 0 to {MAX_RATIO} for --ratio, found {text!r}", hint="several with commas: 0,0.25,0.5"
        )
    return found
