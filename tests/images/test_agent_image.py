"""The `agent` image: started in an emulated machine against the real server on this one. `make test-images`."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from export_models import PER_LAYER, save_decoder
from machine import SERVER_ADDRESS, SERVER_PORT, Machine

from fedspine_edge.agent.identity import split_token
from fedspine_edge.agent.link import UnreachableError, fetch_ca
from fedspine_edge.commands import serve
from fedspine_edge.commands.operate import OPERATOR_FILE, Operator
from fedspine_edge.images.provision import Belonging, provision

pytestmark = pytest.mark.images

FOLDER = Path(os.environ.get("FEDSPINE_IMAGE_FOLDER", "dist/images/generic-arm64-agent"))
MB = 1_000_000
BOOT_SECONDS = 420.0


@pytest.fixture(scope="module")
def image() -> Path:
    return next(FOLDER.glob("*.img"))


@pytest.fixture
def server(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = serve.ServerSettings(f"https://127.0.0.1:{port}", "127.0.0.1", port)
    told = serve.init(tmp_path / "server", settings, [SERVER_ADDRESS, "127.0.0.1"], claim_hours=1)
    command = [sys.executable, "-m", "fedspine_edge.commands.serve", str(tmp_path / "server")]
    with (tmp_path / "server.log").open("wb") as log, subprocess.Popen(command, stderr=log) as process:
        limit = time.monotonic() + 60
        while True:
            try:
                fetch_ca(settings.url, split_token(told["token"])[1])
                break
            except UnreachableError:
                assert time.monotonic() < limit
                time.sleep(0.2)
        yield port, told["token"], Operator(tmp_path / "server" / OPERATOR_FILE)
        process.terminate()


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


def test_the_packed_image_is_small(image):
    assert Path(f"{image}.zst").stat().st_size <= 120 * MB


def test_a_started_image_enrols_is_heard_runs_a_pruned_model_and_powers_off(tmp_path, image, server, gguf):
    port, token, operator = server
    board = Machine(tmp_path / "board", image, port)
    told = Belonging(f"https://{SERVER_ADDRESS}:{SERVER_PORT}", token, name="board-1", check_model=gguf)
    provision(board.disk, told)
    board.try_out_at_start()
    start = time.monotonic()
    board.start()
    board.wait_for_power_off(BOOT_SECONDS)
    seconds = time.monotonic() - start
    report = json.loads(board.said().rpartition("FEDSPINE-CHECK ")[2].splitlines()[0])
    sys.stdout.write(f"\n{seconds:.0f} s\n{json.dumps(report, indent=1)[:3000]}\n")
    device = operator.get("devices/board-1")
    assert device["status"] == "pending"
    assert device["facts"]["machine"] == "aarch64"
    assert report["failed_units"] == []
    assert report["slot"] == "a"
    assert report["agent_rss_mib"] <= 60
    assert set(report["imports"].values()) == {"ok"}
    assert {"fedspine_edge._native", "llama_cpp", "numpy"} <= set(report["imports"])
    assert isinstance(report["profile"], list | dict), report["profile"]
    # Blessed, and the other slot filled with a lower version and tries of its own.
    assert board.boot_entries() == ["slot-a.conf", "slot-b+3.conf"]
    assert "powering off" in board.said().lower() or "power down" in board.said().lower()
