"""The `full` image: real rounds on an emulated board against the real server here. `make test-images-nightly`."""

import json
import os
import random
import sys
import time
from pathlib import Path

import pytest
from test_power_cuts import ROUND_CUTS, SEED
from tiny import questions, save_tiny_model

from fedspine_edge.commands.start_run import run_request

pytestmark = pytest.mark.images_nightly

ROUNDS = 6
ROUND_SECONDS = 3600.0
MEMORY_MIB = 3072
COMPILED = {
    "torch",
    "tokenizers",
    "safetensors",
    "numpy",
    "llama_cpp",
    "fedspine_edge",
    "regex",
    "yaml",
    "pydantic_core",
}
TOML = """
model = "{model}"
data = "{data}"
held_out = 6
validation = 2
dense_reference = false

[run]
rounds = {rounds}
steps_per_round = 8
prune_interval = 4
batch_size = 4
learning_rate = 1e-2
ranks = [4]
target_sparsity = 0.25

[fleet]
tx2 = 1

[link]
min_devices = 1
present_seconds = 1200
"""


@pytest.fixture(scope="session")
def image() -> Path:
    folder = Path(os.environ.get("FEDSPINE_FULL_IMAGE_FOLDER", "dist/images/generic-arm64-full"))
    return next(folder.glob("*.img"))


def tuning_board(world, tmp_path, *, check_rounds):
    """Returns a board with a tiny model and its data; the server has a run that waits for it."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in questions()))
    model = save_tiny_model(tmp_path / "model", "bert")
    config = tmp_path / "mine.toml"
    config.write_text(TOML.format(model=model, data=data, rounds=ROUNDS))
    world.operator.post("runs", run_request(str(config), name="run", timings=None))
    return world.board(memory_mib=MEMORY_MIB, model=model, data=data, check_rounds=check_rounds)


def accept(world, board):
    """Waits until the board has enrolled, accepts it, and returns how long that took."""
    start = time.monotonic()
    while not any(device["device_id"] == "board-1" for device in world.operator.get("devices")):
        assert time.monotonic() < start + ROUND_SECONDS, board.said()[-3000:]
        time.sleep(1)
    world.operator.post("devices/board-1/accept")
    return time.monotonic() - start


def wait_until_at_work(world, board, started):
    """Waits until the board was heard of since a moment and has a task in hand."""
    limit = time.monotonic() + ROUND_SECONDS
    while True:
        device = world.operator.get("devices/board-1")
        if device["task"] is not None and device["last_seen_seconds"] < time.monotonic() - started:
            return
        assert world.operator.get("runs/run")["status"] == "running"
        assert time.monotonic() < limit, board.said()[-3000:]
        time.sleep(0.2)


def wait_for_the_run(world, board, over):
    """Waits until a run's state is such, and returns how long that took."""
    start = time.monotonic()
    while not over(world.operator.get("runs/run")):
        assert time.monotonic() < start + ROUND_SECONDS, board.said()[-3000:]
        time.sleep(0.2)
    return time.monotonic() - start


def merged(world):
    """Returns whose updates each closed round merged."""
    closed = [event["detail"] for event in world.operator.get("events?after=0") if event["kind"] == "round_closed"]
    return [detail["merged"] for detail in closed]


def assert_trained(world, first):
    """The run is over, every round merged the board's update, the adapter changed and the loss fell."""
    limit = time.monotonic() + 60
    while (run := world.operator.get("runs/run"))["status"] != "finished":
        assert time.monotonic() < limit, run
        time.sleep(0.5)
    history = world.operator.get("runs/run/history")
    losses = [(record["loss_before"], record["loss_after"]) for record in history]
    sys.stdout.write(f"losses {losses}, adapter {first[:12]} -> {run['adapter_sha256'][:12]}\n")
    assert merged(world) == [["board-1"]] * ROUNDS
    assert run["adapter_sha256"] != first
    assert losses[-1][1] < losses[0][0]


def assert_sound(board):
    report = board.report()
    sys.stdout.write(f"{json.dumps(report, indent=1)[:1500]}\n")
    assert report["failed_units"] == []
    assert report["agent_rss_mib"] <= 60
    assert set(report["imports"].values()) == {"ok"}
    assert set(report["imports"]) >= COMPILED
    return report


def test_a_full_image_takes_part_in_rounds_that_change_the_servers_adapter_and_lower_the_loss(world, tmp_path):
    board = tuning_board(world, tmp_path, check_rounds=ROUNDS)
    board.try_out_at_start()
    first = world.operator.get("runs/run")["adapter_sha256"]
    start = time.monotonic()
    board.start()
    sys.stdout.write(f"\nenrolled after {accept(world, board):.0f} s\n")
    board.wait_for_power_off(ROUND_SECONDS)
    sys.stdout.write(f"over after {time.monotonic() - start:.0f} s\n")
    assert assert_sound(board)["tasks_done"] >= ROUNDS
    assert_trained(world, first)


def test_a_board_whose_power_is_cut_during_rounds_does_them_all_the_same(world, tmp_path):
    board = tuning_board(world, tmp_path, check_rounds=0)
    first, chance, cuts = world.operator.get("runs/run")["adapter_sha256"], random.Random(SEED + 2), []
    started = time.monotonic()
    board.start()
    accept(world, board)
    wait_until_at_work(world, board, started)
    seconds = wait_for_the_run(world, board, lambda run: run["round_index"] > 0)
    assert merged(world) == [["board-1"]]
    while len(cuts) < ROUND_CUTS:
        wait_until_at_work(world, board, started)
        moment = chance.uniform(0, seconds)
        time.sleep(moment)
        task = world.operator.get("devices/board-1")["task"]
        assert board.cut_power()
        if task is not None:
            cuts.append(f"{moment:.1f} s into round {task['round_index']}")
        started = time.monotonic()
        board.start()
    sys.stdout.write(f"\nseed {SEED}: a round took {seconds:.1f} s; cut {', '.join(cuts)}\n")
    wait_for_the_run(world, board, lambda run: run["status"] == "finished")
    assert_trained(world, first)
    board.cut_power()
    board.try_out_at_start()
    board.start()
    board.wait_for_power_off(ROUND_SECONDS)
    assert_sound(board)
    identity = json.loads(board.kept("fedspine/identity.json"))
    assert (identity["device_id"], identity["enrolled"]) == ("board-1", True)
    assert [device["device_id"] for device in world.operator.get("devices")] == ["board-1"]
