"""Models side by side: each figure of each, and its ratio to the first with a 95 % interval.

Comes in: rows of interleaved runs and the losses of one text. Goes out: `Metric`s, and text or JSON of them. Ratios
pair runs that were neighbours in time, and losses of the same token, so that what disturbs both cancels out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fedspine_edge.profiling.bench import Row, Trial
from fedspine_edge.profiling.bench_table import DOUBT, MISSING, markdown_table
from fedspine_edge.profiling.figures import MEBIBYTE, model_bytes_on_disk
from fedspine_edge.profiling.intervals import Estimate, mean_interval, percentile, ratio_interval
from fedspine_edge.progress import printable

_NORMAL_95 = 1.96
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SPEED, TIME, QUALITY, SIZE, ENERGY = (
    ("faster", "slower"),
    ("shorter", "longer"),
    ("better", "worse"),
    ("smaller", "larger"),
    ("less", "more"),
)


@dataclass(frozen=True)
class Subject:
    """One model of a comparison.

    Attributes:
        rows: Its rows.
        losses: Its loss of each token of the text, nats; empty where it has none.
        right: How many labelled examples it got right, and of how many; None without examples.
    """

    rows: tuple[Row, ...]
    losses: tuple[float, ...]
    right: tuple[int, int] | None = None

    def row(self, trial: Trial) -> Row | None:
        """Returns its row of a test; None for a test it does not do."""
        return next((row for row in self.rows if row.test == trial), None)


@dataclass(frozen=True)
class Metric:
    """One figure of every model.

    Attributes:
        name: What it is, with its unit.
        words: What a better and a worse ratio are called.
        higher_is_better: Whether more is better.
        values: Of each model; None where it was not measured.
        ratios: Each model's value over the first's; None where either is missing.
        digits: Decimals to print.
        trusted: Whether the machine was quiet while every model was measured.
    """

    name: str
    words: tuple[str, str]
    higher_is_better: bool
    values: tuple[float | None, ...]
    ratios: tuple[Estimate | None, ...]
    digits: int
    trusted: bool = True


def compare(subjects: Sequence[Subject], trials: Sequence[Trial]) -> list[Metric]:
    """Returns the metrics of at least one model, those that nobody has left out."""
    found = [metric for trial in trials for metric in _of_trial(subjects, trial)]
    found += [_accuracy(subjects), _perplexity(subjects)]
    found += [_plain(subjects, "file, MiB", _disk), _plain(subjects, "memory, MiB", _memory)]
    return [metric for metric in found if any(value is not None for value in metric.values)]


def perplexity(subject: Subject) -> float | None:
    """Returns the perplexity of the text; None where there are no losses."""
    return math.exp(statistics.fmean(subject.losses)) if subject.losses else None


def accuracy(subject: Subject) -> float | None:
    """Returns the share of the examples it got right, 0..1; None without examples."""
    return None if subject.right is None else subject.right[0] / subject.right[1]


def model_memory_bytes(subject: Subject) -> int | None:
    """Returns the peak of the proportional memory less the interpreter's own; None where it was not measured."""
    phases = subject.rows[0].memory
    if phases.peak.pss_bytes is None or phases.base.pss_bytes is None:
        return None
    return phases.peak.pss_bytes - phases.base.pss_bytes


def as_markdown(metrics: Sequence[Metric], names: Sequence[str]) -> str:
    """Returns, for each model but the first, a table of it beside the first."""
    legend = "\n".join(f"{letter}  {printable(name)}" for letter, name in zip(LETTERS, names, strict=False))
    tables = []
    for index in range(1, len(names)):
        first, letter = LETTERS[0], LETTERS[index]
        lines = [
            [
                metric.name + ("" if metric.trusted else DOUBT),
                value_text(metric, 0),
                value_text(metric, index),
                verdict(metric, index),
            ]
            for metric in metrics
        ]
        tables.append(markdown_table(("", first, letter, f"{letter} against {first}, 95 % interval"), lines))
    return "\n\n".join([legend, *tables])


