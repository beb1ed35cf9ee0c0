"""What the world does to a fleet: doubled identities, revocation, a server that is away, clocks wrong by years."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fault_fleet import AGENT, WORKER, Watched, fault

pytestmark = pytest.mark.faults
BOTH = ["device-00", "device-01"]
DISMISSED = 7
HELD = [fault(WORKER, "fedspine_edge.device:tune", "before", does="hold")]
YEAR = 365 * 24 * 3600


def adapter_of(undisturbed):
    return json.loads((undisturbed / "summary.json").read_text())["adapter_sha256"]


def test_of_two_agents_with_one_identity_the_older_stops_for_good(make_fleet, undisturbed, tmp_path):
    fleet = make_fleet({"device-00": HELD})
    fleet.start_run(undisturbed / "rounds.jsonl")
    first = fleet.devices["device-00"]
    fleet.until(lambda: first.struck == [1])
    shutil.copytree(fleet.state("device-00"), tmp_path / "copy")
    second = fleet.devices["copy"] = Watched(tmp_path, "second", ["-m", AGENT, str(tmp_path / "copy")], ())
    second.start()
    fleet.until(lambda: first.gone)
    assert first.exits == [DISMISSED]
    assert "another agent of device device-00 has taken over" in first.log.read_text()
    run = fleet.finish()
    assert fleet.merged() == [BOTH] * run["rounds"]
    assert run["adapter_sha256"] == adapter_of(undisturbed)
    assert [event["device_id"] for event in fleet.events("device_took_over")] == ["device-00"]
    assert second.exits == []


def test_a_device_revoked_in_mid_round_stops_for_good_and_the_run_ends_without_it(make_fleet):
    fleet = make_fleet({"device-00": HELD})
    fleet.until(lambda: len(fleet.events("device_joined")) == len(BOTH))
    fleet.start_run(min_devices=1)
    revoked = fleet.devices["device-00"]
    fleet.until(lambda: revoked.struck == [1])
    fleet.operator.post("devices/device-00/revoke")
    (revoked.faults / "let-go").touch()
    fleet.until(lambda: revoked.gone)
    run = fleet.finish()
    assert revoked.exits == [DISMISSED]
    assert fleet.merged() == [["device-01"]] * run["rounds"]
    assert [event["device_id"] for event in fleet.events("device_revoked")] == ["device-00"]


def test_work_goes_on_while_the_server_is_away_and_is_delivered_once_when_it_is_back(make_fleet, undisturbed):
    fleet = make_fleet({"device-00": HELD})
    fleet.start_run(undisturbed / "rounds.jsonl")
    device = fleet.devices["device-00"]
    fleet.until(lambda: device.struck == [1])
    fleet.server.stop()
    (device.faults / "let-go").touch()
    fleet.until(lambda: (fleet.state("device-00") / "outbox" / "result.json").exists())
    fleet.until(lambda: all(log.log.read_text().count("server unreachable") >= 2 for log in fleet.devices.values()))
    fleet.server.start()
    run = fleet.finish()
    assert fleet.merged() == [BOTH] * run["rounds"]
    assert run["adapter_sha256"] == adapter_of(undisturbed)
    assert fleet.events("task_again") == []


@pytest.fixture(scope="session")
def other_clock(tmp_path_factory):
    library = tmp_path_factory.mktemp("clock") / "other_clock.so"
    source = Path(__file__).parent / "faults" / "other_clock.c"
    subprocess.run(["g++", "-x", "c", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return lambda years: {"LD_PRELOAD": str(library), "OTHER_CLOCK_SECONDS": str(round(years * YEAR))}


def test_clocks_wrong_by_years_change_nothing(make_fleet, undisturbed, other_clock):
    probe = [sys.executable, "-c", "import time; print(time.gmtime().tm_year)"]
    shown = subprocess.run(probe, env=other_clock(-40), capture_output=True, text=True, check=True)
    assert int(shown.stdout) < 2000
    fleet = make_fleet({"device-00": HELD}, clocks={"device-00": other_clock(-40), "device-01": other_clock(70)})
    fleet.start_run(undisturbed / "rounds.jsonl")
    device = fleet.devices["device-00"]
    fleet.until(lambda: device.struck == [1])
    fleet.until(lambda: fleet.events("result_kept"))
    # In mid-round, with one answer there, the server comes back from a power cut without a clock.
    fleet.server.stop()
    fleet.server.environment = other_clock(-50)
    fleet.server.start()
    (device.faults / "let-go").touch()
    run = fleet.finish()
    assert fleet.merged() == [BOTH] * run["rounds"]
    assert run["adapter_sha256"] == adapter_of(undisturbed)
