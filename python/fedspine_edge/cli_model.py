"""The commands for one model on one machine: export, verify, prune, tune, eval. Parses, calls one function, prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from fedspine_edge.dtypes import BASE_DTYPES
from fedspine_edge.errors import UsageError, VerificationError

commands = typer.Typer()

Model = Annotated[str, typer.Argument(help="A run's directory, a model directory, or a packaged model.")]
Data = Annotated[str, typer.Option(help="trec6, or a .jsonl or .csv with text and label.")]
Text = Annotated[str, typer.Option(help="Real text for the check: trec6, or a .jsonl or .csv with text and label.")]
Prompt = Annotated[str | None, typer.Option(help="A decoder's template, {text} for the text.")]
Out = Annotated[Path | None, typer.Option(help="Where it goes.")]
BaseDtype = Annotated[str, typer.Option(help="How the frozen weights are held: float32, bfloat16 or int8.")]
LoraDropout = Annotated[
    float, typer.Option("--lora-dropout", help="Share of the low-rank values dropped in a step, 0 to below 1.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress.")]


class Form(str, Enum):
    """What `export` writes."""

    GGUF = "gguf"
    ONNX = "onnx"
    HF = "hf"
    ADAPTER = "adapter"


@commands.command()
def export(
    form: Annotated[Form, typer.Argument(help="gguf, onnx, hf (a transformers directory) or adapter.")],
    source: Model,
    *,
    quant: Annotated[
        str | None,
        typer.Option(
            help="Formats, comma-separated. gguf: F32 F16 BF16 Q8_0 Q6_K Q5_K_M Q4_K_M Q4_0; onnx: fp32 fp16"
            " int8; adapter: peft gguf."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for gguf and onnx, name for hf and adapter.")] = None,
    data: Text = "trec6",
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a model for another runtime; nothing gets its name before it was checked there."""
    from fedspine_edge.commands import export as command

    formats = [name.strip() for name in (quant or "").split(",") if name.strip()]
    announce = _announcer(quiet or as_json)
    if form is Form.ADAPTER:
        from fedspine_edge.commands.adapter import export_adapter

        if len(formats) > 1:
            raise UsageError(f"expected one kind of adapter, found {', '.join(formats)}")
        kind = formats[0] if formats else "peft"
        path = export_adapter(source, kind, out=out, data=data, force=force, announce=announce)
        typer.echo(json.dumps({"path": str(path), "kind": kind}) if as_json else f"{path}  base and adapter, checked")
        return
    if form is Form.GGUF:
        exported = command.export_gguf(source, formats or ["Q8_0"], out=out, data=data, force=force, announce=announce)
    elif form is Form.ONNX:
        exported = command.export_onnx(source, formats, out=out, data=data, force=force, announce=announce)
    else:
        exported = command.export_hf(source, out=out, data=data, force=force, announce=announce)
    if as_json:
        typer.echo(json.dumps([one.record() for one in exported], indent=2))
    else:
        typer.echo("\n".join(one.lines() for one in exported))


@commands.command()
def verify(
    reference: Annotated[str, typer.Argument(help="What is right: a run, a model directory, a .gguf or .onnx file.")],
    candidate: Annotated[str, typer.Argument(help="What is to be judged.")],
    *,
    data: Text = "trec6",
    positions: Annotated[int, typer.Option(help="Tokens (decoders) or texts (classifiers).", min=256)] = 320,
    as_json: Json = False,
) -> None:
    """Compare two forms of a model on real text; exit code 3 when they differ by more than the format may."""
    from fedspine_edge.commands import parity
    from fedspine_edge.commands.targets import find_target

    targets = [find_target(reference), find_target(candidate)]
    text = parity.text_for(targets, data, positions=positions)
    verdict = parity.judge(parity.logits_of(targets[0], text), targets[1], text)
    if as_json:
        document = {"format": verdict.format, **vars(verdict.parity), "bounds": vars(verdict.tolerance)}
        typer.echo(json.dumps({**document, "missed": verdict.missed}, indent=2))
    else:
        typer.echo(verdict.line())
    if verdict.missed:
        raise VerificationError(f"{candidate} is not {reference}: {verdict.missed}")


