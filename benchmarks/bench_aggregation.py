"""Seconds and memory of one closing's aggregation, every rule, 80 devices on the shapes of RoBERTa-base.

    python benchmarks/bench_aggregation.py --json benchmarks/results/aggregation.json

Devices differ in rank and mask as in a run at 50 %; their updates wait on disk as they do in a server. Each rule runs
in a process of its own; peak memory is what the closing adds to it, files in the page cache not counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from fedspine_edge.hardware import this_machine
from fedspine_edge.protocol import DeviceReport, Group, Layout, Matrix, Update, expand_members, tensors_nbytes
from fedspine_server import coordinator
from fedspine_server.aggregation import AGGREGATIONS
from fedspine_server.merging import merge
from fedspine_server.settings import RunSettings
from fedspine_server.spool import Spool

LAYERS, HIDDEN, FFN, HEADS = 12, 768, 3072, 12
RANKS = (4, 8, 16, 32)


def layout() -> Layout:
    """RoBERTa-base: 12 layers of 12 heads and 3072 channels."""
    groups, matrices = [], []
    for layer in range(LAYERS):
        heads, ffn = f"layers.{layer}.heads", f"layers.{layer}.ffn"
        groups += [
            Group(heads, "heads", HEADS, 1, 4 * HIDDEN * HIDDEN // HEADS),
            Group(ffn, "ffn", FFN, 16, 2 * HIDDEN),
        ]
        matrices += [Matrix(f"layers.{layer}.{name}", HIDDEN, HIDDEN, heads, None) for name in "qkv"]
        matrices += [
            Matrix(f"layers.{layer}.o", HIDDEN, HIDDEN, None, heads),
            Matrix(f"layers.{layer}.up", FFN, HIDDEN, ffn, None),
            Matrix(f"layers.{layer}.down", HIDDEN, FFN, None, ffn),
        ]
    return Layout("ba5e", tuple(groups), tuple(matrices), (("classifier", (HIDDEN, HIDDEN)),))


def update_of(shape: Layout, index: int, rank: int) -> Update:
    """A device's update at half the members, random values."""
    generator = np.random.default_rng(index)
    keep = {
        group.name: np.sort(generator.permutation(group.num_members)[: group.num_members // 2]).astype(np.int32)
        for group in shape.groups
    }
    tensors: dict[str, np.ndarray] = {f"keep/{name}": members for name, members in keep.items()}

    def half(*size: int) -> np.ndarray:
        return (0.02 * generator.standard_normal(size, dtype=np.float32)).astype(np.float16)

    for group in shape.groups:
        tensors[f"importance/{group.name}"] = np.abs(half(group.num_members))
    for matrix in shape.matrices:
        sides = [(matrix.out_group, matrix.out_features), (matrix.in_group, matrix.in_features)]
        num_out, num_in = (
            features if name is None else len(expand_members(keep[name], shape.group(name).num_members, features))
            for name, features in sides
        )
        tensors[f"lora_a/{matrix.name}"], tensors[f"lora_b/{matrix.name}"] = half(rank, num_in), half(num_out, rank)
    tensors["task_head/classifier"] = generator.standard_normal((HIDDEN, HIDDEN), dtype=np.float32)
    report = DeviceReport(100, 20, 1.0, 0.5, 1.0, 1)
    return Update("run", f"device-{index:02d}", 0, "ba5e", 0.5, rank, report, tensors)


def measure(rule: str, num_devices: int, folder: Path) -> dict[str, float]:
    """Seconds, CPU seconds and added peak memory of one closing."""
    shape = layout()
    ranks = RANKS[-2:-1] if rule == "fedavg" else RANKS
    settings = RunSettings(aggregation=rule, ranks=ranks, fixed_rank=ranks[0], controller="fixed")
    state = coordinator.init(settings, shape, {"classifier": np.zeros((HIDDEN, HIDDEN), dtype=np.float32)})
    with Spool(folder) as spool:
        updates, num_bytes = [], 0
        for index in range(num_devices):
            state = coordinator.register(state, f"device-{index:02d}", num_examples=100 + index, memory_bytes=1)
            updates.append(spool.keep(update_of(shape, index, ranks[index % len(ranks)])))
            num_bytes += tensors_nbytes(updates[-1])
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before, wall, cpu = _status("VmRSS"), time.perf_counter(), time.process_time()
        merge(state, updates)
        seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
        return {
            "seconds": round(seconds, 2),
            "cpu_seconds": round(cpu_seconds, 2),
            "peak_bytes": _status("VmHWM") - before,
            "updates_bytes": num_bytes,
            "max_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=80)
    parser.add_argument("--rules", nargs="+", default=list(AGGREGATIONS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.one:
            print(json.dumps(measure(arguments.one, arguments.devices, Path(folder))))
            return
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    found = {}
    for rule in arguments.rules:
        command = [sys.executable, __file__, "--one", rule, "--devices", str(arguments.devices)]
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        found[rule] = json.loads(output)
        print(
            f"{rule:13} {found[rule]['seconds']:7.2f} s  {found[rule]['cpu_seconds']:7.2f} CPU s"
            f"  peak +{found[rule]['peak_bytes'] / 2**20:6.0f} MiB  (updates {found[rule]['updates_bytes'] >> 20} MiB)",
            flush=True,
        )
    if arguments.json:
        machine = dataclasses.asdict(this_machine())
        document = {"devices": arguments.devices, "ranks": RANKS, "rules": found, "machine": machine}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
