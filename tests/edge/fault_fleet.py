"""A fleet of real processes over TLS, watched as systemd would, whose processes fail where a plan says so."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedspine_edge.agent.enrolment import enrol
from fedspine_edge.agent.identity import split_token
from fedspine_edge.agent.link import UnreachableError, fetch_ca
from fedspine_edge.agent.settings import AgentSettings
from fedspine_edge.commands import serve
from fedspine_edge.commands.experiment import shares_of
from fedspine_edge.commands.operate import OPERATOR_FILE, Operator
from fedspine_edge.commands.start_run import run_request
from fedspine_edge.config import Experiment, load_table, settings_from
from fedspine_edge.data import load_examples, split

HERE = Path(__file__).parent
UNIT = (HERE.parents[1] / "systemd" / "fedspine-agent.service").read_text()
FOR_GOOD = {int(code) for line in re.findall(r"^RestartPreventExitStatus=(.+)$", UNIT, re.M) for code in line.split()}
SERVER = "fedspine_edge.commands.serve"
AGENT = "fedspine_edge.agent"
WORKER = "fedspine_edge.agent.worker"


def fault(
    process: str, at: str, moment: str = "after", *, does: str = "kill", times: int = 1, cuts: str | None = None
) -> dict[str, Any]:
    """What fails where: it does kill, hold, raise, fill the disk or nothing, once the newest of `cuts` is cut short."""
    return {"process": process, "at": at, "moment": moment, "does": does, "times": times, "cuts": cuts}


class Watched:
    """A process that is started again when it fails, but not after the exit codes that the systemd unit names."""

    def __init__(self, folder: Path, name: str, arguments: Sequence[str], plan: Sequence[Mapping[str, Any]]) -> None:
        self.name, self.exits = name, list[int]()
        self._arguments = [sys.executable, *arguments]
        self.faults = folder / "faults" / name
        self.faults.mkdir(parents=True)
        (self.faults / "plan.json").write_text(json.dumps(plan))
        self._plan, self.log = plan, folder / f"{name}.log"
        self.environment: dict[str, str] = {}
        self._over = False
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._over = False
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        shared = {"PYTHONPATH": str(HERE / "faults"), "FEDSPINE_FAULTS": str(self.faults), "OMP_NUM_THREADS": "1"}
        while not self._over:
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    self._arguments,
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    env={**os.environ, **shared, **self.environment},
                )  # fmt: skip
            code = self._process.wait()
            self.exits.append(code)
            if code == 0 or code in FOR_GOOD:
                return

    def stop(self) -> None:
        self._over = True
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
        if self._thread is not None:
            self._thread.join(20)
            assert not self._thread.is_alive(), self.name

    @property
    def gone(self) -> bool:
        return self._thread is not None and not self._thread.is_alive()

    @property
    def struck(self) -> list[int]:
        sizes = [self.faults / f"struck-{index}" for index in range(len(self._plan))]
        return [path.stat().st_size if path.exists() else 0 for path in sizes]

    def assert_all_struck(self) -> None:
        assert self.struck == [fault["times"] for fault in self._plan], (self._plan, self.log.read_text()[-4000:])


class FaultFleet:
    """Server and devices of a TOML file."""

    def __init__(
        self,
        folder: Path,
        toml: Path,
        plans: Mapping[str, Sequence[Mapping[str, Any]]],
        clocks: Mapping[str, Mapping[str, str]],
    ) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.directory = f"https://127.0.0.1:{port}", folder / "server"
        settings = serve.ServerSettings(self.url, "127.0.0.1", port)
        self.token = serve.init(self.directory, settings, ["127.0.0.1"], claim_hours=1)["token"]
        self.plans, self.toml, self.clocks = plans, toml, clocks
        self.server = Watched(folder, "server", ["-m", SERVER, str(self.directory)], plans.get("server", ()))
        self.server.start()
        self.operator = Operator(self.directory / OPERATOR_FILE)
        self.until(self._answers)
        self.devices: dict[str, Watched] = {}
        self._join_all(toml)

    def _answers(self) -> bool:
        try:
            return bool(fetch_ca(self.url, split_token(self.token)[1]))
        except UnreachableError:
            return False

    def _join_all(self, toml: Path) -> None:
        experiment = settings_from(Experiment, load_table(str(toml)), where="toml")
        sizes = {"held_out": experiment.held_out, "validation": experiment.validation}
        parts = split(load_examples(experiment.data), **sizes, seed=experiment.seed)
        for index, share in enumerate(shares_of(experiment, parts, sum(experiment.fleet.values()))):
            name = f"device-{index:02d}"
            state = self.folder / name
            state.mkdir()
            rows = [{"text": parts.train[i].text, "label": parts.train[i].label} for i in share]
            (state / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            agent = AgentSettings(
                str(experiment.model), str(state / "examples.jsonl"), memory_bytes=8 << 30, threads=1
            )  # fmt: skip
            enrol(self.url, self.token, state, agent, name=name)
            self.operator.post(f"devices/{name}/accept")
            watched = Watched(self.folder, name, ["-m", AGENT, str(state)], self.plans.get(name, ()))
            watched.environment = dict(self.clocks.get(name, {}))
            self.devices[name] = watched
            watched.start()

    def state(self, name: str) -> Path:
        return self.folder / name

    def start_run(self, timings: Path | None = None, **options: Any) -> None:
        request = run_request(str(self.toml), name="run", timings=timings)
        request["options"] |= options
        self.operator.post("runs", request)

    def run(self) -> dict[str, Any]:
        return dict(self.operator.get("runs/run"))

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while page := self.operator.get(f"events?after={found[-1]['event_id'] if found else 0}"):
            found += page
        return [event for event in found if kind in (None, event["kind"])]

    def merged(self) -> list[list[str]]:
        return [event["detail"]["merged"] for event in self.events("round_closed")]

    def missing(self) -> list[dict[str, str]]:
        return [event["detail"]["missing"] for event in self.events("round_closed")]

    def until(self, condition: Callable[[], Any], seconds: float = 120.0) -> Any:
        limit = time.monotonic() + seconds
        while True:
            try:
                if found := condition():
                    return found
            except UnreachableError:
                pass  # the server is just being killed
            assert time.monotonic() < limit, self.logs()
            time.sleep(0.05)

    def finish(self, seconds: float = 120.0) -> dict[str, Any]:
        return dict(self.until(lambda: (run := self.run())["status"] == "finished" and run, seconds))

    def logs(self) -> str:
        return "".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))

    def stop(self) -> None:
        self.operator.close()
        for watched in (*self.devices.values(), self.server):
            watched.stop()
