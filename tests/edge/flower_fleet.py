"""A fleet on Flower as real processes on the loopback: SuperLink, SuperNodes, and the agents beside them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from fedspine_edge.commands.boards import Fleet
from fedspine_edge.commands.experiment import shares_of
from fedspine_edge.config import Experiment, load_table, settings_from
from fedspine_edge.data import load_examples, split
from fedspine_server.device_models import make_specs

ROOT = Path(__file__).parent.parent.parent
PROGRAM = [sys.executable, "-c", "from fedspine_edge.cli import main; main()"]
START_SECONDS = 120.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def waited(ready: Callable[[], Any], what: str, seconds: float, logs: Path) -> Any:
    limit = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < limit, f"no {what}\n" + "".join(
            f"--- {log.name}\n{log.read_text(errors='replace')[-2500:]}" for log in sorted(logs.glob("*.log"))
        )
        time.sleep(0.1)
    return found


class FlowerFleet:
    """One SuperLink and a SuperNode with its agent for each device of an experiment; ended by process id."""

    def __init__(self, folder: Path, programs: Path, toml: Path, slow_down: dict[str, float] | None = None) -> None:
        self.folder, self.programs, self.toml = folder, programs, toml
        self.run_directory = folder / "run"
        self.port = free_port()
        self._processes: dict[str, psutil.Process] = {}
        self._started: list[subprocess.Popen[bytes]] = []
        self._slow_down = slow_down or {}
        self._environment = {
            **os.environ,
            "FLWR_HOME": str(folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT / 'python'}:{ROOT / 'server'}",
        }
        (folder / "home").mkdir(parents=True)
        (folder / "home" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )

    def start(self) -> None:
        self.start_superlink()
        for device_id, memory_bytes in self._write_devices().items():
            self._start_agent(device_id, memory_bytes)
            self.start_node(device_id)

    def start_superlink(self) -> None:
        self._start(
            "superlink", self.programs / "flower-superlink", "--insecure", "--disable-runtime-dependency-installation",
            "--host", "127.0.0.1", "--port", self.port, "--database", self.folder / "superlink.db",
        )  # fmt: skip
        waited(self._answers, "SuperLink", START_SECONDS, self.folder)

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def _write_devices(self) -> dict[str, int]:
        """Each device's own examples, as the simulator would deal them out; device -> memory."""
        experiment = settings_from(Experiment, load_table(str(self.toml)), where="toml")
        boards = settings_from(Fleet, experiment.fleet, where="[fleet]").boards
        parts = split(
            load_examples(experiment.data),
            held_out=experiment.held_out, validation=experiment.validation, seed=experiment.seed,
        )  # fmt: skip
        shares = shares_of(experiment, parts, len(boards))
        specs = make_specs([len(share) for share in shares], boards=boards, seed=experiment.seed, rounds=3)
        for spec, share in zip(specs, shares, strict=True):
            rows = ({"text": parts.train[i].text, "label": parts.train[i].label} for i in share)
            (self.folder / f"{spec.device_id}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.model = str(experiment.model)
        return {spec.device_id: spec.memory_bytes for spec in specs}

    def _start_agent(self, device_id: str, memory_bytes: int) -> None:
        path = self.folder / f"{device_id}.sock"
        self._start(
            f"agent-{device_id}", *PROGRAM, "flower", "device", self.folder / device_id, "--name", device_id,
            "--model", self.model, "--data", self.folder / f"{device_id}.jsonl", "--memory-bytes", memory_bytes,
            "--threads", 1, "--socket", path, "--slow-down", self._slow_down.get(device_id, 1.0),
        )  # fmt: skip
        waited(path.exists, f"agent of {device_id}", START_SECONDS, self.folder)

    def start_node(self, device_id: str) -> None:
        self._start(
            f"node-{device_id}", self.programs / "flower-supernode", "--insecure", "--superlink",
            f"127.0.0.1:{self.port}", "--host", "127.0.0.1", "--port", free_port(),
            "--node-config", f'agent="{self.folder / device_id}.sock"',
        )  # fmt: skip

    def restart_ended_nodes(self) -> None:
        """What a service manager does: a SuperNode ends when a SuperLink does not know it."""
        for name in [name for name in self._processes if name.startswith("node-")]:
            if not _alive(self._processes[name]):
                del self._processes[name]
                self.start_node(name.removeprefix("node-"))

    def begin(self, timings: Path | None = None) -> None:
        """Writes the run's request, unless it is there, and has Flower run the app."""
        request = self.folder / "request.json"
        if not request.exists():
            options = ("--timings", timings) if timings else ()
            self.call(*PROGRAM, "flower", "request", self.toml, "--out", request, *options)
        config = f'request="{request}" directory="{self.run_directory}"'
        self.call(self.programs / "flwr", "run", ROOT / "examples" / "flower", "here", "--run-config", config)

    def call(self, *command: Any) -> None:
        done = subprocess.run(
            [*map(str, command)], env=self._environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def rounds(self) -> list[dict[str, Any]]:
        file = self.run_directory / "rounds.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def await_rounds(self, count: int, seconds: float = 300.0) -> list[dict[str, Any]]:
        waited(lambda: len(self.rounds()) >= count, f"{count} rounds", seconds, self.folder)
        return self.rounds()

    def summary(self, seconds: float = 300.0, tick: Callable[[], None] = lambda: None) -> dict[str, Any]:
        file = self.run_directory / "summary.json"

        def over() -> bool:
            tick()
            return file.exists()

        waited(over, "end of the run", seconds, self.folder)
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def _start(self, name: str, *command: Any) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*map(str, command)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment
            )
        self._started.append(process)
        self._processes[name] = psutil.Process(process.pid)

    def kill(self, name: str) -> None:
        """Kills a process and all it ever started."""
        root = self._processes.pop(name)
        family = [root, *root.children(recursive=True)] if _alive(root) else []
        for process in family:
            _end(process, signal.SIGKILL)
        psutil.wait_procs(family, timeout=START_SECONDS)

    def stop(self) -> None:
        for name in list(self._processes):
            root = self._processes[name]
            if name.startswith("agent-"):  # it ends its own worker
                _end(root, signal.SIGTERM)
                psutil.wait_procs([root], timeout=10)
            self.kill(name)
        for process in self._started:
            process.wait(START_SECONDS)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _end(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
