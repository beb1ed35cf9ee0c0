"""Files cut short and disks that are full, on both sides, under real processes."""

import json

import pytest
from fault_fleet import AGENT, SERVER, WORKER, fault

pytestmark = pytest.mark.faults
JOURNAL = "fedspine_edge.agent.journal:Journal."
BOTH = ["device-00", "device-01"]


def test_what_a_power_cut_left_half_written_is_fetched_made_or_sent_again(make_fleet, undisturbed):
    device = [
        fault(AGENT, JOURNAL + "begin", cuts="device-00/task.json"),
        fault(AGENT, "fedspine_edge.agent.link:Link.download", cuts="device-00/inbox/*"),
        fault(AGENT, JOURNAL + "finish", cuts="device-00/outbox/result.json"),
        fault(AGENT, JOURNAL + "finish", cuts="device-00/outbox/update.zst"),
        fault(AGENT, "fedspine_edge.agent.link:Link._put", cuts="server/uploads/*/0*"),
    ]
    server = [fault(SERVER, "fedspine_server.link.blobs:BlobStore.put_chunk", cuts="server/uploads/*/0*")]
    fleet = make_fleet({"device-00": device, "server": server})
    fleet.start_run(undisturbed / "rounds.jsonl")
    run = fleet.finish()
    fleet.devices["device-00"].assert_all_struck()
    fleet.server.assert_all_struck()
    assert fleet.merged() == [BOTH] * run["rounds"]
    assert run["adapter_sha256"] == json.loads((undisturbed / "summary.json").read_text())["adapter_sha256"]
    # Only the lost task.json costs a new attempt; a damaged upload is sent again, not made again.
    assert [event["device_id"] for event in fleet.events("task_again")] == ["device-00"]
    assert "skipped damaged file=task.json" in fleet.devices["device-00"].log.read_text()


def test_a_full_disk_of_a_device_costs_its_task_and_says_so(make_fleet):
    plan = [
        fault(AGENT, "os:fsync", "before", does="fill the disk", times=2),
        fault(AGENT, "fedspine_edge.agent.link:Link.download", does="nothing"),
        fault(AGENT, "os:fsync", "before", does="fill the disk", times=2),
        fault(WORKER, "os:fsync", "before", does="fill the disk"),
        fault(WORKER, "fedspine_edge.checkpoint:load_device_state", "before", does="nothing",
              cuts="device-00/states/*/*"),
    ]  # fmt: skip
    fleet = make_fleet({"device-00": plan})
    fleet.start_run()
    fleet.finish()
    fleet.devices["device-00"].assert_all_struck()
    told = [found["device-00"] for found in fleet.missing() if "device-00" in found]
    assert len(told) == 3, told
    assert all("No space left on device" in reason for reason in told)
    assert fleet.merged()[-1] == BOTH
    assert all("device-01" in merged for merged in fleet.merged())
    assert fleet.devices["device-00"].exits == []


def test_a_full_disk_of_the_server_costs_time_and_nothing_else(make_fleet, undisturbed):
    plan = [
        fault(SERVER, "fedspine_server.link.rounds:_open", does="nothing", times=3),
        fault(SERVER, "os:fsync", "before", does="fill the disk", times=8),
        fault(SERVER, "fedspine_server.link.tasks:_hand_out", does="nothing"),
        fault(SERVER, "os:fsync", "before", does="fill the disk", times=2),
    ]
    fleet = make_fleet({"server": plan})
    fleet.start_run(undisturbed / "rounds.jsonl")
    run = fleet.finish()
    fleet.server.assert_all_struck()
    assert fleet.merged() == [BOTH] * run["rounds"]
    assert run["adapter_sha256"] == json.loads((undisturbed / "summary.json").read_text())["adapter_sha256"]
    assert "server answered 507" in "".join(device.log.read_text() for device in fleet.devices.values())
    assert fleet.server.exits == []


def test_a_server_that_cannot_go_on_ends_and_is_started_anew(make_fleet, undisturbed):
    fleet = make_fleet({"server": [fault(SERVER, "fedspine_server.coordinator:close_round", does="raise")]})
    fleet.start_run(undisturbed / "rounds.jsonl")
    run = fleet.finish()
    fleet.server.assert_all_struck()
    assert fleet.merged() == [BOTH] * run["rounds"]
    assert len(fleet.server.exits) == 1
    assert "nobody foresaw this" in fleet.server.log.read_text()
