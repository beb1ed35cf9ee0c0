"""The commands `page`, `report` and `top`: they parse, call one function, print."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from fedspine_edge.cli_link import Json, OperatorFile

commands = typer.Typer()


@commands.command()
def page(
    run: Annotated[Path, typer.Argument(help="A run's directory: simulated, live or over, or fetched.")],
    *,
    port: Annotated[int, typer.Option(help="Port on this machine; 0 takes a free one.", min=0, max=65535)] = 8080,
) -> None:
    """Show a run on a read-only page of this machine, until Ctrl-C."""
    from fedspine_edge.commands.page import open_page, stay

    open_page(run, port)
    stay()


@commands.command()
def report(
    run: Annotated[Path, typer.Argument(help="Directory of a finished run.")],
    *,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print it as Markdown for a pull request.")] = False,
) -> None:
    """Write a run's report.html anew, or print it as Markdown."""
    from fedspine_edge.report import markdown_report, write_report

    typer.echo(markdown_report(run) if markdown else str(write_report(run)))


@commands.command()
def top(
    *,
    operator: OperatorFile = None,
    once: Annotated[bool, typer.Option("--once", help="Print once and end.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.2)] = 1.0,
    json: Json = False,
) -> None:
    """Show the fleet and its run at a glance, as the page does."""
    from fedspine_edge.commands import operate
    from fedspine_edge.commands.top import show

    server = operate.Operator(operator)
    if json:
        typer.echo(json_module.dumps(server.overview(), indent=2))
        return
    show(server.overview, once=once, every=every)
