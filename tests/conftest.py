"""What the marks `flower` and `ray` mean: without their extras those tests are deselected, never counted as passed."""

import importlib.util
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def flower_programs() -> Path:
    """The folder of Flower's programs: those of .venv-engines, or of the environment that FEDSPINE_FLOWER names."""
    return Path(os.environ.get("FEDSPINE_FLOWER", ROOT / ".venv-engines")).resolve() / "bin"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing = set()
    if not (flower_programs() / "flower-superlink").is_file():
        missing.add("flower")
    if importlib.util.find_spec("ray") is None:
        missing.add("ray")
    left_out = [item for item in items if missing & {mark.name for mark in item.iter_markers()}]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def flower_bin() -> Path:
    return flower_programs()
