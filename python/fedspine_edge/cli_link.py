"""The commands `serve`, `join`, `agent`, `devices`, `runs` and `fleet`: they parse, call one function, print."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from fedspine_edge.errors import UsageError

commands = typer.Typer()
devices = typer.Typer(help="The devices of a fleet, and who may join.", no_args_is_help=True)
runs = typer.Typer(help="Runs on real devices.", no_args_is_help=True)
fleet = typer.Typer(help="A fleet of real agents on this machine.", no_args_is_help=True)
commands.add_typer(devices, name="devices")
commands.add_typer(runs, name="runs")
commands.add_typer(fleet, name="fleet")

ServerDirectory = Annotated[Path, typer.Option("--dir", help="Directory of the server.")]
OperatorFile = Annotated[
    Path | None, typer.Option("--operator", help="operator.json; FEDSPINE_OPERATOR or fedspine-server/ when not given.")
]
State = Annotated[Path, typer.Option(help="Directory of this device.", envvar="FEDSPINE_STATE")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]

DEFAULT_STATE = Path("fedspine-device")
DEFAULT_SERVER = Path("fedspine-server")
DEFAULT_FLEET = Path("fedspine-fleet")


def _print(document: Any, text: str, *, json: bool) -> None:
    typer.echo(json_module.dumps(document, indent=2) if json else text)


@commands.command()
def serve(
    *,
    directory: ServerDirectory = DEFAULT_SERVER,
    init: Annotated[
        bool, typer.Option("--init", help="Make CA, certificate, database and tokens; do not serve.")
    ] = False,
    host: Annotated[list[str] | None, typer.Option(help="Names and addresses devices use; the first is told.")] = None,
    listen: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8443,
    database: Annotated[str | None, typer.Option(help="postgresql+psycopg://...; SQLite when not given.")] = None,
    new_password: Annotated[
        bool, typer.Option("--new-password", help="Make a new password of the page; do not serve.")
    ] = False,
    token_hours: Annotated[float, typer.Option(help="How long the claim token holds.", min=0.01)] = 24.0,
    json: Json = False,
) -> None:
    """Serve a fleet over HTTPS; with --init, prepare for that once."""
    import logging
    import socket

    from fedspine_edge.commands import serve as command

    if new_password:
        made = command.renew_password(directory)
        _print({"page_password": made}, made, json=json)
        return
    if not init:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
        command.serve(directory)
        return
    names = list(dict.fromkeys([*(host or [socket.gethostname()]), "localhost", "127.0.0.1"]))
    settings = command.ServerSettings(f"https://{names[0]}:{port}", listen, port, database)
    told = command.init(directory, settings, names, claim_hours=token_hours)
    _print(
        told,
        f"url          {told['url']}\n"
        f"fingerprint  {told['fingerprint']}\n"
        f"token        {told['token']}\n"
        f"             holds {token_hours:g} hours; a new one: fedspine devices token\n"
        f"operator     {told['operator_file']} (keep it secret)\n"
        f"page         {told['url']}  password {told['page_password']}; a new one: fedspine serve --new-password\n"
        f"metrics      {told['url']}/metrics  token in {told['metrics_token_file']}\n\n"
        f"serve        fedspine serve --dir {directory}\n"
        f"on a board   fedspine join {told['url']} --token TOKEN --model MODEL --data FILE\n"
        f"then here    fedspine devices accept --all",
        json=json,
    )


@commands.command()
def join(
    url: Annotated[str, typer.Argument(help="https://HOST:PORT of the server.")],
    *,
    token: Annotated[
        str, typer.Option(help="As `serve --init` or `devices token` printed it.", envvar="FEDSPINE_TOKEN")
    ],
    model: Annotated[str, typer.Option(help="Base model: packaged name, directory or GGUF file.")],
    data: Annotated[str, typer.Option(help="This device's examples: .jsonl or .csv with text and label.")],
    name: Annotated[str | None, typer.Option(help="Name of this device; made of the host's when not given.")] = None,
    state: State = DEFAULT_STATE,
    threads: Annotated[int | None, typer.Option(help="Threads of the worker; all cores when not given.", min=1)] = None,
    memory: Annotated[
        int | None, typer.Option(help="Bytes tuning may take; the board's when not given.", min=1)
    ] = None,
    max_celsius: Annotated[float, typer.Option(help="Pause above this temperature.")] = 95.0,
    slow_down: Annotated[float, typer.Option(help="Emulate a board so many times slower.", min=1.0)] = 1.0,
    enroll_only: Annotated[bool, typer.Option("--enroll-only", help="Do not run the agent.")] = False,
    json: Json = False,
) -> None:
    """Make this board a device of a fleet, and run its agent."""
    from fedspine_edge.agent.enrolment import enrol
    from fedspine_edge.agent.settings import AgentSettings
    from fedspine_edge.commands.join import run_agent

    settings = AgentSettings(
        model, data, memory_bytes=memory, threads=threads, max_celsius=max_celsius, slow_down=slow_down
    )
    device_id = enrol(url, token, state, settings, name=name)
    told = {"device_id": device_id, "state": str(state)}
    _print(told, f"enrolled as {device_id}; accept it: fedspine devices accept {device_id}", json=json)
    if not enroll_only:
        run_agent(state)


@commands.command()
def agent(*, state: State = DEFAULT_STATE) -> None:
    """Run the agent of a board that has joined."""
    from fedspine_edge.commands.join import run_agent

    run_agent(state)


@devices.command("ls")
def devices_ls(*, operator: OperatorFile = None, json: Json = False) -> None:
    """List the devices."""
    from fedspine_edge.commands import operate

    found = operate.Operator(operator).get("devices")
    _print(found, operate.devices_text(found), json=json)


@devices.command("show")
def devices_show(device: str, *, operator: OperatorFile = None, json: Json = False) -> None:
    """Show what a device said of itself and what its sensors say."""
    from fedspine_edge.commands import operate

    found = operate.Operator(operator).get(f"devices/{device}")
    told = {**found["facts"], **{name: value for name, value in found["sample"].items() if value is not None}}
    lines = [operate.devices_text([found]), "", *(f"{name:<24}{value}" for name, value in told.items())]
    _print(found, "\n".join(lines), json=json)


@devices.command("accept")
def devices_accept(
    device: Annotated[list[str] | None, typer.Argument(help="Names.")] = None,
    *,
    everyone: Annotated[bool, typer.Option("--all", help="Every pending device.")] = False,
    operator: OperatorFile = None,
    json: Json = False,
) -> None:
    """Accept pending devices."""
    from fedspine_edge.commands import operate

    if bool(device) == everyone:
        raise UsageError("expected names of devices or --all", hint="fedspine devices ls")
    found = operate.accept(operate.Operator(operator), device or [], everyone=everyone)
    _print(found, operate.devices_text(found), json=json)


@devices.command("revoke")
def devices_revoke(device: str, *, operator: OperatorFile = None, json: Json = False) -> None:
    """Shut a device out for ever."""
    from fedspine_edge.commands import operate

    found = operate.Operator(operator).post(f"devices/{device}/revoke")
    _print(found, operate.devices_text([found]), json=json)


@devices.command("token")
def devices_token(
    *,
    hours: Annotated[float, typer.Option(help="How long it holds.", min=0.01)] = 24.0,
    operator: OperatorFile = None,
    json: Json = False,
) -> None:
    """Make a token for devices to join with."""
    from fedspine_edge.agent.identity import fingerprint
    from fedspine_edge.commands.operate import Operator

    server = Operator(operator)
    made = server.post("claims", {"hours": hours})
    told = {"token": f"{made['claim']}.{fingerprint(server.ca)}", "url": server.url, "expires_at": made["expires_at"]}
    _print(told, told["token"], json=json)


@runs.command("start")
def runs_start(
    config: Annotated[str, typer.Argument(help="A preset or a .toml file, as for simulate.")],
    *,
    name: Annotated[str | None, typer.Option(help="Name of the run; the file's when not given.")] = None,
    timings: Annotated[
        Path | None, typer.Option(help="rounds.jsonl of a run: give its seconds to the coordinator, not measured ones.")
    ] = None,
    operator: OperatorFile = None,
    json: Json = False,
) -> None:
    """Begin a run; it goes on by itself as devices are there."""
    from fedspine_edge.commands import operate
    from fedspine_edge.commands.start_run import run_request

    server = operate.Operator(operator)
    found = server.post("runs", run_request(config, name=name, timings=timings))
    _print(found, operate.runs_text([found]), json=json)


@runs.command("ls")
def runs_ls(*, operator: OperatorFile = None, json: Json = False) -> None:
    """List the runs."""
    from fedspine_edge.commands import operate

    found = operate.Operator(operator).get("runs")
    _print(found, operate.runs_text(found), json=json)


@runs.command("show")
def runs_show(run: str, *, operator: OperatorFile = None, json: Json = False) -> None:
    """Show a run and what happened in it."""
    from fedspine_edge.commands import operate

    server = operate.Operator(operator)
    found, events = server.get(f"runs/{run}"), server.get(f"events?run_id={run}")
    _print({**found, "events": events}, operate.run_text(found, events), json=json)


@runs.command("fetch")
def runs_fetch(
    run: str,
    *,
    out: Annotated[Path | None, typer.Option(help="Where it goes; runs/NAME when not given.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The base model, where its name is another on this machine.")
    ] = None,
    operator: OperatorFile = None,
    json: Json = False,
) -> None:
    """Fetch a run's model, merged and pruned, as a directory that export takes."""
    from fedspine_edge.commands import operate
    from fedspine_edge.commands.fetch_run import fetch

    found = fetch(operate.Operator(operator), run, out=out, model=model)
    _print(found.record(), found.lines(), json=json)


