"""A profile of SmolLM2-135M as it comes from the package, held against what the kernel shows from outside.

Apart from the others, for it runs a real model: `make test-profile`. How fast it is, nothing here asks.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from fedspine_edge.base_model import base_facts
from fedspine_edge.config import cache_directory
from fedspine_edge.sources import model_directory

pytestmark = pytest.mark.matrix

PROGRAM = [sys.executable, "-c", "from fedspine_edge.cli import main; main()"]


class OutsidePss(threading.Thread):
    """The highest PSS of a program's children, read from outside a hundred times a second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid, self.peak, self.over = pid, 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.01):
            with contextlib.suppress(psutil.Error, OSError, ValueError, IndexError):
                for process in psutil.Process(self._pid).children(recursive=True):
                    text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                    self.peak = max(self.peak, 1024 * int(text.split("\nPss:")[1].split()[0]))


@pytest.fixture(scope="module")
def profile() -> tuple[list[dict[str, object]], int]:
    """The rows of a profile, and the highest PSS meanwhile."""
    file = base_facts(model_directory("smollm2-135m", cache_directory()))["tokenizer_gguf"]
    tests = ["-p", "128", "-n", "16", "-r", "2", "-t", "2", "-o", "json", "--quiet"]
    process = subprocess.Popen([*PROGRAM, "profile", str(file), *tests], stdout=subprocess.PIPE, text=True)
    outside = OutsidePss(process.pid)
    outside.start()
    output, _ = process.communicate()
    outside.over.set()
    outside.join()
    assert process.returncode == 0
    return json.loads(output), outside.peak


def test_the_peak_pss_is_what_is_seen_from_outside(profile: tuple[list[dict[str, object]], int]) -> None:
    rows, outside = profile
    reported = max(int(str(row["pss_peak_bytes"])) for row in rows)
    print(f"peak PSS: reported {reported / 2**20:.1f} MiB, from outside {outside / 2**20:.1f} MiB")  # noqa: T201
    assert reported == pytest.approx(outside, rel=0.02)


def test_every_figure_is_there_or_said_to_be_missing(profile: tuple[list[dict[str, object]], int]) -> None:
    rows, _ = profile
    assert [row["test"] for row in rows] == ["pp128", "tg16"]
    for row in rows:
        assert float(str(row["avg_ts"])) > 0
        assert row["energy_source"] == "none" or float(str(row["energy_j"])) > 0
        if row["energy_source"] == "none":
            assert row["energy_j"] is None
            assert row["power_avg_w"] is None
