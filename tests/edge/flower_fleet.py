"""A fleet on Flower as real processes on the loopback: SuperLink, SuperNodes, and the agents beside them."""

from __future__ import annotations

import contextlib
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
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedspine_edge.agent.journal import Journal
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
    """One SuperLink and a SuperNode with its agent for each device of an experiment; ended by process id.

    Flower's programs are started by `fedspine flower`, so they are as silent as those of a user.

    Args:
        folder: Where everything goes.
        programs: Where Flower's programs are.
        toml: The experiment.
        secure: Whether SuperLink has TLS and takes registered keys alone.
    """

    def __init__(self, folder: Path, programs: Path, toml: Path, *, secure: bool = False) -> None:
        self.folder, self.toml, self.secure = folder, toml, secure
        self._programs = programs
        self.run_directory = folder / "run"
        self.port = free_port()
        self._processes: dict[str, psutil.Process] = {}
        self._started: list[subprocess.Popen[bytes]] = []
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("FLWR_")},
            "FLWR_HOME": str(folder / "home"),
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT / 'python'}:{ROOT / 'server'}",
        }
        (folder / "home").mkdir(parents=True)
        (folder / "home" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\n'
            + (f'root-certificates = "{folder / "server" / "ca.pem"}"\n' if secure else "insecure = true\n")
        )
        if secure:
            self.call(*PROGRAM, "serve", "--init", "--dir", folder / "server", "--host", "127.0.0.1")

    def start(self) -> None:
        devices = self._write_devices()
        for device_id, memory_bytes in devices.items():
            self._start_agent(device_id, memory_bytes)
        self.start_superlink()
        for device_id in devices:
            if self.secure:
                self.make_key(device_id)
                self.call(
                    self._programs / "flwr", "supernode", "register", self.folder / f"{device_id}.key.pub", "here"
                )
            self.start_node(device_id)
        for device_id in devices:
            waited(self._socket(device_id).exists, f"agent of {device_id}", START_SECONDS, self.folder)

    def _socket(self, device_id: str) -> Path:
        return self.folder / f"{device_id}.sock"

    def start_superlink(self) -> None:
        made = self.folder / "server"
        keys = (
            "--ssl-ca-certfile", made / "ca.pem", "--ssl-certfile", made / "server.pem", "--ssl-keyfile",
            made / "server.key", "--enable-supernode-auth",
        )  # fmt: skip
        self._start(
            "superlink", *PROGRAM, "flower", "superlink", "--host", "127.0.0.1", "--port", self.port,
            "--database", self.folder / "superlink.db", *(keys if self.secure else ["--insecure"]),
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
        self._start(
            f"agent-{device_id}", *PROGRAM, "flower", "device", self.folder / device_id, "--name", device_id,
            "--model", self.model, "--data", self.folder / f"{device_id}.jsonl", "--memory-bytes", memory_bytes,
            "--threads", 1, "--socket", self._socket(device_id),
        )  # fmt: skip

    def start_node(self, device_id: str) -> None:
        keys = (
            "--root-certificates", self.folder / "server" / "ca.pem",
            "--auth-supernode-private-key", self.folder / f"{device_id}.key",
        )  # fmt: skip
        self._start(
            f"node-{device_id}", *PROGRAM, "flower", "supernode", self.folder / device_id,
            "--socket", self._socket(device_id), "--superlink", f"127.0.0.1:{self.port}",
            "--host", "127.0.0.1", "--port", free_port(), *(keys if self.secure else ["--insecure"]),
        )  # fmt: skip

    def make_key(self, name: str) -> None:
        """Writes a key and its public part as `ssh-keygen -t ecdsa -b 384` does."""
        key = ec.generate_private_key(ec.SECP384R1())
        openssh, nothing = serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        (self.folder / f"{name}.key").write_bytes(key.private_bytes(serialization.Encoding.PEM, openssh, nothing))
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        (self.folder / f"{name}.key.pub").write_bytes(public)

    def start_stranger(self) -> None:
        """A SuperNode whose key nobody registered."""
        (self.folder / "stranger").mkdir()
        self.make_key("stranger")
        self.start_node("stranger")

    def await_end_of(self, name: str) -> str:
        """Waits until a program has ended by itself, and returns its log."""
        process = self._processes.pop(name)
        waited(lambda: not _alive(process), f"end of {name}", START_SECONDS, self.folder)
        return self.log(name)

    def restart_ended_nodes(self) -> None:
        """What a service manager does: a SuperNode ends when a SuperLink does not know it."""
        for name in [name for name in self._processes if name.startswith("node-device-")]:
            if not _alive(self._processes[name]):
                del self._processes[name]
                self.start_node(name.removeprefix("node-"))

    def begin(self, timings: Path | None = None) -> None:
        """Writes the run's request, unless it is there, and has Flower run the app."""
        request = self.folder / "request.json"
        if not request.exists():
            options = ("--timings", timings) if timings else ()
            self.call(*PROGRAM, "flower", "request", self.toml, "--out", request, *options)
        where = ("--request", request, "--directory", self.run_directory)
        self.call(*PROGRAM, "flower", "run", ROOT / "examples" / "flower", "here", *where)

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

    def await_task(self, device_id: str, round_index: int, *, finished: bool, seconds: float = 300.0) -> None:
        """Waits until a device has begun, or finished, its task of a round."""
        journal = Journal(self.folder / device_id)

        def there() -> bool:
            task = journal.task()
            begun = task is not None and task["round_index"] == round_index
            return begun and (journal.result() is not None or not finished)

        waited(there, f"task of round {round_index} on {device_id}", seconds, self.folder)

    def freeze(self, device_id: str) -> None:
        """Stops a device's worker where it is, as a board that hangs; its agent still answers."""
        self._worker(device_id).suspend()

    def thaw(self, device_id: str) -> None:
        self._worker(device_id).resume()

    def _worker(self, device_id: str) -> psutil.Process:
        children = self._processes[f"agent-{device_id}"].children()
        (worker,) = [child for child in children if "fedspine_edge.agent.worker" in child.cmdline()]
        return worker

    def environments(self, name: str) -> list[dict[str, str]]:
        """The environments of a process and of all it started."""
        root = self._processes[name]
        found = []
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):  # one that has just ended
                found.append(process.environ())
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
        agents = [process for name, process in self._processes.items() if name.startswith("agent-")]
        for process in agents:
            for worker in process.children() if _alive(process) else ():
                _end(worker, signal.SIGCONT)  # a frozen one would not hear that its agent ends
            _end(process, signal.SIGTERM)  # it ends its own worker
        psutil.wait_procs(agents, timeout=10)
        for name in list(self._processes):
            self.kill(name)
        orphans = [process for process in psutil.process_iter() if self._is_ours(process)]
        for process in orphans:  # a SuperNode that ended leaves its SuperExec behind
            _end(process, signal.SIGKILL)
        for process in self._started:
            process.wait(START_SECONDS)

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("FLWR_HOME") == self._environment["FLWR_HOME"]
        except psutil.Error:
            return False


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
