"""The commands `profile`, `compare` and `doctor` of the program: they parse, call one function, print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedspine_edge.errors import UsageError

commands = typer.Typer()

Files = Annotated[
    list[Path] | None, typer.Argument(help="GGUF file, ONNX file or model directory.", show_default=False)
]
Prompts = Annotated[str | None, typer.Option("-p", "--n-prompt", help="Prompt tokens, e.g. 64,512; else 512.")]
Generates = Annotated[str | None, typer.Option("-n", "--n-gen", help="Generated tokens; else 128.")]
Pairs = Annotated[list[str] | None, typer.Option("-pg", help="Prompt, then generation: 512,128.")]
Batches = Annotated[
    str | None,
    typer.Option("-b", "--batch-size", help="Prompt tokens a step, else 2048; --train: examples, else 8."),
]
Threads = Annotated[str | None, typer.Option("-t", "--threads", help="Threads; else one a core.")]
Repetitions = Annotated[int, typer.Option("-r", "--repetitions", help="Timed runs of each test.", min=1)]
Output = Annotated[str, typer.Option("-o", "--output", help="md, csv, json or jsonl.")]
Json = Annotated[bool, typer.Option("--json", help="The same as -o json.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress.")]


@commands.command()
def profile(
    files: Files = None,
    *,
    model: Annotated[list[Path] | None, typer.Option("-m", "--model", help="The same as FILES.")] = None,
    n_prompt: Prompts = None,
    n_gen: Generates = None,
    pg: Pairs = None,
    batch_size: Batches = None,
    threads: Threads = None,
    repetitions: Repetitions = 6,
    output: Output = "md",
    fail_if: Annotated[
        list[str] | None, typer.Option(help="End with exit code 3 if so, e.g. 'itl_p95_ms>120'.")
    ] = None,
    sweep_power_modes: Annotated[
        bool, typer.Option("--sweep-power-modes", help="Measure in each power mode of a Jetson.")
    ] = False,
    nvpmodel: Annotated[str, typer.Option(envvar="FEDSPINE_NVPMODEL", help="Program that sets them.")] = "nvpmodel",
    train: Annotated[bool, typer.Option("--train", help="Measure tuning steps of a model directory instead.")] = False,
    ratio: Annotated[str | None, typer.Option(help="With --train: pruning ratios; else 0,0.25,0.5.")] = None,
    rank: Annotated[str | None, typer.Option(help="With --train: LoRA ranks; else 4,16,32.")] = None,
    seq: Annotated[str | None, typer.Option(help="With --train: tokens of an example; else 32.")] = None,
    law: Annotated[Path | None, typer.Option(help="With --train: file for the step-time law.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure speed, latency, memory and energy of models, with llama-bench's options and table."""
    paths = [*(files or []), *(model or [])]
    output = "json" if json else output
    if train:
        if (n_prompt, n_gen, pg, sweep_power_modes) != (None, None, None, False) or len(paths) != 1:
            raise UsageError(
                "expected one model and no -p, -n, -pg or sweep with --train, found others",
                hint="fedspine profile smollm2-135m --train --ratio 0,0.25,0.5 --rank 4,16,32",
            )
        from fedspine_edge.commands import profile_train as steps

        wanted_steps = steps.WantedSteps(ratio, rank, batch_size, seq, threads, repetitions)
        gates = fail_if or []
        steps.profile_train(
            str(paths[0]), wanted_steps, law=law, output=output, fail_if=gates, quiet=quiet, show=typer.echo
        )
        return
    if (ratio, rank, seq, law) != (None, None, None, None):
        raise UsageError("expected --ratio, --rank, --seq and --law with --train only, found them without")
    from fedspine_edge.commands import profile as command

    wanted = command.Wanted(n_prompt, n_gen, tuple(pg or ()), batch_size, threads, repetitions)
    if sweep_power_modes:
        from fedspine_edge.commands.sweep import sweep

        if fail_if:
            raise UsageError("expected no --fail-if with a sweep, found one", hint="set one mode, then use the gates")
        sweep(paths, wanted, output=output, quiet=quiet, show=typer.echo, program=nvpmodel)
        return
    command.profile(
        paths,
        wanted,
        output=output,
        fail_if=fail_if or [],
        quiet=quiet,
        show=typer.echo,
    )


@commands.command()
def compare(
    files: Files = None,
    *,
    n_prompt: Prompts = None,
    n_gen: Generates = None,
    pg: Pairs = None,
    batch_size: Batches = None,
    threads: Threads = None,
    repetitions: Repetitions = 6,
    text: Annotated[Path | None, typer.Option(help="Text for the perplexity; else a built-in passage.")] = None,
    data: Annotated[str | None, typer.Option(help="Labelled examples for the accuracy: trec6, .jsonl or .csv.")] = None,
    prompt: Annotated[str | None, typer.Option(help="A decoder's template for them, {text} for the text.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="SVG to write: quality against latency; or an .html report.")
    ] = None,
    output: Annotated[str, typer.Option("-o", "--output", help="md or json.")] = "md",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare models with the first: measured in turn, ratios with 95 % intervals."""
    from fedspine_edge.commands import compare as command
    from fedspine_edge.commands.profile import Wanted

    command.compare(
        files or [],
        Wanted(n_prompt, n_gen, tuple(pg or ()), batch_size, threads, repetitions),
        text=text,
        data=command.Labelled(data, prompt.replace("\\n", "\n") if prompt else None) if data else None,
        plot=plot,
        output="json" if json else output,
        quiet=quiet,
        show=typer.echo,
    )


@commands.command()
def doctor(json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False) -> None:
    """Check this machine: board, clocks, sensors, kernels, runtimes; says how to repair what is wrong."""
    from fedspine_edge.commands import doctor as command

    findings = command.examine()
    plain = not (sys.stdout.encoding or "").lower().startswith("utf")
    typer.echo(command.as_json(findings) if json else command.as_text(findings, plain=plain))
    if not command.healthy(findings):
        raise typer.Exit(1)
