"""What the link costs: a server process over TLS on the loopback, light devices, one real agent, a 100 MB message.

    python benchmarks/bench_link.py [--devices 80] [--rounds 20] [--idle 500] [--flower VENV] [--json FILE]

Light devices make the calls of real ones with the agent's own `Link`, a thread each in one other process, and send back
what they were sent, so the rounds cost what carrying and merging them costs. They are put into the database before the
server starts: enrolment is limited to one address's pace. Seconds of calls are what the devices see, their own threads'
waiting for two cores included; seconds of CPU and memory are the server process's own. The idle agent is the real one,
with a real worker beside it that has read model and data. Bounded in count and time; every process it starts it ends.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from light_devices import BASE, SECRET, Device, Seconds, names

LIGHT_DEVICES = Path(__file__).with_name("light_devices.py")
START_SECONDS, ROUNDS_SECONDS, SETTLE_SECONDS, IDLE_SECONDS = 60.0, 240.0, 15.0, 30.0
PAYLOAD_FEATURES, PAYLOAD_RANK, PAYLOAD_TURNS = 960_000, 64, 3
ENROL_TURNS = 3
FLOWER_ROUNDS = 4


def small_layout() -> Any:
    from fedspine_edge.protocol import Layout, Matrix

    return Layout(BASE, (), (Matrix("layers.0.up", 64, 64, None, None),), ())


def payload_layout() -> Any:
    from fedspine_edge.protocol import Layout, Matrix

    return Layout(BASE, (), (Matrix("layers.0.up", 64, PAYLOAD_FEATURES, None, None),), ())


@dataclasses.dataclass
class Server:
    """A server process and how to speak to it."""

    directory: Path
    url: str
    ca: str
    token: str
    process: Any

    def operator(self) -> Any:
        """Returns the calls of its operator."""
        from fedspine_edge.commands.operate import OPERATOR_FILE, Operator

        return Operator(self.directory / OPERATOR_FILE)

    def cpu_seconds(self) -> float:
        """Returns the CPU seconds it has used."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def memory_bytes(self) -> int:
        """Returns its resident memory."""
        return int(self.process.memory_info().rss)


