"""Real SuperLink, three real SuperNodes, real training of a tiny model: the simulator's rounds, carried by Flower.

Nothing here depends on how fast anything is: boards hang and go on when a test says so, and a round cannot close
without a board while another one hangs, as its quorum is two of three.
"""

import json
import os
import subprocess

import pytest
from flower_fleet import PROGRAM, FlowerFleet
from test_link_end_to_end import TOML
from tiny import questions

from fedspine_server import store

pytestmark = [pytest.mark.flower, pytest.mark.slow]
UNEQUAL = """
controller = "sucb"
mask_agreement = 0.0
warmup_fraction = 0.0
cooldown_fraction = 0.0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("f")
    (found / "rows.jsonl").write_text(
        "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in questions())
    )
    return found


@pytest.fixture(scope="module")
def unequal_toml(folder, tiny_models):
    text = TOML.replace("ranks = [2, 4]", "ranks = [2, 4, 8]" + UNEQUAL)
    (folder / "unequal.toml").write_text(
        f"seed = 8\n{text.format(model=tiny_models['bert'], data=folder / 'rows.jsonl')}"
    )
    return folder / "unequal.toml"


@pytest.fixture(scope="module")
def four_rounds_toml(folder, tiny_models):
    text = TOML.replace("rounds = 3", "rounds = 4") + "round_timeout_seconds = 600\n"
    (folder / "four.toml").write_text(text.format(model=tiny_models["bert"], data=folder / "rows.jsonl"))
    return folder / "four.toml"


@pytest.fixture(scope="module")
def simulated(unequal_toml):
    out = unequal_toml.parent / "sim"
    subprocess.run(
        [*PROGRAM, "simulate", str(unequal_toml), "--out", str(out), "--json", "--workers", "1"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=True, timeout=400,
    )  # fmt: skip
    return out


@pytest.fixture
def make_fleet(tmp_path, flower_bin):
    fleets = []

    def make(toml, **options):
        fleets.append(FlowerFleet(tmp_path / "fleet", flower_bin, toml, **options))
        fleets[-1].start()
        return fleets[-1]

    yield make
    for fleet in fleets:
        fleet.stop()


def states_of(record):
    return {device["device_id"]: device["state"] for device in record["devices"]}


def test_unequal_ranks_and_masks_end_in_the_simulators_adapter_though_superlink_is_killed(
    unequal_toml, simulated, make_fleet
):
    fleet = make_fleet(unequal_toml, secure=True)
    fleet.start_stranger()
    fleet.begin(timings=simulated / "rounds.jsonl")
    fleet.await_rounds(1)
    fleet.kill("superlink")
    fleet.start_superlink()
    fleet.begin()
    summary = fleet.summary(tick=fleet.restart_ended_nodes)
    assert summary["adapter_sha256"] == json.loads((simulated / "summary.json").read_text())["adapter_sha256"]
    rounds = fleet.rounds()
    assert [states_of(record) for record in rounds] == [dict.fromkeys(states_of(rounds[0]), "merged")] * 3
    assert len({device["rank"] for device in rounds[1]["devices"]}) > 1
    after_two = store.from_bytes((fleet.run_directory / "state" / "round-000002.safetensors").read_bytes())
    masks = {tuple(device.kept["layers.0.ffn"].tolist()) for device in after_two.devices.values()}
    assert len(masks) == 3
    assert "Failed to activate SuperNode" in fleet.await_end_of("node-stranger")


def test_a_late_node_is_merged_later_and_a_killed_one_comes_back(four_rounds_toml, make_fleet):
    fleet = make_fleet(four_rounds_toml)
    first, second, third = "device-00", "device-01", "device-02"
    fleet.begin()

    fleet.await_task(third, 0, finished=True)
    fleet.freeze(third)  # before its task of round 1, for which round 0 must close
    fleet.await_task(second, 1, finished=True)
    fleet.freeze(second)  # so that round 2 cannot close for now
    assert states_of(fleet.await_rounds(2)[1]) == {first: "merged", second: "merged", third: "dropped"}

    fleet.thaw(third)
    fleet.await_task(third, 1, finished=True)
    fleet.freeze(third)
    fleet.await_task(third, 2, finished=False)  # a SuperNode fetches it once it has sent the answer to round 1
    # Neither SuperLink and its ServerApp nor a SuperNode and its ClientApp tell Flower's makers what they do.
    silent = [
        one.get("FLWR_TELEMETRY_ENABLED") for name in ("superlink", f"node-{third}") for one in fleet.environments(name)
    ]
    assert len(silent) >= 4
    assert set(silent) == {"0"}
    fleet.kill(f"node-{third}")
    fleet.thaw(second)
    fleet.await_task(second, 2, finished=True)
    fleet.freeze(second)  # so that round 3 cannot close without the third
    killed = fleet.await_rounds(3)[2]
    assert states_of(killed) == {first: "merged", second: "merged", third: "dropped"}
    (late,) = killed["late"]
    assert (late["device_id"], late["round_index"], late["staleness"], late["state"]) == (third, 1, 1, "merged")
    assert late["weight"] == pytest.approx(2**-0.5)

    fleet.thaw(third)
    fleet.start_node(third)
    assert fleet.summary()["rounds"] == 4
    assert states_of(fleet.rounds()[3]) == {first: "merged", second: "dropped", third: "merged"}
