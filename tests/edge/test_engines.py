"""The same run by four carriers in one sitting: one adapter, and what a round costs with each of them.

`make test-engines` prints the table, `make bench` writes it too (FEDSPINE_CARRIERS_JSON). Seconds a round are those
between two closings, the work of three devices on a tiny model included: it is the same everywhere, so the difference
to the rounds in process is what the carrier adds.
"""

import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from flower_fleet import PROGRAM, FlowerFleet
from test_link_end_to_end import TOML, fedspine, free_port
from tiny import questions

from fedspine_edge.hardware import this_machine

pytestmark = [pytest.mark.flower, pytest.mark.ray, pytest.mark.slow]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "NO_COLOR": "1"}
SECONDS = 200.0


@pytest.fixture(scope="module")
def toml(tmp_path_factory, tiny_models):
    folder = tmp_path_factory.mktemp("e")
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in questions())
    )
    (folder / "mine.toml").write_text(TOML.format(model=tiny_models["bert"], data=folder / "rows.jsonl"))
    return folder / "mine.toml"


def closings(count_of, done):
    """When each round closed, seen from outside."""
    found, limit = [], time.monotonic() + SECONDS
    while not done():
        found += [time.monotonic()] * (count_of() - len(found))
        assert time.monotonic() < limit, f"only {len(found)} rounds"
        time.sleep(0.01)
    return found + [time.monotonic()] * (count_of() - len(found))


def seconds_of(found):
    return [after - before for before, after in itertools.pairwise(found)]


def lines_of(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


def simulated(toml, out, *arguments):
    command = [*PROGRAM, "simulate", str(toml), "--out", str(out), "--json", "--workers", "3", *arguments]
    with (
        subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process,
    ):
        found = closings(lambda: lines_of(out / "rounds.jsonl"), lambda: lines_of(out / "rounds.jsonl") >= 3)
        summary = json.loads(process.communicate(timeout=SECONDS)[0])
    return summary["adapter_sha256"], seconds_of(found)


def over_https(toml, folder, timings):
    told = fedspine("fleet", "up", toml, "--dir", "fleet", "--port", free_port(), "--json", cwd=folder)
    operator = ("--operator", told["operator_file"], "--json")
    try:
        fedspine("runs", "start", toml, "--timings", timings, *operator, cwd=folder)
        limit = time.monotonic() + SECONDS
        while (run := fedspine("runs", "show", "mine", *operator, cwd=folder))["status"] != "finished":
            assert time.monotonic() < limit
    finally:
        fedspine("fleet", "down", "--dir", "fleet", "--json", cwd=folder)
    closed = sorted(event["at"] for event in run["events"] if event["kind"] == "round_closed")
    return run["adapter_sha256"], seconds_of(closed)


def over_flower(toml, folder, programs, timings):
    fleet = FlowerFleet(folder, programs, toml)
    try:
        fleet.start()
        fleet.begin(timings=timings)
        found = closings(
            lambda: lines_of(fleet.run_directory / "rounds.jsonl"), (fleet.run_directory / "summary.json").exists
        )
        return fleet.summary()["adapter_sha256"], seconds_of(found)
    finally:
        fleet.stop()


def test_four_carriers_make_one_adapter(toml, flower_bin, tmp_path):
    found = {"in process": simulated(toml, tmp_path / "sim")}
    found["Ray, one machine"] = simulated(toml, tmp_path / "ray", "--engine", "ray")
    found["HTTPS"] = over_https(toml, tmp_path, tmp_path / "sim" / "rounds.jsonl")
    found["Flower"] = over_flower(toml, tmp_path / "flower", flower_bin, tmp_path / "sim" / "rounds.jsonl")
    carriers = {
        name: {"seconds_a_round": statistics.median(rounds), "rounds": rounds, "adapter_sha256": sha256}
        for name, (sha256, rounds) in found.items()
    }
    least = carriers["in process"]["seconds_a_round"]
    lines = ["", "| carrier | seconds a round | more than in process | adapter |", "|---|---|---|---|"]
    for name, one in carriers.items():
        one["overhead_seconds"] = one["seconds_a_round"] - least
        row = (name, f"{one['seconds_a_round']:.2f}", f"{one['overhead_seconds']:+.2f}", one["adapter_sha256"][:12])
        lines.append(f"| {' | '.join(row)} |")
    sys.stdout.write("\n".join(lines) + "\n")
    if "FEDSPINE_CARRIERS_JSON" in os.environ:
        document = {"machine": dataclasses.asdict(this_machine()), "devices": 3, "carriers": carriers}
        Path(os.environ["FEDSPINE_CARRIERS_JSON"]).write_text(json.dumps(document, indent=1) + "\n")
    assert len({sha256 for sha256, _ in found.values()}) == 1
