"""`fedspine flower`: a run's request, the agent beside a device's SuperNode, Flower's programs told to be silent."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated

import typer

from fedspine_edge.agent.settings import AgentSettings

flower = typer.Typer(help="Rounds over a fleet that runs Flower.", no_args_is_help=True)
commands = typer.Typer()
commands.add_typer(flower, name="flower")
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@flower.command()
def request(
    config: Annotated[str, typer.Argument(help="quickstart, encoder, or a .toml file.")],
    *,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("request.json"),
    timings: Annotated[Path | None, typer.Option(help="rounds.jsonl of a run whose seconds are to be used.")] = None,
) -> None:
    """Write what the ServerApp must know of a run; where the base model is."""
    from fedspine_edge.commands import flower as command

    typer.echo(command.write_request(config, out, timings=timings))


@flower.command()
def device(
    state: Annotated[Path, typer.Argument(help="This device's directory.")],
    *,
    model: Annotated[str, typer.Option(help="Packaged model, model directory or GGUF file.")],
    data: Annotated[str, typer.Option(help="trec6, or a .jsonl or .csv with text and label.")],
    name: Annotated[
        str | None, typer.Option(help="What the server knows it by; the host's name when not given.")
    ] = None,
    memory_bytes: Annotated[int | None, typer.Option(help="Memory that tuning may take.", min=1)] = None,
    threads: Annotated[int | None, typer.Option(help="Threads; all cores when not given.", min=1)] = None,
    slow_down: Annotated[float, typer.Option(help="Times slower than it is, to emulate a slower board.", min=1)] = 1.0,
    socket_path: Annotated[Path | None, typer.Option("--socket", help="Unix socket; DIR/agent.sock.")] = None,
) -> None:
    """Keep the model loaded and tune for this device's ClientApp, until stopped."""
    from fedspine_edge.commands import flower as command

    settings = AgentSettings(model, data, memory_bytes=memory_bytes, threads=threads, slow_down=slow_down)
    command.serve_device(state, name or socket.gethostname(), settings, socket_path)


@flower.command(context_settings=PASSED_ON)
def superlink(context: typer.Context) -> None:
    """Become flower-superlink: its options, no telemetry, no look for updates, nothing installed at run time."""
    from fedspine_edge.commands import flower as command

    command.become("flower-superlink", ["--disable-runtime-dependency-installation", *context.args])


@flower.command(context_settings=PASSED_ON)
def supernode(
    context: typer.Context,
    state: Annotated[Path, typer.Argument(help="This device's directory, as for `device`.")],
    *,
    socket_path: Annotated[Path | None, typer.Option("--socket", help="Unix socket; DIR/agent.sock.")] = None,
) -> None:
    """Become flower-supernode for the agent of that directory: its options, no telemetry, no look for updates."""
    from fedspine_edge.commands import flower as command

    agent = (socket_path or command.socket_of(state)).absolute()
    command.become("flower-supernode", ["--node-config", f'agent="{agent}"', *context.args])


@flower.command(context_settings=PASSED_ON)
def run(
    context: typer.Context,
    app: Annotated[Path, typer.Argument(help="The app's directory: examples/flower.")],
    connection: Annotated[str, typer.Argument(help="SuperLink's name in Flower's own configuration.")],
    *,
    request_path: Annotated[Path, typer.Option("--request", help="From `request`; a path SuperLink's machine knows.")],
    directory: Annotated[Path, typer.Option(help="The run's directory on SuperLink's machine.")],
) -> None:
    """Become flwr run: its options, no telemetry, no look for updates. Again with the same directory it goes on."""
    from fedspine_edge.commands import flower as command

    settings = f'request="{request_path.absolute()}" directory="{directory.absolute()}"'
    command.become("flwr", ["run", str(app), connection, "--run-config", settings, *context.args])
