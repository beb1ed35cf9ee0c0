"""`fedspine fleet up`: a server and real agents as processes on the loopback, for tests and for show.

Comes in: the TOML file that `fedspine simulate` takes. Goes out: a directory with the server's and each device's state,
each with its own examples, at the pace of its board: everything is real but the slowness. `fleet down` ends them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from fedspine_edge.agent.enrolment import enrol
from fedspine_edge.agent.identity import split_token
from fedspine_edge.agent.link import UnreachableError, fetch_ca
from fedspine_edge.agent.settings import AgentSettings
from fedspine_edge.atomic import write_bytes
from fedspine_edge.commands import serve
from fedspine_edge.commands.boards import Fleet
from fedspine_edge.commands.experiment import shares_of
from fedspine_edge.commands.operate import OPERATOR_FILE, Operator
from fedspine_edge.config import Experiment, load_table, settings_from
from fedspine_edge.data import Example, load_examples, split
from fedspine_edge.errors import LinkError, UsageError
from fedspine_server.device_models import BOARDS, make_specs
from fedspine_server.settings import RunSettings

FLEET_FILE = "fleet.json"
START_SECONDS, STOP_SECONDS = 30.0, 20.0


def up(config: str, directory: Path, *, num_devices: int | None, port: int, emulate: bool) -> dict[str, Any]:
    """Starts a server and its devices and returns where they are.

    Args:
        config: A preset or a TOML file: model, data, `[fleet]`.
        directory: Where everything is kept; must not hold a fleet yet.
        num_devices: Devices, in the file's mix of boards; the file's number when None.
        port: Of the server.
        emulate: Whether devices work at the pace of their boards, relative to the fastest.

    Raises:
        UsageError: There is a fleet in the directory.
        LinkError: The server does not start.
    """
    if (directory / FLEET_FILE).exists():
        raise UsageError(f"expected a new directory, found the fleet {directory}", hint="fedspine fleet down")
    experiment = settings_from(Experiment, load_table(config), where=config)
    fleet = settings_from(Fleet, experiment.fleet, where="[fleet]")
    fleet = fleet if num_devices is None else fleet.scaled(num_devices)
    parts = split(
        load_examples(experiment.data),
        held_out=experiment.held_out,
        validation=experiment.validation,
        seed=experiment.seed,
    )
    shards = [[parts.train[i] for i in share] for share in shares_of(experiment, parts, len(fleet.boards))]
    rounds = settings_from(RunSettings, experiment.run, where="[run]").rounds
    counts = [len(shard) for shard in shards]
    specs = make_specs(counts, boards=fleet.boards, seed=experiment.seed, rounds=rounds)
    url, server_directory = f"https://127.0.0.1:{port}", directory / "server"
    settings = serve.ServerSettings(url, "127.0.0.1", port)
    told = serve.init(server_directory, settings, ["127.0.0.1", "localhost"], claim_hours=1)
    processes = [_started(directory, "server", ["-m", "fedspine_edge.commands.serve", str(server_directory)])]
    _remember(directory, processes)
    _await_server(url, told["token"], processes[0])
    operator = Operator(server_directory / OPERATOR_FILE)
    for spec, shard in zip(specs, shards, strict=True):
        state = directory / "devices" / spec.device_id
        pace = BOARDS[spec.board].step_time / min(board.step_time for board in BOARDS.values())
        agent = AgentSettings(
            model=str(experiment.model),
            data=str(_write_shard(state, shard)),
            memory_bytes=spec.memory_bytes,
            threads=1,
            slow_down=pace if emulate else 1.0,
        )
        enrol(url, told["token"], state, agent, name=spec.device_id)
        operator.post(f"devices/{spec.device_id}/accept")
        processes.append(_started(directory, spec.device_id, ["-m", "fedspine_edge.agent", str(state)]))
        _remember(directory, processes)
    operator.close()
    boards = {spec.device_id: spec.board for spec in specs}
    page = {name: told[name] for name in ("page_password", "metrics_token_file")}
    return {"url": url, "operator_file": told["operator_file"], "token": told["token"], "devices": boards, **page}


def _write_shard(state: Path, shard: Sequence[Example]) -> Path:
    state.mkdir(parents=True, mode=0o700)
    lines = [json.dumps({"text": example.text, "label": example.label}) + "\n" for example in shard]
    write_bytes(state / "examples.jsonl", "".join(lines).encode())
    return (state / "examples.jsonl").resolve()


def _started(directory: Path, name: str, arguments: list[str]) -> psutil.Process:
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    with (directory / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    return psutil.Process(process.pid)


def _remember(directory: Path, processes: Sequence[psutil.Process]) -> None:
    """A process is known by its id and the moment it began: ids are used again."""
    known = [{"pid": process.pid, "began": process.create_time()} for process in processes]
    write_bytes(directory / FLEET_FILE, json.dumps(known).encode())


def _await_server(url: str, token: str, process: psutil.Process) -> None:
    limit = time.monotonic() + START_SECONDS
    while True:
        try:
            fetch_ca(url, split_token(token)[1])
            return
        except UnreachableError as error:
            if time.monotonic() > limit or process.status() == psutil.STATUS_ZOMBIE:
                raise LinkError(f"the server did not start: {error}", hint="see server.log in its directory") from error
        time.sleep(0.05)


def down(directory: Path) -> int:
    """Ends a fleet's processes and returns how many were alive; what they kept stays.

    Raises:
        UsageError: There is no fleet in the directory.
    """
    try:
        known: list[Mapping[str, Any]] = json.loads((directory / FLEET_FILE).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"expected a fleet in {directory}, found: {error}", hint="fedspine fleet up") from error
    alive = [process for entry in known if (process := _same_process(entry)) is not None]
    for process in alive:
        process.terminate()
    _, stubborn = psutil.wait_procs(alive, timeout=STOP_SECONDS)
    for process in stubborn:
        process.kill()
    (directory / FLEET_FILE).unlink()
    return len(alive)


def _same_process(entry: Mapping[str, Any]) -> psutil.Process | None:
    try:
        process = psutil.Process(entry["pid"])
        return process if process.create_time() == entry["began"] else None
    except psutil.NoSuchProcess:
        return None
