"""The whole of it: server, agents and workers as processes, TLS on the loopback, real training of a tiny model."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
from tiny import questions

PROGRAM = [sys.executable, "-c", "from fedspine_edge.cli import main; main()"]
TOML = """
model = "{model}"
data = "{data}"
held_out = 6
validation = 2
dense_reference = false

[run]
rounds = 3
steps_per_round = 4
prune_interval = 2
batch_size = 4
learning_rate = 5e-3
ranks = [2, 4]
target_sparsity = 0.5

[fleet]
tx2 = 1
xavier_nx = 1
agx_xavier = 1

[link]
min_devices = 3
"""
PRUNED = ["models/pruned/model.safetensors", "models/pruned/fedspine_prune.json", "models/pruned/config.json"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def fedspine(*arguments, cwd):
    done = subprocess.run(
        [*PROGRAM, *map(str, arguments)],
        cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def logs(folder):
    return "".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(folder.glob("*.log")))


def waited(show, wanted, folder, seconds=90.0):
    limit = time.monotonic() + seconds
    while True:
        found = show()
        if wanted(found):
            return found
        assert time.monotonic() < limit, f"{found}\n{logs(folder)}"
        time.sleep(0.1)


@pytest.fixture
def toml(tmp_path, tiny_models):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in questions()))
    path = tmp_path / "mine.toml"
    path.write_text(TOML.format(model=tiny_models["bert"], data=data))
    return path


@pytest.fixture
def fleet(tmp_path, toml):
    told = fedspine("fleet", "up", toml, "--dir", "fleet", "--port", free_port(), "--json", cwd=tmp_path)
    yield told, tmp_path / "fleet"
    if (tmp_path / "fleet" / "fleet.json").exists():
        assert fedspine("fleet", "down", "--dir", "fleet", "--json", cwd=tmp_path)["ended"] >= 4


@pytest.mark.slow
def test_three_real_devices_make_the_simulated_fleets_adapter_to_the_bit(toml, fleet, tmp_path):
    told, folder = fleet
    simulated = fedspine("simulate", toml, "--out", "sim", "--json", "--workers", 1, cwd=tmp_path)
    operator = ("--operator", told["operator_file"], "--json")
    started = fedspine("runs", "start", toml, "--timings", "sim/rounds.jsonl", *operator, cwd=tmp_path)
    assert started["recorded_timings"]
    run = waited(
        lambda: fedspine("runs", "show", "mine", *operator, cwd=tmp_path),
        lambda run: run["status"] == "finished",
        folder,
    )
    assert run["adapter_sha256"] == simulated["adapter_sha256"]
    closed = [event["detail"] for event in run["events"] if event["kind"] == "round_closed"]
    assert [detail["merged"] for detail in closed] == [["device-00", "device-01", "device-02"]] * 3
    assert all(detail["recorded_timings"] for detail in closed)
    fetched = fedspine("runs", "fetch", "mine", "--out", "fetched", *operator, cwd=tmp_path)
    assert (fetched["adapter_sha256"], fetched["rounds_done"]) == (simulated["adapter_sha256"], 3)
    for name in PRUNED:
        assert (tmp_path / "fetched" / name).read_bytes() == (tmp_path / "sim" / name).read_bytes(), name
    rows = toml.with_name("rows.jsonl")
    (exported,) = fedspine("export", "hf", "fetched", "--out", "hf", "--data", rows, "--json", cwd=tmp_path)
    assert exported["top1_agreement"] == 1.0
    devices = fedspine("devices", "ls", *operator, cwd=tmp_path)
    assert all(device["facts"]["cores"] >= 1 and device["facts"]["memory_bytes"] > 0 for device in devices)


@pytest.mark.slow
def test_a_stopped_run_gives_its_model_so_far_and_goes_on_when_resumed(toml, fleet, tmp_path):
    told, folder = fleet
    long = tmp_path / "long.toml"
    long.write_text(toml.read_text().replace("rounds = 3", "rounds = 500"))
    operator = ("--operator", told["operator_file"], "--json")

    def show():
        return fedspine("runs", "show", "long", *operator, cwd=tmp_path)

    fedspine("runs", "start", long, *operator, cwd=tmp_path)
    waited(show, lambda run: run["round_index"] >= 1, folder)
    fedspine("runs", "stop", "long", *operator, cwd=tmp_path)
    stopped = show()
    assert stopped["status"] == "stopped"
    fetched = fedspine("runs", "fetch", "long", "--out", "fetched", *operator, cwd=tmp_path)
    assert 1 <= fetched["rounds_done"] == stopped["round_index"] < fetched["rounds"] == 500
    assert fetched["adapter_sha256"] == stopped["adapter_sha256"]
    assert (tmp_path / "fetched" / PRUNED[0]).is_file()
    fedspine("runs", "resume", "long", *operator, cwd=tmp_path)
    waited(show, lambda run: run["round_index"] > stopped["round_index"], folder)
    fedspine("runs", "stop", "long", *operator, cwd=tmp_path)
