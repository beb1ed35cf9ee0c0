"""What a round costs the coordinator as the fleet grows: synthetic updates of the test fleet's two-layer model.

    python benchmarks/bench_scale.py [--devices 100 1000 10000] [--rounds 3] [--repeat 3] [--real 20 80] [--json FILE]

Each size runs in a process of its own, interleaved, `--repeat` times: CPU seconds of the coordinator's steps (propose
and assign, judge and merge, save), peak memory above what the imports take, size of the saved state. A small fleet's
run is made several times over, so that each size is timed over as many device-rounds and with a history as long.
Making the updates is not counted: it is the devices' work. `database` is a SQLite file with the HTTPS link's rows of
one round: a task and a result each. `long` is one run of 19 rounds: what the last three cost beside the first three.
`real` has updates of RoBERTa-base's size that wait on disk, as a server's do.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "server"))
FLAT = 0.10
DEVICE_ROUNDS = 3000  # at least so many are timed of each size
LONG_DEVICES, LONG_ROUNDS = 200, 19


class Clock:
    """CPU seconds by step of a round."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, step: str, work: Callable[[], Any]) -> Any:
        """Returns what `work` returns and counts its time."""
        begin = time.process_time()
        found = work()
        self.seconds[step] = self.seconds.get(step, 0.0) + time.process_time() - begin
        return found

    def per_device_round(self, device_rounds: int) -> dict[str, float]:
        """Returns the seconds of each step."""
        return {step: seconds / device_rounds for step, seconds in self.seconds.items()}