def as_record(metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    """Returns metrics for JSON; ratios are each value over the first model's."""
    return [
        {
            "name": metric.name,
            "higher_is_better": metric.higher_is_better,
            "trusted": metric.trusted,
            "values": list(metric.values),
            "ratios": [None if ratio is None else ratio._asdict() for ratio in metric.ratios],
        }
        for metric in metrics
    ]


def verdict(metric: Metric, index: int) -> str:
    """Returns a model's ratio to the first in words, always above 1: `1.43x faster [1.40, 1.46]`."""
    ratio = metric.ratios[index]
    if ratio is None:
        return MISSING
    if ratio.low is not None and ratio.high is not None and ratio.low <= 1 <= ratio.high:
        inside = "" if ratio.low == ratio.high else f" [{ratio.low:.2f}, {ratio.high:.2f}]"
        return f"{ratio.value:.2f}x, no clear difference{inside}"
    grew = ratio.value >= 1
    word = metric.words[0 if grew == metric.higher_is_better else 1]
    bounds = [bound for bound in (ratio.low, ratio.high) if bound is not None]
    factors = sorted(bound if grew else 1 / bound for bound in bounds)
    interval = f" [{factors[0]:.2f}, {factors[1]:.2f}]" if len(factors) == 2 else ""
    return f"{ratio.value if grew else 1 / ratio.value:.2f}x {word}{interval}"


def _of_trial(subjects: Sequence[Subject], trial: Trial) -> list[Metric]:
    name = trial.name
    metrics = [_paired(subjects, trial, f"{name}, t/s", lambda row: row.tokens_per_second, SPEED)]
    if trial.num_prompt:
        metrics.append(_paired(subjects, trial, f"{name} first token, ms", _ttft, TIME))
    if trial.num_generate:
        for share in (0.5, 0.95):
            label = f"{name} between tokens p{100 * share:.0f}, ms"
            metrics.append(_paired(subjects, trial, label, _itl(share), TIME))
    metrics.append(_paired(subjects, trial, f"{name}, J/token", _energies, ENERGY))
    return metrics


def _paired(
    subjects: Sequence[Subject],
    trial: Trial,
    name: str,
    samples_of: Callable[[Row], Sequence[float]],
    words: tuple[str, str],
) -> Metric:
    """Returns the metric of samples, one a run: their medians, and ratios of neighbours in time."""
    rows = [subject.row(trial) for subject in subjects]
    samples = [() if row is None else tuple(samples_of(row)) for row in rows]
    first = samples[0]
    return Metric(
        name,
        words,
        words is SPEED,
        tuple(statistics.median(own) if own else None for own in samples),
        tuple(ratio_interval(own, first) if own and first and min(*own, *first) > 0 else None for own in samples),
        digits=4 if words is ENERGY else 2,
        trusted=not any(row.quiet.reasons() for row in rows if row is not None),
    )


def _plain(subjects: Sequence[Subject], name: str, value_of: Callable[[Subject], float | None]) -> Metric:
    """Returns the metric of one figure a model, whose ratio has no interval."""
    values = tuple(value_of(subject) for subject in subjects)
    first = values[0]
    ratios = tuple(Estimate(value / first, None, None) if value and first else None for value in values)
    return Metric(name, SIZE, False, values, ratios, digits=1)


def _accuracy(subjects: Sequence[Subject]) -> Metric:
    values = tuple(accuracy(subject) for subject in subjects)
    ratios = tuple(_share_ratio(subject.right, subjects[0].right) for subject in subjects)
    return Metric("accuracy", QUALITY, True, values, ratios, digits=3)


def _share_ratio(own: tuple[int, int] | None, first: tuple[int, int] | None) -> Estimate | None:
    """Returns the ratio of two shares, its interval as if the examples were not the same: never too narrow."""
    if own is None or first is None or min(own[0], first[0]) == 0:
        return None
    ratio = own[0] / own[1] / (first[0] / first[1])
    half = _NORMAL_95 * math.sqrt(sum(1 / right - 1 / total for right, total in (own, first)))
    return Estimate(ratio, ratio * math.exp(-half), ratio * math.exp(half))


def _perplexity(subjects: Sequence[Subject]) -> Metric:
    values = tuple(perplexity(subject) for subject in subjects)
    ratios = tuple(_perplexity_ratio(subject.losses, subjects[0].losses) for subject in subjects)
    return Metric("perplexity of the text", QUALITY, False, values, ratios, digits=2)


def _perplexity_ratio(losses: Sequence[float], first: Sequence[float]) -> Estimate | None:
    """Returns the ratio with an interval from the token-wise differences; None for texts cut into other tokens."""
    if not losses or len(losses) != len(first):
        return None
    value, low, high = mean_interval([own - other for own, other in zip(losses, first, strict=True)])
    return Estimate(math.exp(value), None if low is None else math.exp(low), None if high is None else math.exp(high))


def _ttft(row: Row) -> list[float]:
    return [1e3 * seconds for seconds in row.ttft_seconds]


def _itl(share: float) -> Callable[[Row], list[float]]:
    return lambda row: [1e3 * percentile(sorted(run.token_seconds), share) for run in row.runs]


def _energies(row: Row) -> list[float]:
    joules = [energy.joules for energy in row.run_energies]
    whole = [value / row.test.num_tokens for value in joules if value is not None]
    return whole if len(whole) == len(joules) else []


def _disk(subject: Subject) -> float:
    return model_bytes_on_disk(subject.rows[0].path) / MEBIBYTE


def _memory(subject: Subject) -> float | None:
    count = model_memory_bytes(subject)
    return None if count is None else count / MEBIBYTE


def value_text(metric: Metric, index: int) -> str:
    """Returns a model's figure as it is printed."""
    value = metric.values[index]
    return MISSING if value is None else f"{value:.{metric.digits}f}"
