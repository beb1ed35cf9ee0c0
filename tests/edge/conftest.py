"""Fixtures shared by the tests of the device package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny import CONFIGS, questions, save_tiny_model

if TYPE_CHECKING:
    from fault_fleet import FaultFleet

FAULTY_TOML = """
model = "{model}"
data = "{data}"
held_out = 6
validation = 2
dense_reference = false

[run]
rounds = 10
steps_per_round = 4
prune_interval = 2
batch_size = 4
learning_rate = 5e-3
ranks = [2, 4]
target_sparsity = 0.5
min_quorum = 1.0

[fleet]
tx2 = 1
agx_xavier = 1

[link]
min_devices = 2
"""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tests share the machine; torch's spinning threads would slow each other down tenfold."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model directory of each family."""
    folder = tmp_path_factory.mktemp("tiny")
    return {family: save_tiny_model(folder / family, family) for family in CONFIGS}


@pytest.fixture(scope="session")
def faulty_toml(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    """Ten rounds of two devices."""
    folder = tmp_path_factory.mktemp("faulty")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in questions()))
    (folder / "mine.toml").write_text(FAULTY_TOML.format(model=tiny_models["bert"], data=data))
    return folder / "mine.toml"


@pytest.fixture(scope="session")
def undisturbed(faulty_toml: Path) -> Path:
    """The same rounds in the simulator: the adapter they must end with, and the seconds to be given to the server."""
    program = [sys.executable, "-c", "from fedspine_edge.cli import main; main()"]
    run_dir = faulty_toml.parent / "sim"
    subprocess.run(
        [*program, "simulate", str(faulty_toml), "--out", str(run_dir), "--json", "--workers", "1"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=True, timeout=200,
    )  # fmt: skip
    return run_dir


@pytest.fixture
def make_fleet(tmp_path: Path, faulty_toml: Path) -> Iterator[Callable[..., FaultFleet]]:
    """Starts a fleet with faults planned, and ends it."""
    from fault_fleet import FaultFleet  # the server's libraries are not for every test of the device

    fleets: list[FaultFleet] = []

    def make(plans: dict[str, Any], clocks: dict[str, dict[str, str]] | None = None) -> FaultFleet:
        fleets.append(FaultFleet(tmp_path, faulty_toml, plans, clocks or {}))
        return fleets[-1]

    yield make
    for fleet in fleets:
        fleet.stop()
