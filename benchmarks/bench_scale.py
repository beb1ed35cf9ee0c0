"""What a round costs the coordinator as the fleet grows: synthetic updates of the test fleet's two-layer model.

    python benchmarks/bench_scale.py [--devices 100 1000 10000] [--rounds 3] [--repeat 3] [--json FILE]

Each size runs in a process of its own, interleaved, `--repeat` times: CPU seconds of the coordinator's steps (propose
and assign, judge and merge, save), peak memory above what the imports take, size of the saved state. Making the updates
is not counted: it is the devices' work. `database` is a SQLite file with the HTTPS link's rows of one round: a task and
a result each.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
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


def one_size(count: int, rounds: int) -> dict[str, Any]:
    """Rounds of `count` devices, in this process."""
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
    before, clock = peak_bytes(), Clock()
    for index in range(rounds + 1):
        if index == 1:
            clock = Clock()  # the first round opens caches and knows no timings
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
    return {
        "cpu_seconds_per_device_round": {step: seconds / count / rounds for step, seconds in clock.seconds.items()},
        "peak_bytes_per_device": (peak_bytes() - before) / count,
        "state_bytes_per_device": state_bytes / count,
        "history_bytes_per_device_round": len(json.dumps(state.history[-1])) / count,
        "database_bytes_per_device": database_bytes(names) / count,
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
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(one_size(options.one, options.rounds)))
        return
    found: dict[int, list[dict[str, Any]]] = {count: [] for count in options.devices}
    for _ in range(options.repeat):
        for count in options.devices:
            # As many device-rounds each, within reason: small fleets are timed over more rounds.
            rounds = min(15, max(options.rounds, 3000 // count))
            command = [sys.executable, __file__, "--one", str(count), "--rounds", str(rounds)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[count].append(json.loads(done.stdout))
    print(table(report := as_report(found)))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def as_report(found: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """Returns medians and spreads, and how flat the cost of a device-round is."""
    from fedspine_edge.hardware import this_machine

    sizes = {}
    for count, runs in found.items():
        steps = runs[0]["cpu_seconds_per_device_round"]
        rounds_only = [{**run["cpu_seconds_per_device_round"], "load": 0.0} for run in runs]
        totals = [sum(one.values()) for one in rounds_only]
        sizes[str(count)] = {
            "cpu_seconds_per_device_round": statistics.median(totals),
            "cpu_seconds_spread": [min(totals), max(totals)],
            "steps": {s: statistics.median(run["cpu_seconds_per_device_round"][s] for run in runs) for s in steps},
            **{
                name: statistics.median(run[name] for run in runs)
                for name in runs[0]
                if name not in ("cpu_seconds_per_device_round", "num_merged")
            },
            "num_merged": runs[0]["num_merged"],
        }
    costs = [size["cpu_seconds_per_device_round"] for size in sizes.values()]
    flat = max(costs) / min(costs) - 1
    return {"machine": dataclasses.asdict(this_machine()), "sizes": sizes, "unevenness": flat, "flat": flat <= 2 * FLAT}


def table(report: dict[str, Any]) -> str:
    """Returns the report as a Markdown table."""
    lines = ["| devices a round | CPU ms a device-round | enlist | assign | close | save | load | KB peak | KB state |"]
    lines += ["|---" * 9 + "|"]
    for count, size in report["sizes"].items():
        steps = " | ".join(f"{1e3 * seconds:.3f}" for seconds in size["steps"].values())
        kilobytes = f"{size['peak_bytes_per_device'] / 1e3:.1f} | {size['state_bytes_per_device'] / 1e3:.2f}"
        lines.append(f"| {count} | {1e3 * size['cpu_seconds_per_device_round']:.3f} | {steps} | {kilobytes} |")
    return "\n".join([*lines, f"unevenness {report['unevenness']:.1%}"])


if __name__ == "__main__":
    main()
