"""Fixtures shared by the tests of the device package."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import CONFIGS, save_tiny_model


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tests share the machine; torch's spinning threads would slow each other down tenfold."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model directory of each family."""
    folder = tmp_path_factory.mktemp("tiny")
    return {family: save_tiny_model(folder / family, family) for family in CONFIGS}
