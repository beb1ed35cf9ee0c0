"""A browser, a fleet of real agents, and a long run's directory for the page's tests."""

from __future__ import annotations

import json
import math
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--js-flags=--expose-gc",
]
PROGRAM = [sys.executable, "-c", "from fedspine_edge.cli import main; main()"]
BOARDS = ("Jetson TX2", "Jetson Xavier NX", "Jetson AGX Xavier", "Jetson Orin Nano")
TOML = """
model = "{model}"
data = "{data}"
held_out = 6
validation = 2
dense_reference = false

[run]
rounds = 400
steps_per_round = 10
prune_interval = 2
batch_size = 4
learning_rate = 5e-3
ranks = [2, 4]
target_sparsity = 0.5

[fleet]
tx2 = 4
xavier_nx = 2
agx_xavier = 2

[link]
min_devices = 4
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def browser(profile: Path) -> Iterator[Any]:
    """Debian's Chromium with a profile of its own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(profile), executable_path="/usr/bin/chromium", args=FLAGS, ignore_https_errors=True
        )
        context.set_default_timeout(90_000)
        try:
            yield context
        finally:
            context.close()


@contextmanager
def real_fleet(folder: Path, model: Path, data: Path) -> Iterator[dict[str, Any]]:
    """A server and eight agents as processes, ended when the block is left."""
    toml = folder / "live.toml"
    toml.write_text(TOML.format(model=model, data=data))
    directory = folder / "fleet"
    told = fedspine("fleet", "up", toml, "--dir", directory, "--port", free_port(), "--json")
    try:
        yield {**told, "toml": str(toml), "directory": directory}
    finally:
        fedspine("fleet", "down", "--dir", directory, "--json")


def fedspine(*arguments: object) -> dict[str, Any]:
    """What the program prints as JSON."""
    done = subprocess.run([*PROGRAM, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def agent_process(fleet: dict[str, Any], device_id: str) -> int:
    """Returns the process of a device's agent, which the fleet's file lists behind the server's."""
    known = json.loads((fleet["directory"] / "fleet.json").read_text())
    return int(known[1 + list(fleet["devices"]).index(device_id)]["pid"])


def start_agent(fleet: dict[str, Any], device_id: str) -> subprocess.Popen[bytes]:
    state = fleet["directory"] / "devices" / device_id
    command = [sys.executable, "-m", "fedspine_edge.agent", str(state)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def seconds_until(condition: Callable[[], Any], most: float) -> float:
    """Waits for something that another process does and returns how long it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < most, f"it did not happen within {most} s"
        time.sleep(0.02)
    return time.monotonic() - began


def long_run(folder: Path, rounds: int, devices: int, seed: int = 0) -> list[dict[str, Any]]:
    """Writes a run as `simulate` would and returns its records; some devices are late, dropped or rejected."""
    folder.mkdir(parents=True, exist_ok=True)
    made = [_round(t, rounds, devices, random.Random(seed * 1000 + t)) for t in range(rounds)]
    start = 0.0
    for record in made:
        length = record["virtual_end_seconds"]
        record["virtual_start_seconds"], record["virtual_end_seconds"] = start, start + length
        start += length
    partial = folder / "rounds.partial"
    partial.write_text("".join(json.dumps(record) + "\n" for record in made))
    partial.replace(folder / "rounds.jsonl")
    return made


def _round(t: int, rounds: int, num_devices: int, chance: random.Random) -> dict[str, Any]:
    schedule = 0.5 * min(1.0, t / (0.7 * rounds))
    devices = [_device(i, schedule, chance) for i in range(num_devices)]
    length = max(d["compute_seconds"] + d["upload_seconds"] + 2 for d in devices if d["state"] == "merged")
    for device in devices:
        spent = device["compute_seconds"] + device["upload_seconds"] + device["download_seconds"]
        device["waiting_seconds"] = max(0.0, length - spent) if device["state"] == "merged" else 0.0
    accuracy = 0.9 - 0.6 * math.exp(-6 * t / rounds) + chance.uniform(-0.01, 0.01)
    return {
        "round_index": t, "virtual_start_seconds": 0.0, "virtual_end_seconds": length,
        "deadline_seconds": length * 0.95,
        "schedule_ratio": schedule, "loss_before": 2.2 * math.exp(-3 * t / rounds) + 0.4,
        "loss_after": 2.1 * math.exp(-3 * t / rounds) + 0.35, "accuracy": accuracy,
        "num_merged": sum(d["state"] == "merged" for d in devices), "late": [], "devices": devices,
    }  # fmt: skip


def _device(i: int, schedule: float, chance: random.Random) -> dict[str, Any]:
    luck = chance.random()
    state = "late" if luck < 0.03 else "dropped" if luck < 0.045 else "rejected" if luck < 0.05 else "merged"
    detail = {"late": "arrived 4.2 s after the round's end", "dropped": "no answer"}.get(state)
    detail = "expected finite values in lora_a/layers.3.q, found NaN or Inf" if state == "rejected" else detail
    ratio = max(0.0, min(0.7, schedule + 0.1 * (1 - i % 4) * 0.5))
    compute = (26, 14, 7, 10)[i % 4] * (1 - 0.6 * ratio) * chance.uniform(0.9, 1.1) * (1.5 if state == "late" else 1)
    return {
        "device_id": f"jetson-{i:02d}", "board": BOARDS[i % 4], "power_mode": i % 3, "pruning_ratio": ratio,
        "rank": (4, 8, 16, 16)[i % 4], "num_steps": 12,
        "reason": f"{compute:.1f} s expected of 24.0 s, gain {chance.uniform(1, 3):.2f}, {i % 9 + 3} rounds known",
        "compute_seconds": 0.0 if state == "dropped" else compute, "download_seconds": 1.5, "waiting_seconds": 0.0,
        "upload_seconds": 0.0 if state == "dropped" else 2.0, "download_bytes": 300_000, "upload_bytes": 250_000,
        "state": state, "detail": detail, "loss_before": 1.0, "loss_after": 0.9, "num_examples": 100, "reward": 0.5,
    }  # fmt: skip