@runs.command("stop")
def runs_stop(run: str, *, operator: OperatorFile = None, json: Json = False) -> None:
    """Stop a run; devices at work are told."""
    _change_run(run, "stop", operator, json=json)


@runs.command("resume")
def runs_resume(run: str, *, operator: OperatorFile = None, json: Json = False) -> None:
    """Go on with a stopped run where it stood."""
    _change_run(run, "resume", operator, json=json)


def _change_run(run: str, action: str, operator: Path | None, *, json: bool) -> None:
    from fedspine_edge.commands import operate

    found = operate.Operator(operator).post(f"runs/{run}/{action}")
    _print(found, operate.runs_text([found]), json=json)


@fleet.command("up")
def fleet_up(
    config: Annotated[str, typer.Argument(help="A preset or a .toml file with model, data and [fleet].")],
    *,
    devices: Annotated[int | None, typer.Option(help="Devices, in the file's mix of boards.", min=1)] = None,
    directory: Annotated[Path, typer.Option("--dir", help="Where everything is kept.")] = DEFAULT_FLEET,
    port: Annotated[int, typer.Option(help="Port of the server.", min=1, max=65535)] = 8443,
    emulate: Annotated[bool, typer.Option(help="Work at the pace of the boards.")] = True,
    json: Json = False,
) -> None:
    """Start a server and real agents on this machine."""
    from fedspine_edge.commands.fleet import up

    told = up(config, directory, num_devices=devices, port=port, emulate=emulate)
    lines = [f"{device_id}  {board}" for device_id, board in told["devices"].items()]
    hint = f"fedspine runs start {config} --operator {told['operator_file']}"
    page = f"page   {told['url']}  password {told['page_password']}"
    _print(told, "\n".join([f"serving at {told['url']}", *lines, "", page, f"begin  {hint}"]), json=json)


@fleet.command("down")
def fleet_down(
    *,
    directory: Annotated[Path, typer.Option("--dir", help="Directory of the fleet.")] = DEFAULT_FLEET,
    json: Json = False,
) -> None:
    """End a fleet's processes; what they kept stays."""
    from fedspine_edge.commands.fleet import down

    ended = down(directory)
    _print({"ended": ended}, f"{ended} processes ended", json=json)
