"""The `agent` image: started in an emulated machine against the real server on this one. `make test-images`."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from export_models import PER_LAYER, save_decoder

from fedspine_edge.agent.running_release import running_release
from fedspine_edge.appliance import runtimes, updates
from fedspine_edge.commands.image import default_key
from fedspine_edge.images import manifest, root_tree, update

pytestmark = pytest.mark.images

MB = 1_000_000
BOOT_SECONDS, UPDATE_SECONDS = 420.0, 900.0


@pytest.fixture
def gguf(tmp_path) -> Path:
    """A pruned model, each layer of another width, as our own exporter writes it."""
    rows = [json.dumps({"text": f"how far is it {i} ?", "label": "number" if i % 2 else "human"}) for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    folder = save_decoder(tmp_path / "model", "llama", PER_LAYER)
    program = [sys.executable, "-c", "from fedspine_edge.cli import main; main()"]
    out = tmp_path / "gguf"
    options = ["--quant", "F16", "--out", str(out), "--data", str(tmp_path / "rows.jsonl"), "--quiet"]
    subprocess.run([*program, "export", "gguf", str(folder), *options], check=True, capture_output=True)
    return next(out.glob("*.gguf"))


def powered_off(board, seconds=BOOT_SECONDS):
    """Starts a board, waits until it has switched itself off, and returns what its try-out found."""
    start = time.monotonic()
    board.start()
    board.wait_for_power_off(seconds)
    report = board.report()
    sys.stdout.write(f"\n{time.monotonic() - start:.0f} s\n{json.dumps(report, indent=1)[:1200]}\n")
    assert report["failed_units"] == []
    return report


def shown_release(world):
    """Returns the release and the slot that the server knows of the board."""
    facts = world.operator.get("devices/board-1")["facts"]
    return facts["image_release"], facts["image_slot"]


def test_the_packed_image_is_small(image):
    assert Path(f"{image}.zst").stat().st_size <= 120 * MB


def test_a_release_of_the_image_is_unpacked_as_the_runtime_of_a_jetson(image, tmp_path):
    said = json.loads((image.parent / "manifest.json").read_text())
    facts = {"board": said["board"], "variant": said["variant"], "release": said["source_date_epoch"]}
    root_tree.add_facts(tmp_path / "own", facts, manifest.public_key(default_key()))
    offered = update.make(image, tmp_path / "offer", default_key(), release=facts["release"] + 100)
    found = runtimes.unpack(tmp_path / "offer", own=tmp_path / "own" / updates.OWN_FOLDER.relative_to("/"))
    assert found == offered["release"]
    tree = tmp_path / "offer" / runtimes.TREE
    assert running_release(tree) == {"image_release": found}
    assert (tree / root_tree.SITE / "fedspine_edge/appliance/runtimes.py").is_file()
    assert (tree / "usr/bin/unsquashfs").is_file()
    assert (tree / root_tree.RUNTIME / "bin/python").readlink() == Path("/usr/bin/python3.11")


def test_a_started_image_enrols_runs_a_pruned_model_updates_itself_and_powers_off(world, image, gguf):
    board = world.board(check_model=gguf)
    board.try_out_at_start()
    report = powered_off(board)
    device = world.operator.get("devices/board-1")
    assert device["status"] == "pending"
    assert device["facts"]["machine"] == "aarch64"
    assert shown_release(world) == (report["release"], "a")
    assert report["slot"] == "a"
    assert report["agent_rss_mib"] <= 60
    assert set(report["imports"].values()) == {"ok"}
    assert {"fedspine_edge", "llama_cpp", "numpy", "psutil", "zstandard"} <= set(report["imports"])
    assert isinstance(report["profile"], list | dict), report["profile"]
    # Blessed, and the other slot filled with a lower version and tries of its own.
    assert board.boot_entries() == ["slot-a.conf", "slot-b+3.conf"]
    assert "power down" in board.said().lower()
    identity = board.kept("fedspine/identity.json")
    assert json.loads(identity)["device_id"] == "board-1"

    offered = update.make(image, world.updates, default_key(), release=report["release"] + 100)
    board.try_out_at_start(update=True)
    report = powered_off(board, UPDATE_SECONDS)
    assert (report["slot"], report["release"]) == ("b", offered["release"])
    assert board.boot_entries() == ["slot-a.conf", "slot-b.conf"]
    assert board.kept("fedspine/identity.json") == identity
    assert [device["device_id"] for device in world.operator.get("devices")] == ["board-1"]
    assert shown_release(world) == (offered["release"], "b")
