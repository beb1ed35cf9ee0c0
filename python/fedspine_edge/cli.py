"""The program `fedspine`: parses, calls one function, prints.

Exit codes: 0 ok, 1 failure, 2 usage, 3 verification or gate failed, 4 not enough memory, 5 network or authentication,
6 incompatible model or adapter, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedspine_edge.cli_flower import commands as flower_commands
from fedspine_edge.cli_image import commands as image_commands
from fedspine_edge.cli_link import commands as link_commands
from fedspine_edge.cli_model import commands as model_commands
from fedspine_edge.cli_page import commands as page_commands
from fedspine_edge.cli_profile import commands as profile_commands
from fedspine_edge.cli_rollout import commands as rollout_commands
from fedspine_edge.errors import FedSpineError, InterruptedRunError, UsageError

app = typer.Typer(
    help="Federated fine-tuning that shrinks the model while it learns.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(model_commands)
app.add_typer(profile_commands)
app.add_typer(link_commands)
app.add_typer(rollout_commands)
app.add_typer(flower_commands)
app.add_typer(page_commands)
app.add_typer(image_commands)


@app.callback()
def program(debug: Annotated[bool, typer.Option(help="Show the whole traceback of an error.")] = False) -> None:
    """Federated fine-tuning that shrinks the model while it learns."""


@app.command()
def simulate(
    experiment: Annotated[str | None, typer.Argument(help="quickstart, encoder, or a .toml file.")] = None,
    *,
    model: Annotated[str | None, typer.Option(help="Packaged model, model directory or GGUF file.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="trec6, r8, sentiment, sentiment-domains, or a .jsonl or .csv with text and label."),
    ] = None,
    devices: Annotated[int | None, typer.Option(help="Devices, in the preset's mix of boards.", min=1)] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds.", min=1)] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.", min=0)] = None,
    method: Annotated[str | None, typer.Option(help="A published method's settings, such as hetlora or fedmp.")] = None,
    controller: Annotated[str | None, typer.Option(help="structured, sucb, hoo, grid-ucb or fixed.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Share of heads and FFN channels to go.")] = None,
    dense_reference: Annotated[
        bool | None, typer.Option(help="Also run it unpruned, to compare with (the preset decides).")
    ] = None,
    base_dtype: Annotated[
        str | None, typer.Option(help="How devices hold the frozen weights: float32, bfloat16 or int8.")
    ] = None,
    law: Annotated[Path | None, typer.Option(help="Step-time law, from fedspine profile --train.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; runs/NAME when not given.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this directory.")] = None,
    workers: Annotated[int | None, typer.Option(help="Devices trained at once; all cores when not given.")] = None,
    engine: Annotated[str | None, typer.Option(help="Who does the devices' rounds: processes or ray.")] = None,
    ray_address: Annotated[str | None, typer.Option(help="A Ray cluster; one is started here when not given.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress.")] = False,
    page: Annotated[
        bool, typer.Option("--page", help="Show the run on a page of this machine, until Ctrl-C once it is over.")
    ] = False,
    page_port: Annotated[int, typer.Option(help="Port of that page.", min=0, max=65535)] = 8080,
) -> None:
    """Run a federated fine-tuning of a simulated fleet: real training, virtual clock."""
    # Loading torch takes seconds; `fedspine --help` must not.
    from fedspine_edge.commands import experiment as run
    from fedspine_edge.commands import simulate as command

    table = (
        model,
        data,
        devices,
        rounds,
        seed,
        controller,
        sparsity,
        dense_reference,
        law,
        engine,
        ray_address,
        method,
        base_dtype,
    )
    overrides = run.Overrides(*table)
    run_dir = run.prepare(experiment, overrides, out=out, resume=resume)
    try:
        if page:
            from fedspine_edge.commands.page import simulate_with_page

            summary = simulate_with_page(run_dir, page_port, workers=workers, quiet=quiet or json)
        else:
            summary = command.simulate(run_dir, workers=workers, quiet=quiet or json)
    except KeyboardInterrupt:
        raise InterruptedRunError(
            "interrupted; the last finished round is saved", hint=f"go on with: fedspine simulate --resume {run_dir}"
        ) from None
    typer.echo(command.as_json(summary) if json else command.as_text(summary, run_dir))
    if page:
        from fedspine_edge.commands.page import stay

        stay()


@app.command()
def reproduce(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Every method once on one task, in fewer rounds.")] = False,
    full: Annotated[bool, typer.Option("--full", help="The whole grid; hours, and it goes on where it was.")] = False,
    summary: Annotated[
        bool, typer.Option("--summary", help="Run nothing; print from the results that are there.")
    ] = False,
    results: Annotated[Path | None, typer.Option(help="Folder of results.")] = None,
    laws: Annotated[Path, typer.Option(help="Folder of measured step-time laws.")] = Path("benchmarks/results"),
    work: Annotated[Path, typer.Option(help="Folder of runs under way.")] = Path("runs/reproduce"),
    page: Annotated[Path | None, typer.Option(help="Write the page of plots here.")] = None,
    only: Annotated[str | None, typer.Option(help="Only runs whose name holds this.")] = None,
    workers: Annotated[int, typer.Option(help="Devices trained at once.", min=1)] = 2,
    engine: Annotated[str, typer.Option(help="Who does the devices' rounds: processes or ray.")] = "processes",
    ray_address: Annotated[str | None, typer.Option(help="A Ray cluster; one is started here when not given.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Compare methods: real training of every method, task and seed of the grid, then the figures."""
    if quick + full + summary != 1 and not (summary and quick):
        raise UsageError("expected one of --quick, --full and --summary", hint="fedspine reproduce --summary")
    from fedspine_edge.commands import reproduce as command
    from fedspine_edge.commands.engines import Engine

    folder = results or (Path("runs/reproduce-quick") if quick else Path("benchmarks/results/reproduce"))
    wanted = command.Wanted(folder, laws, work, quick, only, Engine(engine, workers, ray_address))
    if not summary:
        try:
            command.run_grid(wanted, tell=lambda line: typer.echo(line, err=True))
        except KeyboardInterrupt:
            raise InterruptedRunError(
                "interrupted; what is finished is kept", hint="give the same command again"
            ) from None
    found = command.summary_of(wanted, page or (None if summary else folder.with_suffix(".html")))
    typer.echo(command.as_json(found) if json else command.as_text(found))


def main() -> None:
    """Runs the program and turns errors into one line, a hint and an exit code."""
    # numpy's threads would spin on the workers' cores, and a sum's order would depend on how many there are.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Spinning OpenMP threads make every barrier of a busy machine cost milliseconds.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # The live view shows progress; other libraries' bars would tear it.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except FedSpineError as error:
        if "--debug" in sys.argv:
            raise
        typer.echo(f"error: {error}", err=True)
        if error.hint:
            typer.echo(f"hint: {error.hint}", err=True)
        raise SystemExit(error.exit_code) from None
