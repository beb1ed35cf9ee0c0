"""Flower's own programs as our commands start them, with a program in their place that says what it was told."""

import json
import os
import subprocess
import sys

import pytest
from flower_fleet import PROGRAM

ECHO = """#!{python}
import json, os, sys
print(json.dumps([sys.argv[1:], {{name: os.environ.get(name) for name in {names}}}]))
"""
SILENT = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
pytestmark = pytest.mark.slow  # each starts a program


@pytest.fixture
def started(tmp_path):
    for name in ("flower-superlink", "flower-supernode", "flwr"):
        (tmp_path / name).write_text(ECHO.format(python=sys.executable, names=list(SILENT)))
        (tmp_path / name).chmod(0o755)

    def start(*arguments, status=0, path=str(tmp_path), **environment):
        known = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
        done = subprocess.run(
            [*PROGRAM, "flower", *map(str, arguments)], env={**known, "PATH": path, **environment},
            cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        return json.loads(done.stdout) if status == 0 else done.stderr

    return start


def test_superlink_is_silent_and_installs_nothing(started):
    arguments, environment = started("superlink", "--insecure", "--port", 8000)
    assert arguments == ["--disable-runtime-dependency-installation", "--insecure", "--port", "8000"]
    assert environment == SILENT


def test_a_supernode_is_silent_and_knows_its_agent(started, tmp_path):
    arguments, environment = started("supernode", "board", "--superlink", "server:8000", "--insecure")
    node = f'agent="{tmp_path / "board" / "agent.sock"}"'
    assert arguments == ["--node-config", node, "--superlink", "server:8000", "--insecure"]
    assert environment == SILENT


def test_a_run_is_begun_silently_with_whole_paths(started, tmp_path):
    arguments, environment = started("run", "app", "lan", "--request", "r.json", "--directory", "d", "--stream")
    settings = f'request="{tmp_path / "r.json"}" directory="{tmp_path / "d"}"'
    assert arguments == ["run", "app", "lan", "--run-config", settings, "--stream"]
    assert environment == SILENT


def test_who_wants_flowers_telemetry_can_have_it(started):
    assert started("superlink", FLWR_TELEMETRY_ENABLED="1")[1]["FLWR_TELEMETRY_ENABLED"] == "1"


def test_without_flower_the_remedy_is_named(started):
    said = started("superlink", status=2, path="/nowhere")
    assert "expected Flower's flower-superlink, found none" in said
    assert "fedspine-edge[flower]" in said