@contextmanager
def served(folder: Path, device_ids: list[str]) -> Iterator[Server]:
    """A server process on a free port of the loopback, which knows these devices."""
    import psutil

    from fedspine_edge.agent.identity import split_token
    from fedspine_edge.agent.link import UnreachableError, fetch_ca
    from fedspine_edge.commands import serve
    from fedspine_server.link.devices import enroll, set_status
    from fedspine_server.link.hub import open_hub
    from fedspine_server.link.schemas import Enrollment
    from fedspine_server.link.tables import ACCEPTED

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"https://127.0.0.1:{port}"
    told = serve.init(folder, serve.ServerSettings(url, "127.0.0.1", port), ["127.0.0.1"], claim_hours=1)
    claim, expected = split_token(told["token"])
    hub = open_hub(folder)
    for device_id in device_ids:
        enroll(hub, Enrollment(claim=claim, device_id=device_id, secret=SECRET))
    set_status(hub, device_ids, ACCEPTED)
    hub.database.close()
    with (folder / "server.log").open("ab") as log:
        command = [sys.executable, "-m", "fedspine_edge.commands.serve", str(folder)]
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})
    try:
        limit = time.monotonic() + START_SECONDS
        while True:
            try:
                ca = fetch_ca(url, expected)
                break
            except UnreachableError:
                alive = process.poll() is None and time.monotonic() < limit
                assert alive, (folder / "server.log").read_text()
                time.sleep(0.05)
        yield Server(folder, url, ca, told["token"], psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(START_SECONDS)


def start_run(server: Server, run_id: str, layout: Any, *, rounds: int, rank: int, devices: int) -> None:
    from fedspine_server.settings import RunSettings

    settings = RunSettings(
        rounds=rounds,
        steps_per_round=1,
        target_sparsity=0.0,
        controller="fixed",
        ranks=(rank,),
        fixed_rank=rank,
        max_update_norm=1e6,
    )
    body = {
        "run_id": run_id,
        "settings": settings.to_json(),
        "layout": layout.to_json(),
        "recipe": {"classes": ["a", "b"]},
        "options": {"min_devices": devices},
    }
    server.operator().post("runs", body)


def start_light_devices(server: Server, folder: Path, **request: Any) -> subprocess.Popen[str]:
    said = {"url": server.url, "ca": server.ca, "folder": str(folder), "limit": ROUNDS_SECONDS, **request}
    command = [sys.executable, str(LIGHT_DEVICES), json.dumps(said)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> Seconds:
    out, _ = process.communicate(timeout=2 * ROUNDS_SECONDS)
    answer = json.loads(out.splitlines()[-1])
    assert not answer["failures"], answer["failures"]
    found: Seconds = answer["seconds"]
    return found


def p99_ms(values: list[float]) -> float:
    return 1e3 * statistics.quantiles(values, n=100)[98]


def rounds_of(folder: Path, count: int, rounds: int, *, reports: bool = True) -> dict[str, Any]:
    """`count` light devices in trivial rounds, with or without a report of progress in each."""
    with served(folder / "server", names(count)) as server:
        start_run(server, "trivial", small_layout(), rounds=rounds, rank=4, devices=count)
        before, begin = server.cpu_seconds(), time.monotonic()
        request = {"count": count, "idle": False, "rounds": rounds, "seconds": 0, "reports": reports}
        seconds = finish(start_light_devices(server, folder, **request))
        operator = server.operator()
        while operator.get("runs/trivial")["status"] != "finished":
            assert time.monotonic() - begin < ROUNDS_SECONDS, operator.get("runs/trivial")
            time.sleep(0.05)
        history = operator.get("runs/trivial/history")
        assert [record["num_merged"] for record in history] == [count] * rounds
        return {
            "cpu_seconds_per_round": (server.cpu_seconds() - before) / rounds,
            "wall_seconds_per_round": (time.monotonic() - begin) / rounds,
            "server_bytes": server.memory_bytes(),
            "p99_ms": {name: p99_ms(values) for name, values in sorted(seconds.items())},
            "median_ms": {name: 1e3 * statistics.median(values) for name, values in sorted(seconds.items())},
            "num_calls": {name: len(values) for name, values in sorted(seconds.items())},
        }


def idle_devices(folder: Path, count: int) -> dict[str, Any]:
    """`count` light devices in long polls that end with nothing, and what the server costs meanwhile."""
    with served(folder / "server", names(count)) as server:
        alone = server.memory_bytes()
        process = start_light_devices(
            server, folder, count=count, idle=True, rounds=0, seconds=SETTLE_SECONDS + IDLE_SECONDS
        )
        time.sleep(SETTLE_SECONDS)
        before, begin = server.cpu_seconds(), time.monotonic()
        time.sleep(IDLE_SECONDS)
        share = (server.cpu_seconds() - before) / (time.monotonic() - begin)
        loaded = server.memory_bytes()
        seconds = finish(process)
    return {
        "num_devices": count,
        "server_cpu_share": share,
        "server_bytes": loaded,
        "server_bytes_without_devices": alone,
        "p99_ms": {name: p99_ms(values) for name, values in sorted(seconds.items())},
    }


def payload(folder: Path) -> dict[str, Any]:
    """One message of at least 100 MB down to a device, and one back, until the server has said that it is kept."""
    down, up, sizes = [], [], {}
    for turn in range(PAYLOAD_TURNS):
        own = folder / str(turn)
        own.mkdir()
        seconds: Seconds = defaultdict(list)
        with served(own / "server", names(1)) as server:
            device = Device({"url": server.url, "ca": server.ca}, names(1)[0], seconds)
            device.hello()
            start_run(server, "large", payload_layout(), rounds=1, rank=PAYLOAD_RANK, devices=1)
            task = None
            limit = time.monotonic() + START_SECONDS
            while task is None:
                assert time.monotonic() < limit, server.operator().get("runs/large")
                task = device.task(5.0)
            blob = device.download(task, own)
            path = own / "update"
            manifest = device.frame(task, blob, path)
            device.send(task, manifest, path)
            sizes = {"down_bytes": task["blob"]["num_bytes"], "up_bytes": manifest["num_bytes"]}
        down += seconds["download"]
        up.append(seconds["upload"][0] + seconds["result"][0])
    assert min(sizes.values()) >= 100e6, sizes
    return {"down": statistics.median(down), "up": statistics.median(up), "all_down": down, "all_up": up, **sizes}


def idle_agent(folder: Path) -> dict[str, Any]:
    """The real agent of an enrolled board without a task; its worker is another process, and not counted."""
    import psutil

    from fedspine_edge.agent.enrolment import enrol
    from fedspine_edge.agent.settings import AgentSettings

    with served(folder / "server", []) as server:
        state = folder / "board"
        enrol(server.url, server.token, state, AgentSettings(model="minilm-l6", data="trec6", threads=1), name="board")
        operator = server.operator()
        operator.post("devices/board/accept")
        process = subprocess.Popen([sys.executable, "-m", "fedspine_edge.agent", str(state)], stderr=subprocess.DEVNULL)
        try:
            limit = time.monotonic() + START_SECONDS
            while not operator.get("devices/board")["num_examples"]:
                alive = process.poll() is None and time.monotonic() < limit
                assert alive, "the agent does not say hello"
                time.sleep(0.2)
            time.sleep(SETTLE_SECONDS)
            agent = psutil.Process(process.pid)
            before, begin = sum(agent.cpu_times()[:2]), time.monotonic()
            time.sleep(IDLE_SECONDS)
            share = (sum(agent.cpu_times()[:2]) - before) / (time.monotonic() - begin)
            return {"bytes": int(agent.memory_info().rss), "cpu_share": share}
        finally:
            process.terminate()
            process.wait(START_SECONDS)


def enrol_to_first_task(folder: Path) -> float:
    """Seconds from a board's `join`, accepted at once, to its first task: real agent, worker, model and data."""
    from fedspine_edge.agent.enrolment import enrol
    from fedspine_edge.agent.settings import AgentSettings
    from fedspine_edge.commands.start_run import run_request

    with served(folder / "server", []) as server:
        operator, state = server.operator(), folder / "board"
        request = run_request("encoder", name="run", timings=None)
        request["options"]["min_devices"] = 1
        operator.post("runs", request)
        begin = time.monotonic()
        enrol(server.url, server.token, state, AgentSettings(model="minilm-l6", data="trec6", threads=1), name="board")
        operator.post("devices/board/accept")
        process = subprocess.Popen([sys.executable, "-m", "fedspine_edge.agent", str(state)], stderr=subprocess.DEVNULL)
        try:
            while not operator.get("devices/board")["task"]:
                alive = process.poll() is None and time.monotonic() - begin < START_SECONDS
                assert alive, "the agent gets no task"
                time.sleep(0.02)
            return time.monotonic() - begin
        finally:
            process.terminate()
            process.wait(START_SECONDS)


def measured(options: argparse.Namespace) -> dict[str, Any]:
    from fedspine_edge.hardware import this_machine

    with tempfile.TemporaryDirectory(prefix="bench-link-") as name:
        folders = {part: Path(name) / part for part in ("agent", "enrol", "rounds", "idle", "payload")}
        for folder in folders.values():
            folder.mkdir()
        agent = idle_agent(folders["agent"])
        enrol = []
        for turn in range(ENROL_TURNS):
            (folders["enrol"] / str(turn)).mkdir()
            enrol.append(enrol_to_first_task(folders["enrol"] / str(turn)))
        rounds = rounds_of(folders["rounds"], options.devices, options.rounds)
        idle = idle_devices(folders["idle"], options.idle)
        large = payload(folders["payload"])
    flower = {}
    if options.flower is not None:
        from bench_flower import compared

        flower = compared(options.flower, options.devices, options.rounds, FLOWER_ROUNDS)
    return {
        "machine": dataclasses.asdict(this_machine()),
        **({"flower_cpu_ratio": flower["flower_cpu_ratio"], "flower": flower} if flower else {}),
        "idle_agent_bytes": agent["bytes"],
        "idle_agent_cpu_share": agent["cpu_share"],
        "enrol_to_first_task_seconds": statistics.median(enrol),
        "all_enrol_to_first_task_seconds": enrol,
        f"cpu_seconds_per_round_{options.devices}": rounds["cpu_seconds_per_round"],
        "p99_ms": rounds["p99_ms"],
        "payload_100mb_seconds": {"down": large["down"], "up": large["up"]},
        "rounds": {"num_devices": options.devices, "num_rounds": options.rounds, **rounds},
        "idle": idle,
        "payload": large,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--idle", type=int, default=500)
    parser.add_argument(
        "--flower", type=Path, help="a virtual environment with flwr: compares with it too, see bench_flower.py"
    )
    parser.add_argument("--json", type=Path, help="write all figures and the machine's facts here")
    options = parser.parse_args()
    report = measured(options)
    text = json.dumps(report, indent=1)
    print(text)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