@commands.command()
def prune(
    model: Model,
    *,
    ratio: Annotated[float, typer.Option(help="Share of heads and FFN channels to go, 0 to 0.9.")] = 0.3,
    mode: Annotated[str, typer.Option(help="per-layer, or uniform for stock loaders.")] = "per-layer",
    data: Data = "trec6",
    prompt: Prompt = None,
    steps: Annotated[int, typer.Option(help="Steps to prune and recover in.")] = 60,
    batch_size: Annotated[int, typer.Option(help="Examples a step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="AdamW's step size.")] = 1e-3,
    rank: Annotated[int, typer.Option(help="LoRA rank.")] = 16,
    base_dtype: BaseDtype = "float32",
    lora_dropout: LoraDropout = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of everything random.", min=0)] = 0,
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune a model of your own on your own data, tuning as it shrinks."""
    if ratio <= 0:
        raise UsageError(f"expected a ratio above 0, found {ratio}", hint="to tune without pruning: fedspine tune")
    _learn(model, data, prompt, out, force, as_json, quiet, pruning_ratio=ratio, mask_mode=mode, num_steps=steps,
           batch_size=batch_size, learning_rate=learning_rate, rank=rank, base_dtype=base_dtype,
           lora_dropout=lora_dropout, seed=seed)  # fmt: skip


@commands.command()
def tune(
    model: Model,
    *,
    data: Data = "trec6",
    prompt: Prompt = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Examples a step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="AdamW's step size.")] = 1e-3,
    rank: Annotated[int, typer.Option(help="LoRA rank.")] = 16,
    base_dtype: BaseDtype = "float32",
    lora_dropout: LoraDropout = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of everything random.", min=0)] = 0,
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tune a model of your own, pruned or not, on your own data."""
    _learn(model, data, prompt, out, force, as_json, quiet, num_steps=steps, batch_size=batch_size,
           learning_rate=learning_rate, rank=rank, base_dtype=base_dtype, lora_dropout=lora_dropout,
           seed=seed)  # fmt: skip


def _learn(model: str, data: str, prompt: str | None, out: Path | None, force: bool, as_json: bool, quiet: bool,
           **settings: float | str) -> None:  # fmt: skip
    from fedspine_edge.commands.local import learn
    from fedspine_edge.solo import SoloSettings

    learned = learn(
        model,
        data,
        SoloSettings(**settings),  # type: ignore[arg-type]
        prompt=prompt.replace("\\n", "\n") if prompt else None,
        out=out,
        force=force,
        on_step=_step_printer(quiet or as_json),
    )
    typer.echo(json.dumps(learned.record(), indent=2) if as_json else learned.lines())


@commands.command()
def plan(
    model: Model,
    *,
    seq: Annotated[int, typer.Option(help="Tokens of the longest text.", min=1)] = 128,
    batch: Annotated[int, typer.Option(help="Texts a step.", min=1)] = 8,
    ratio: Annotated[float, typer.Option(help="Share of heads and FFN channels gone, 0 to 0.9.")] = 0.0,
    rank: Annotated[int, typer.Option(help="LoRA rank.", min=1)] = 16,
    base_dtype: BaseDtype = "float32",
    measure: Annotated[bool, typer.Option("--measure", help="Run real steps too and print both.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a training step will take of the memory, before anything is loaded."""
    from fedspine_edge.commands.plan import plan as foresee
    from fedspine_edge.memory_plan import StepShape

    if base_dtype not in BASE_DTYPES:
        raise UsageError(f"expected a base dtype of {', '.join(BASE_DTYPES)}, found {base_dtype!r}")
    found = foresee(model, StepShape(batch, seq, rank, base_dtype), pruning_ratio=ratio, measure=measure)
    typer.echo(json.dumps(found.record(), indent=2) if as_json else found.lines())


@commands.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A run, a model directory, a .gguf or .onnx file.")],
    *,
    data: Annotated[
        str | None, typer.Option(help="trec6, or a .jsonl or .csv; the rows its own run held out when not given.")
    ] = None,
    prompt: Prompt = None,
    as_json: Json = False,
) -> None:
    """Count what a model gets right, in the runtime that will serve it."""
    from fedspine_edge.commands.evaluate import evaluate as judge

    score = judge(model, data, prompt=prompt.replace("\\n", "\n") if prompt else None)
    typer.echo(json.dumps(score.record(), indent=2) if as_json else score.lines())


def _announcer(silent: bool) -> Callable[[str], None]:
    return (lambda text: None) if silent else (lambda text: print(text, file=sys.stderr, flush=True))  # noqa: T201


def _step_printer(silent: bool) -> Callable[[int, int], None]:
    """One line that rewrites itself on a terminal, a line every tenth of the way elsewhere."""

    def show(step: int, steps: int) -> None:
        if silent:
            return
        if sys.stderr.isatty():
            end = "\n" if step + 1 == steps else ""
            print(f"\rstep {step + 1} of {steps}", end=end, file=sys.stderr, flush=True)  # noqa: T201
        elif step % max(1, steps // 10) == 0:
            print(f"step {step + 1} of {steps}", file=sys.stderr, flush=True)  # noqa: T201

    return show
