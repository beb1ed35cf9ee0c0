"""Server CPU of a round of trivial devices: ours against Flower's, one after the other in one run.

    python benchmarks/bench_flower.py --flower VENV [--devices 80] [--rounds 20] [--flower-rounds 5] [--json FILE]

Flower is not a dependency: give a virtual environment that has it (`python -m venv VENV && VENV/bin/pip install
flwr==1.41.0`). Its devices are light too: threads that make the calls of `flower-supernode` with Flower's own client
code, poll every 3 s as it does, and send back the arrays they were sent, of the same size as ours. Its server is
`flower-superlink` with everything it starts, FedAvg, in plain HTTP where ours encrypts. Start-up is left out: CPU is
counted from the last answer of its first round to that of its last one; ours from before the devices say hello. Ours
report no progress, which a real agent does every 10 s: a trivial task is over before.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_link import ROUNDS_SECONDS, START_SECONDS, rounds_of

PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "bench"
version = "1.0.0"
description = "trivial rounds"
license = "Apache-2.0"
dependencies = ["flwr>=1.41"]
[tool.hatch.build.targets.wheel]
packages = ["."]
[tool.flwr.app]
publisher = "bench"
[tool.flwr.app.components]
serverapp = "bench.server_app:app"
clientapp = "bench.client_app:app"
[tool.flwr.app.config]
num-rounds = 1
num-nodes = 1
"""
SERVER_APP = """
import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()

@app.main()
def main(grid, context):
    nodes, rounds = int(context.run_config["num-nodes"]), int(context.run_config["num-rounds"])
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=nodes, min_evaluate_nodes=0, min_available_nodes=nodes)
    arrays = ArrayRecord([np.zeros((4, 64), np.float16), np.zeros((64, 4), np.float16)])
    strategy.start(grid=grid, initial_arrays=arrays, num_rounds=rounds)
"""
CLIENT_APP = """
from flwr.clientapp import ClientApp

app = ClientApp()
"""
DEVICES = """
import sys, threading, time
from flwr.app import Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects
from flwr.supernode.fleet_http_connection import http_request_response

def answer(message, tree, send, pull, push, confirm):
    run_id, message_id = message.metadata.run_id, message.metadata.message_id
    contents = pull_objects([one.object_id for one in iterate_object_tree(tree)], lambda name: pull(run_id, name))
    confirm(run_id, message_id)
    whole = inflate_object_from_contents(message_id, dict(contents))
    arrays = next(iter(whole.content.array_records.values()))
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 10})})
    reply = Message(content=content, reply_to=message)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    nested, tree = get_all_nested_objects(reply), get_object_tree(reply)
    wanted, session = send(reply, tree, 0.01)
    for one in iterate_object_tree(tree):
        if one.object_id in wanted:
            push(run_id, session, one.object_id, nested[one.object_id].deflate())

def device():
    with http_request_response(sys.argv[1], True) as (_, receive, send, _run, _fab, pull, push, confirm):
        while True:
            got = receive()
            time.sleep(3) if got is None else answer(*got, send, pull, push, confirm)

threads = [threading.Thread(target=device, daemon=True) for _ in range(int(sys.argv[2]))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
ANSWER = "[Fleet.PushMessages] Push replies"


class Tree:
    """The CPU seconds of a process and all it ever started; those that ended count with what was last seen of them."""

    def __init__(self, pid: int) -> None:
        import psutil

        self._root = psutil.Process(pid)
        self._seen: dict[tuple[int, float], float] = {}

    def cpu_seconds(self) -> float:
        """Returns them."""
        import psutil

        for process in (self._root, *self._root.children(recursive=True)):
            try:
                times = process.cpu_times()
                self._seen[process.pid, process.create_time()] = times.user + times.system
            except psutil.Error:
                continue
        return sum(self._seen.values())

    def end(self) -> None:
        """Ends them all."""
        import psutil

        processes = [*self._root.children(recursive=True), self._root]
        for process in processes:
            try:
                process.kill()
            except psutil.Error:
                continue
        psutil.wait_procs(processes, timeout=START_SECONDS)


def flower_rounds_of(venv: Path, folder: Path, count: int, rounds: int) -> dict[str, Any]:
    """`count` light Flower devices in trivial rounds."""
    programs = venv.resolve() / "bin"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    app = folder / "app" / "bench"
    app.mkdir(parents=True)
    (folder / "app" / "pyproject.toml").write_text(PROJECT)
    for name, text in (("__init__", ""), ("server_app", SERVER_APP), ("client_app", CLIENT_APP)):
        (app / f"{name}.py").write_text(text)
    (folder / "devices.py").write_text(DEVICES)
    (folder / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    environment = {
        **os.environ,
        "FLWR_HOME": str(folder),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    environment["PATH"] = f"{programs}:{environment['PATH']}"
    log = folder / "superlink.log"
    with log.open("ab") as file:
        arguments = ["--insecure", "--disable-runtime-dependency-installation", "--host", "127.0.0.1"]
        command = [str(programs / "flower-superlink"), *arguments, "--port", str(port)]
        superlink = Tree(subprocess.Popen(command, stdout=file, stderr=file, env=environment).pid)
    devices = None
    try:
        _await(log, "Application startup complete", 1, START_SECONDS)
        with (folder / "devices.log").open("ab") as file:
            command = [str(programs / "python"), str(folder / "devices.py"), f"127.0.0.1:{port}", str(count)]
            devices = Tree(subprocess.Popen(command, stdout=file, stderr=file, env=environment).pid)
        config = f"num-nodes={count} num-rounds={rounds}"
        command = [str(programs / "flwr"), "run", str(folder / "app"), "here", "--run-config", config]
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=START_SECONDS)
        _await(log, ANSWER, count, ROUNDS_SECONDS, superlink)
        before, begin = superlink.cpu_seconds(), time.monotonic()
        _await(log, ANSWER, count * rounds, ROUNDS_SECONDS, superlink)
        spent, seconds = superlink.cpu_seconds() - before, time.monotonic() - begin
    finally:
        for tree in filter(None, (devices, superlink)):
            tree.end()
    return {"cpu_seconds_per_round": spent / (rounds - 1), "wall_seconds_per_round": seconds / (rounds - 1)}


def _await(log: Path, text: str, times: int, seconds: float, tree: Tree | None = None) -> None:
    limit = time.monotonic() + seconds
    while (found := log.read_text(errors="replace").count(text)) < times:
        assert time.monotonic() < limit, f"expected {text!r} {times} times, found {found}: {log.read_text()[-2000:]}"
        time.sleep(0.1)
        if tree is not None:
            tree.cpu_seconds()


def compared(venv: Path, devices: int, rounds: int, flower_rounds: int) -> dict[str, Any]:
    """Ours, then Flower's, in one go."""
    with tempfile.TemporaryDirectory(prefix="bench-flower-") as name:
        (Path(name) / "ours").mkdir()
        ours = rounds_of(Path(name) / "ours", devices, rounds, reports=False)
        flower = flower_rounds_of(venv, Path(name) / "flower", devices, flower_rounds)
    return {
        "flower_cpu_ratio": flower["cpu_seconds_per_round"] / ours["cpu_seconds_per_round"],
        "num_devices": devices,
        "num_rounds": {"ours": rounds, "flower": flower_rounds},
        "ours": ours,
        "flower": flower,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flower", type=Path, required=True, help="virtual environment with flwr")
    parser.add_argument("--devices", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--flower-rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from fedspine_edge.hardware import this_machine

    found = compared(options.flower, options.devices, options.rounds, options.flower_rounds)
    report = {"machine": dataclasses.asdict(this_machine()), **found}
    text = json.dumps(report, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
