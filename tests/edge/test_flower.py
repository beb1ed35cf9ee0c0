"""Real SuperLink, three real SuperNodes, real training of a tiny model: the simulator's rounds, carried by Flower."""

import json
import os
import subprocess

import pytest
from flower_fleet import PROGRAM, FlowerFleet
from test_link_end_to_end import TOML
from tiny import questions

pytestmark = [pytest.mark.flower, pytest.mark.slow]


@pytest.fixture(scope="module")
def toml(tmp_path_factory, tiny_models):
    folder = tmp_path_factory.mktemp("f")
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in questions())
    )
    text = TOML.format(model=tiny_models["bert"], data=folder / "rows.jsonl")
    (folder / "mine.toml").write_text(text)
    return folder / "mine.toml"


@pytest.fixture(scope="module")
def simulated(toml):
    out = toml.parent / "sim"
    subprocess.run(
        [*PROGRAM, "simulate", str(toml), "--out", str(out), "--json", "--workers", "1"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=True, timeout=400,
    )  # fmt: skip
    return out


@pytest.fixture
def make_fleet(tmp_path, flower_bin):
    fleets = []

    def make(*arguments):
        fleets.append(FlowerFleet(tmp_path / "fleet", flower_bin, *arguments))
        fleets[-1].start()
        return fleets[-1]

    yield make
    for fleet in fleets:
        fleet.stop()


def states_of(record):
    return {device["device_id"]: device["state"] for device in record["devices"]}


def test_the_run_of_a_killed_superlink_goes_on_and_ends_in_the_simulators_adapter(toml, simulated, make_fleet):
    fleet = make_fleet(toml)
    fleet.begin(timings=simulated / "rounds.jsonl")
    fleet.await_rounds(1)
    fleet.kill("superlink")
    fleet.start_superlink()
    fleet.begin()
    summary = fleet.summary(tick=fleet.restart_ended_nodes)
    assert summary["adapter_sha256"] == json.loads((simulated / "summary.json").read_text())["adapter_sha256"]
    rounds = fleet.rounds()
    assert [states_of(record) for record in rounds] == [dict.fromkeys(states_of(rounds[0]), "merged")] * 3
    assert len({device["pruning_ratio"] for record in rounds for device in record["devices"]}) == 3