def one_size(count: int, rounds: int) -> dict[str, Any]:
    """Rounds of `count` devices, in this process."""
    before, clock = peak_bytes(), Clock()
    play(count, 1, [Clock(), Clock()])  # opens caches
    runs = max(1, DEVICE_ROUNDS // (count * rounds))
    for _ in range(runs):
        # Of the first round no timings are known: it is asked less of.
        state, state_bytes = play(count, rounds, [Clock(), *[clock] * rounds])
    return {
        "cpu_seconds_per_device_round": clock.per_device_round(count * rounds * runs),
        "peak_bytes": peak_bytes() - before,
        "peak_bytes_per_device": (peak_bytes() - before) / count,
        "state_bytes_per_device": state_bytes / count,
        "database_bytes_per_device": database_bytes(list(state.devices)) / count,
        "num_merged": state.history[-1]["num_merged"],
    }


def long_run() -> dict[str, Any]:
    """One long run, its first three rounds and its last three."""
    clocks = [Clock() for _ in range(LONG_ROUNDS + 1)]
    sizes = [play(LONG_DEVICES, rounds, [Clock()] * (rounds + 1))[1] for rounds in (2, 12)]
    play(LONG_DEVICES, LONG_ROUNDS, clocks)
    costs = [clock.per_device_round(LONG_DEVICES) for clock in clocks]
    return {
        "devices": LONG_DEVICES,
        "rounds": LONG_ROUNDS,
        "cpu_seconds_first": statistics.median(sum(cost.values()) - cost["load"] for cost in costs[1:4]),
        "cpu_seconds_last": statistics.median(sum(cost.values()) - cost["load"] for cost in costs[-3:]),
        "save_seconds_first": statistics.median(cost["save"] for cost in costs[1:4]),
        "save_seconds_last": statistics.median(cost["save"] for cost in costs[-3:]),
        "state_bytes_per_device_round": (sizes[1] - sizes[0]) / 10 / LONG_DEVICES,
    }


def play(count: int, rounds: int, clocks: list[Clock]) -> tuple[Any, int]:
    """One run of `rounds` + 1 rounds, each on its own clock; returns its state and that state's size as saved."""
    import toy

    from fedspine_server import coordinator, store
    from fedspine_server.results import DeviceResult
    from fedspine_server.settings import RunSettings

    settings = RunSettings(
        rounds=20, steps_per_round=2, prune_interval=2, ranks=(2, 4), fixed_rank=2, target_sparsity=0.5
    )
    state = coordinator.init(settings, toy.layout(), toy.task_head())
    names = [f"device-{number:06d}" for number in range(count)]
    here = [coordinator.Participant(name, 10 + number % 50, 8 << 30) for number, name in enumerate(names)]
    for clock in clocks[: rounds + 1]:
        state = clock("enlist", lambda state=state: coordinator.enlist(state, here))
        assignments, state = clock("assign", lambda state=state: coordinator.assign(state))
        made: dict[Any, Any] = {}
        results = [
            DeviceResult(
                one.device_id, "arrived", update=update_of(one, 10 + number % 50, made),
                compute_seconds=1.0 + number % 7, download_seconds=0.1, upload_seconds=0.2,
            )
            for number, one in enumerate(assignments)
        ]  # fmt: skip
        state = clock(
            "close", lambda state=state, results=results: coordinator.close_round(state, results, round_seconds=9.0)
        )
        with tempfile.TemporaryDirectory() as folder:
            path = clock("save", lambda state=state, folder=folder: store.save(Path(folder), state))
            state_bytes = path.stat().st_size
            clock("load", lambda folder=folder: store.load(Path(folder)))
    return state, state_bytes


def real_size(count: int) -> dict[str, Any]:
    """One round of `count` devices with updates of RoBERTa-base's size, in this process."""
    import numpy as np
    from bench_aggregation import HIDDEN, RANKS, layout, update_of

    from fedspine_edge.protocol import tensors_nbytes
    from fedspine_server import coordinator, store
    from fedspine_server.results import DeviceResult
    from fedspine_server.settings import RunSettings
    from fedspine_server.spool import Spool

    shape = layout()
    settings = RunSettings(
        controller="fixed", controller_options={"memory_per_rank": 4}, fixed_rank=4, ranks=RANKS, warmup_fraction=0.0,
        rounds=2, schedule="one-shot", cooldown_fraction=1.0, target_sparsity=0.5, mean_compensation=False,
    )  # fmt: skip
    state = coordinator.init(settings, shape, {"classifier": np.zeros((HIDDEN, HIDDEN), dtype=np.float32)})
    here = [coordinator.Participant(f"device-{n:06d}", 100 + n % 50, RANKS[n % len(RANKS)] << 30) for n in range(count)]
    before, clock, num_bytes = peak_bytes(), Clock(), 0
    state = coordinator.enlist(state, here)
    assignments, state = clock("assign", lambda: coordinator.assign(state))
    with tempfile.TemporaryDirectory() as folder, Spool(Path(folder)) as spool:
        results = []
        for number, one in enumerate(assignments):
            made = update_of(shape, number, one.rank)
            report = dataclasses.replace(made.report, num_examples=100 + number % 50, num_steps=one.num_steps)
            update = dataclasses.replace(made, run_id=one.run_id, device_id=one.device_id, report=report)
            num_bytes += tensors_nbytes(update)
            kept = clock("spool", lambda update=update: spool.keep(update))
            results.append(DeviceResult(one.device_id, "arrived", update=kept, compute_seconds=1.0 + number % 7))
        state = clock("close", lambda: coordinator.close_round(state, results, round_seconds=9.0))
        path = clock("save", lambda: store.save(Path(folder) / "state", state))
        state_bytes = path.stat().st_size
    return {
        "cpu_seconds_per_device_round": clock.per_device_round(count),
        "state_bytes": state_bytes,
        "peak_bytes": peak_bytes() - before,
        "peak_bytes_per_device": (peak_bytes() - before) / count,
        "update_bytes_per_device": num_bytes / count,
        "num_merged": state.history[-1]["num_merged"],
    }


def update_of(assignment: Any, num_examples: int, made: dict[Any, Any]) -> Any:
    """Returns a device's update with arrays of its own; devices that were asked the same answer the same."""
    import toy

    kept = tuple(value.tobytes() for name, value in sorted(assignment.tensors.items()) if name.startswith("keep/"))
    key = (assignment.rank, assignment.pruning_ratio, assignment.num_steps, kept)
    if key not in made:
        made[key] = toy.tune_one(toy.layout(), assignment, num_examples)
    update = made[key]
    return dataclasses.replace(
        update,
        device_id=assignment.device_id,
        report=dataclasses.replace(update.report, num_examples=num_examples),
        tensors={name: value.copy() for name, value in update.tensors.items()},
    )


def peak_bytes() -> int:
    """Returns this process's peak memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def database_bytes(names: list[str]) -> int:
    """Returns the size of a SQLite file with what the link keeps of one round."""
    from sqlalchemy import create_engine
    from sqlalchemy.orm import Session

    from fedspine_server.link import tables

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "link.db"
        engine = create_engine(f"sqlite:///{path}")
        tables.Table.metadata.create_all(engine)
        with Session(engine) as session:
            session.add_all(rows(names, tables))
            session.commit()
        engine.dispose()
        return path.stat().st_size


def rows(names: list[str], tables: Any) -> Iterator[Any]:
    """Yields a task and a result of each device, with values as long as real ones."""
    spec = {"pruning_ratio": 0.35, "rank": 16, "num_steps": 20, "seed": 3141592653, "deadline_seconds": 93.25}
    for name in names:
        sha256 = hashlib.sha256(name.encode()).hexdigest()
        known = {
            "task_id": sha256[:32], "run_id": "run", "round_index": 0, "device_id": name, "attempt": 1, "staleness": 0,
            "blob_sha256": sha256, "fate": "kept", "detail": "", "received_at": 1.7e9, "spec": spec, "status": "done",
            "blob_bytes": 1 << 20, "max_update_bytes": 1 << 21, "created_at": 1.7e9, "lease_until": 1.7e9,
            "seconds": {"download": 1.25, "upload": 2.5},
        }  # fmt: skip
        for table in (tables.TaskRow, tables.ResultRow):
            columns = {column.name for column in table.__table__.columns}
            yield table(**{key: value for key, value in known.items() if key in columns})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--real", type=int, nargs="*", default=[20, 80], help="fleets with updates of a real size")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        kind, count = options.one
        found = {"size": lambda: one_size(int(count), options.rounds), "real": lambda: real_size(int(count))}
        print(json.dumps(found.get(kind, long_run)()))
        return
    sizes: dict[str, list[dict[str, Any]]] = {str(count): [] for count in options.devices}
    real: dict[str, list[dict[str, Any]]] = {str(count): [] for count in options.real}
    for _ in range(options.repeat):
        for kind, counts in (("size", sizes), ("real", real)):
            for count, runs in counts.items():
                runs.append(in_own_process(kind, count, options.rounds))
    report = as_report(sizes, real) | {"long": in_own_process("long", "0", options.rounds)}
    print(table(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def in_own_process(kind: str, count: str, rounds: int) -> dict[str, Any]:
    """Returns what one measurement finds, on one thread of numpy's."""
    command = [sys.executable, __file__, "--one", kind, count, "--rounds", str(rounds)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def as_report(sizes: dict[str, list[dict[str, Any]]], real: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Returns medians and spreads, and how flat the cost of a device-round is."""
    from fedspine_edge.hardware import this_machine

    found = {kind: {n: middle(runs) for n, runs in runs_of.items()} for kind, runs_of in (("s", sizes), ("r", real))}
    costs = [size["cpu_seconds_per_device_round"] for size in found["s"].values()]
    middle_cost = (max(costs) + min(costs)) / 2
    off = max(costs) / middle_cost - 1
    machine = dataclasses.asdict(this_machine())
    return {"machine": machine, "sizes": found["s"], "off_the_middle": off, "flat": off <= FLAT, "real": found["r"]}


def middle(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the medians of runs of one size; a load is not part of a round."""
    steps = runs[0]["cpu_seconds_per_device_round"]
    totals = [sum({**run["cpu_seconds_per_device_round"], "load": 0.0}.values()) for run in runs]
    return {
        "cpu_seconds_per_device_round": statistics.median(totals),
        "cpu_seconds_spread": [min(totals), max(totals)],
        "steps": {s: statistics.median(run["cpu_seconds_per_device_round"][s] for run in runs) for s in steps},
        **{
            name: statistics.median(run[name] for run in runs)
            for name in runs[0]
            if name != "cpu_seconds_per_device_round"
        },
    }


def table(report: dict[str, Any]) -> str:
    """Returns the report as Markdown tables."""
    lines = ["| devices a round | CPU ms a device-round | assign | close | save | MB peak | KB state | KB database |"]
    lines += ["|---" * 8 + "|"]
    for count, size in report["sizes"].items():
        steps = " | ".join(f"{1e3 * size['steps'][step]:.3f}" for step in ("assign", "close", "save"))
        kilobytes = f"{size['state_bytes_per_device'] / 1e3:.2f} | {size['database_bytes_per_device'] / 1e3:.2f}"
        cost = f"{1e3 * size['cpu_seconds_per_device_round']:.3f}"
        lines.append(f"| {count} | {cost} | {steps} | {size['peak_bytes'] / 1e6:.0f} | {kilobytes} |")
    lines += [f"{report['off_the_middle']:.1%} off the middle", ""]
    lines += ["| devices, real size | CPU ms a device-round | assign | spool | close | save | MB peak | MB state |"]
    lines += ["|---" * 8 + "|"]
    for count, size in report["real"].items():
        steps = " | ".join(f"{1e3 * size['steps'][step]:.1f}" for step in ("assign", "spool", "close", "save"))
        megabytes = f"{size['peak_bytes'] / 1e6:.0f} | {size['state_bytes'] / 1e6:.1f}"
        lines.append(f"| {count} | {1e3 * size['cpu_seconds_per_device_round']:.1f} | {steps} | {megabytes} |")
    long = report["long"]
    first, last = (1e3 * long[f"cpu_seconds_{when}"] for when in ("first", "last"))
    saves = " to ".join(f"{1e3 * long[f'save_seconds_{when}']:.3f}" for when in ("first", "last"))
    lines += [
        "",
        f"in a run of {long['rounds']} rounds {first:.3f} CPU ms a device-round at first, {last:.3f} at last;",
    ]
    lines += [f"a save {saves}, its file {long['state_bytes_per_device_round']:.0f} bytes more a device and round"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
