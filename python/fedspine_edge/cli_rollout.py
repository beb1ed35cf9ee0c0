"""The commands `rollout ...`: they parse, call one function, print."""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fedspine_edge.cli_link import Json, OperatorFile

commands = typer.Typer()
rollout = typer.Typer(
    help="A model to the devices: canaries first, kept where it meets its gate.", no_args_is_help=True
)
commands.add_typer(rollout, name="rollout")


def _print(document: Any, text: str, *, json: bool) -> None:
    typer.echo(json_module.dumps(document, indent=2) if json else text)


def _tell(words: str) -> None:
    if sys.stderr.isatty():
        typer.echo(f"\r{words}\x1b[K", err=True, nl=False)


@rollout.command("start")
def rollout_start(
    *,
    model: Annotated[str, typer.Option(help="A GGUF file, or name or hash of a model the server has.")],
    canary: Annotated[
        list[str] | None, typer.Option(help="How many devices go first, or which: a number, or names.")
    ] = None,
    gate: Annotated[
        str, typer.Option(help="What must hold on a device: 'ppl<=1.05*base and tokens_per_second>=8'.")
    ] = "",
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text whose perplexity is measured; else a built-in English passage.")
    ] = None,
    device: Annotated[list[str] | None, typer.Option(help="Only these devices; every one when not given.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of a rollout under way.")] = False,
    wait: Annotated[
        bool,
        typer.Option(
            "--wait", help="Stay until it is over, but for boards away ten minutes; exit 3 unless every device has it."
        ),
    ] = False,
    operator: OperatorFile = None,
    json: Json = False,
) -> None:
    """Begin a rollout: each device checks the model and keeps it, or stays with the one it has."""
    from fedspine_edge.commands import rollout as command
    from fedspine_edge.commands.operate import Operator

    server = Operator(operator)
    names = canary or ["1"]
    by_number = len(names) == 1 and names[0].isdecimal()
    first = {"num_canaries": int(names[0])} if by_number else {"canaries": names}
    passage = command.read_passage(text) if text is not None else ""
    request = {"gate": gate, "passage": passage, "devices": device or None, "replace": replace, **first}
    found = command.start(server, model, request, _tell)
    if wait:
        found = command.wait(server, found["rollout_id"], lambda seen: typer.echo(command.text(seen) + "\n", err=True))
    _print(found, command.text(found), json=json)


@rollout.command("status")
def rollout_status(
    number: Annotated[int | None, typer.Argument(help="Which one; the newest when not given.")] = None,
    *,
    operator: OperatorFile = None,
    json: Json = False,
) -> None:
    """Show a rollout: what each device is to run, what it runs, and why."""
    from fedspine_edge.commands import rollout as command
    from fedspine_edge.commands.operate import Operator

    server = Operator(operator)
    found = command.newest(server) if number is None else server.get(f"rollouts/{number}")
    _print(found, command.text(found), json=json)


@rollout.command("rollback")
def rollout_rollback(*, operator: OperatorFile = None, json: Json = False) -> None:
    """Take the newest rollout back: every device returns to the model it had before."""
    from fedspine_edge.commands import rollout as command
    from fedspine_edge.commands.operate import Operator

    server = Operator(operator)
    found = server.post(f"rollouts/{command.newest(server)['rollout_id']}/rollback")
    _print(found, command.text(found), json=json)


@rollout.command("upload")
def rollout_upload(
    file: Annotated[Path, typer.Argument(help="A GGUF file.")], *, operator: OperatorFile = None, json: Json = False
) -> None:
    """Send a model to the server, to be rolled out later, from the page for one."""
    from fedspine_edge.commands import rollout as command
    from fedspine_edge.commands.operate import Operator

    found = command.upload(Operator(operator), file, _tell)
    _print(found, command.models_text([found]), json=json)


@rollout.command("models")
def rollout_models(
    *,
    forget: Annotated[str | None, typer.Option(help="Name or hash of a model that is not needed any more.")] = None,
    operator: OperatorFile = None,
    json: Json = False,
) -> None:
    """List the models that the server can roll out."""
    from fedspine_edge.commands import rollout as command
    from fedspine_edge.commands.operate import Operator

    server = Operator(operator)
    if forget is not None:
        server.post(f"models/{command.model_of(server, forget, _tell)['sha256']}/forget")
    found = server.get("models")
    _print(found, command.models_text(found), json=json)
