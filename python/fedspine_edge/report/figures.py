"""The figures that open the report, and the tables that set the pruned model against the unpruned one.

In: a checked run. Out: words and numbers ready to be shown; what was not measured is left out or shown as a dash.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedspine_edge.report import wording
from fedspine_edge.report.records import Export, RoundRecord, Run, Speed, Summary

FASTER = ("faster", "slower", True)
SMALLER = ("smaller", "larger", False)
QUICKER = ("faster", "slower", False)
SOONER = ("sooner", "later", False)
LESS = ("less", "more", False)


@dataclass(frozen=True)
class Headline:
    """One figure with its name and what it means in plain words."""

    value: str
    name: str
    meaning: str


@dataclass(frozen=True)
class Line:
    """One line of a table: unpruned against pruned, and the verdict in a word."""

    name: str
    note: str
    dense: str
    pruned: str
    verdict: str


@dataclass(frozen=True)
class Table:
    """One comparison; an empty `dense_name` means there is nothing to compare with."""

    title: str
    dense_name: str
    pruned_name: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class LayerBars:
    """What is left of one layer, or of several in a row that keep the same; shares in per cent."""

    layers: str
    heads: str
    heads_share: float
    ffn: str
    ffn_share: float


def headlines(run: Run) -> tuple[Headline, ...]:
    """Returns the figures a reader wants first: accuracy kept, smaller, faster, how long, what left the devices."""
    summary = run.summary
    found = (_accuracy(summary), _size(summary), _speed(summary), _duration(summary), _privacy(summary))
    return tuple(headline for headline in found if headline is not None)


def _accuracy(summary: Summary) -> Headline | None:
    value = _final_accuracy(summary)
    if value is None:
        return None
    subject = "exported file" if summary.exports and summary.accuracy is not None else "pruned model"
    margin = 100 * wording.half_width(value, summary.num_held_out)
    parts = [
        f"of {wording.plural(summary.num_held_out, 'held-out example')} right, by the {subject} (95 %: ±{margin:.1f})."
    ]
    if summary.accuracy_dense_tuned is not None:
        difference = wording.points(value - summary.accuracy_dense_tuned)
        parts.append(f"Tuned without pruning: {wording.percent(summary.accuracy_dense_tuned)} ({difference}).")
    if summary.accuracy_untuned is not None:
        parts.append(f"Before tuning: {wording.percent(summary.accuracy_untuned)}.")
    return Headline(wording.percent(value), "accuracy kept", " ".join(parts))


def _final_accuracy(summary: Summary) -> float | None:
    return summary.accuracy if summary.accuracy is not None else summary.accuracy_torch


def _size(summary: Summary) -> Headline:
    gone = 1 - summary.parameters_pruned / summary.parameters_dense
    before, after = wording.amount(summary.parameters_dense), wording.amount(summary.parameters_pruned)
    target = wording.percent(summary.target_sparsity, 0)
    meaning = (
        f"of all parameters gone: {before} → {after}. Of the weights that may be pruned, "
        f"{wording.percent(summary.sparsity)} are really gone (asked for: {target})."
    )
    return Headline(wording.percent(gone), "smaller", meaning)


def _speed(summary: Summary) -> Headline | None:
    speedup = summary.speedup
    if speedup is None or speedup.generation is None:
        return None
    prompt = "" if speedup.prompt is None else f" Reading a prompt: {wording.times(speedup.prompt)}."
    meaning = f"as many tokens a second as the unpruned file of the same type, measured on this machine.{prompt}"
    return Headline(wording.times(speedup.generation), "generation speed", meaning)


def _duration(summary: Summary) -> Headline:
    rounds, devices = wording.plural(summary.rounds, "round"), wording.plural(summary.num_devices, "device")
    meaning = f"virtual time for {rounds} on {devices}."
    if summary.virtual_seconds_dense is not None:
        verdict = wording.comparison(summary.virtual_seconds_dense, summary.virtual_seconds, QUICKER)
        meaning += f" Without pruning: {wording.seconds(summary.virtual_seconds_dense)} ({verdict})."
    meaning += f" Simulated here in {wording.seconds(summary.wall_seconds)}."
    return Headline(wording.seconds(summary.virtual_seconds), "to train", meaning)


def _privacy(summary: Summary) -> Headline:
    down, up = (wording.data_size(size) for size in (summary.transfer_bytes.down, summary.transfer_bytes.up))
    meaning = (
        f"All {wording.plural(summary.num_examples, 'training example')} stayed in their devices' shares. "
        f"What travelled is adapters, masks and scores: {down} to the devices, {up} back."
    )
    return Headline("0 examples", "left a device", meaning)


def model_table(run: Run) -> Table:
    """Returns the unpruned and the pruned training run side by side."""
    summary = run.summary
    dense, pruned = summary.accuracy_dense_tuned, summary.accuracy_torch
    difference = wording.MISSING if dense is None or pruned is None else wording.points(pruned - dense)
    waits = [waiting_share(rounds) for rounds in (run.dense_rounds, run.rounds)]
    lines = [
        _compare("Parameters", "", (summary.parameters_dense, summary.parameters_pruned), SMALLER, wording.amount),
        Line(
            "Accuracy",
            "in training precision, before export",
            wording.percent(dense),
            wording.percent(pruned),
            difference,
        ),
        _compare(
            "Virtual time",
            "all rounds",
            (summary.virtual_seconds_dense, summary.virtual_seconds),
            QUICKER,
            wording.seconds,
        ),
        Line(
            "Waiting",
            "share of device time",
            wording.percent(waits[0], 0),
            wording.percent(waits[1], 0),
            wording.MISSING,
        ),
    ]
    return Table("Training", "unpruned" if run.dense_rounds or dense is not None else "", "pruned", tuple(lines))


def waiting_share(rounds: Sequence[RoundRecord]) -> float | None:
    """Returns the share of the devices' time that went into waiting for others; None when no time was spent."""
    devices = [device for record in rounds for device in record.devices]
    waiting = math.fsum(device.waiting_seconds for device in devices)
    total = waiting + math.fsum(device.busy_seconds for device in devices)
    return waiting / total if total > 0 else None


def file_tables(summary: Summary) -> tuple[Table, ...]:
    """Returns one table for each type of exported file: unpruned against pruned; empty without exports."""
    exports = {export.path: export for export in summary.exports or ()}
    speeds = {speed.path: speed for speed in summary.speed or ()}
    pairs: dict[str, dict[bool, str]] = {}
    for export in exports.values():
        pairs.setdefault(f"{export.format} {export.quant}", {}).setdefault(export.dense, export.path)
    for speed in speeds.values():
        if speed.path not in exports:
            pairs.setdefault(speed.quant, {}).setdefault(speed.dense, speed.path)
    return tuple(
        _file_table(
            title,
            (exports.get(paths.get(True, "")), exports.get(paths.get(False, ""))),
            (speeds.get(paths.get(True, "")), speeds.get(paths.get(False, ""))),
        )
        for title, paths in pairs.items()
    )


def _file_table(
    title: str, exports: tuple[Export | None, Export | None], speeds: tuple[Speed | None, Speed | None]
) -> Table:
    names = [
        export.path if export else speed.path if speed else "" for export, speed in zip(exports, speeds, strict=True)
    ]
    sizes = tuple(
        export.size_bytes if export else speed.size_bytes if speed else None
        for export, speed in zip(exports, speeds, strict=True)
    )
    lines = [_compare("File size", "", (sizes[0], sizes[1]), SMALLER, wording.data_size)]
    if any(speeds):
        lines += _speed_lines(*speeds)
    lines += _parity_lines(*exports)
    measured = tuple(line for line in lines if (line.dense, line.pruned) != (wording.MISSING, wording.MISSING))
    return Table(title, names[0], names[1], measured)


def _speed_lines(dense: Speed | None, pruned: Speed | None) -> list[Line]:
    both = (dense, pruned)
    prompt, generation = (
        tuple(getattr(speed, key) if speed else None for speed in both)
        for key in ("prompt_tokens_per_second", "generation_tokens_per_second")
    )
    lines = []
    for name, pair in (("Prompt", prompt), ("Generation", generation)):
        texts = [
            wording.MISSING
            if spread is None
            else f"{wording.rate(spread.median)}\n({wording.rate(spread.min)}–{wording.rate(spread.max)})"
            for spread in pair
        ]
        medians = [None if spread is None else spread.median for spread in pair]
        verdict = wording.comparison(medians[0], medians[1], FASTER)
        lines.append(Line(name, "tokens a second, median (range)", texts[0], texts[1], verdict))
    waits = tuple(speed.ttft_seconds if speed else None for speed in both)
    memory = tuple(speed.peak_memory_bytes if speed else None for speed in both)
    lines.append(_compare("First token", "time to it", (waits[0], waits[1]), SOONER, wording.seconds))
    lines.append(_compare("Memory", "peak", (memory[0], memory[1]), LESS, wording.data_size))
    return lines


def _parity_lines(dense: Export | None, pruned: Export | None) -> list[Line]:
    both = (dense, pruned)
    accuracy = [export.accuracy if export else None for export in both]
    verdict = wording.MISSING
    if accuracy[0] is not None and accuracy[1] is not None:
        verdict = wording.points(accuracy[1] - accuracy[0])
    agree = [wording.percent(export.top1_agreement if export else None) for export in both]
    divergence = [wording.small(export.mean_kl if export else None) for export in both]
    logits = [wording.small(export.max_abs_dlogit if export else None) for export in both]
    return [
        Line("Accuracy", "of the file", wording.percent(accuracy[0]), wording.percent(accuracy[1]), verdict),
        Line("Same top token", "file against its model in memory", agree[0], agree[1], wording.MISSING),
        Line("Divergence", "mean KL, nats a token", divergence[0], divergence[1], wording.MISSING),
        Line("Logit difference", "largest", logits[0], logits[1], wording.MISSING),
    ]


def _compare(
    name: str,
    note: str,
    pair: tuple[float | None, float | None],
    words: tuple[str, str, bool],
    tell: Callable[[float], str],
) -> Line:
    dense, pruned = (wording.MISSING if value is None else tell(value) for value in pair)
    return Line(name, note, dense, pruned, wording.comparison(pair[0], pair[1], words))


def layer_bars(summary: Summary) -> tuple[LayerBars, ...]:
    """Returns what is left of each layer; neighbours that keep the same share one bar."""
    bars: list[LayerBars] = []
    kept = [(layer.heads_kept, layer.heads, layer.ffn_kept, layer.ffn) for layer in summary.layers]
    for (heads_kept, heads, ffn_kept, ffn), alike in itertools.groupby(range(len(kept)), key=lambda i: kept[i]):
        indices = [summary.layers[i].layer for i in alike]
        bars.append(
            LayerBars(
                layers=str(indices[0]) if len(indices) == 1 else f"{indices[0]}–{indices[-1]}",
                heads=f"{heads_kept} of {heads}",
                heads_share=round(100 * heads_kept / heads, 1),
                ffn=f"{ffn_kept} of {ffn}",
                ffn_share=round(100 * ffn_kept / ffn, 1),
            )
        )
    return tuple(bars)
