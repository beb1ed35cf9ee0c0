"""`kill -9` of every process at every event of a round: the adapter is the undisturbed fleet's, to the bit."""

import json

import pytest
from fault_fleet import AGENT, SERVER, WORKER, fault

pytestmark = pytest.mark.faults
JOURNAL, LINK = "fedspine_edge.agent.journal:Journal.", "fedspine_edge.agent.link:Link."
ROUNDS = "fedspine_server.link.rounds:"

AGENT_EVENTS = [
    fault(AGENT, LINK + "hello"),
    fault(AGENT, LINK + "task"),
    fault(AGENT, JOURNAL + "begin"),
    fault(AGENT, LINK + "download"),
    fault(AGENT, "fedspine_edge.agent.worker_process:WorkerProcess.start"),
    fault(AGENT, LINK + "progress"),
    fault(AGENT, JOURNAL + "finish", "before"),
    fault(AGENT, JOURNAL + "finish"),
    fault(AGENT, LINK + "_put"),
    fault(AGENT, LINK + "result", "before"),
    fault(AGENT, LINK + "result"),
    fault(AGENT, JOURNAL + "clear"),
]
SERVER_EVENTS = [
    fault(SERVER, "fedspine_server.coordinator:assign"),
    fault(SERVER, "fedspine_server.link.hub:Hub.keep_state"),
    fault(SERVER, ROUNDS + "_open"),
    fault(SERVER, "fedspine_server.link.tasks:_hand_out"),
    fault(SERVER, "fedspine_server.link.tasks:lease"),
    fault(SERVER, "fedspine_server.link.blobs:BlobStore.put_chunk"),
    fault(SERVER, "fedspine_server.link.blobs:BlobStore.finish_upload"),
    fault(SERVER, "fedspine_server.link.tasks:_decide"),
    fault(SERVER, "fedspine_server.link.tasks:result"),
    fault(SERVER, ROUNDS + "_end"),
    fault(SERVER, ROUNDS + "device_results", "before"),
    fault(SERVER, "fedspine_server.coordinator:close_round"),
    fault(SERVER, ROUNDS + "_keep", "before"),
    fault(SERVER, ROUNDS + "_record_round"),
    fault(SERVER, ROUNDS + "_keep"),
]
WORKER_EVENTS = [
    fault(WORKER, "fedspine_edge.base_model:open_base"),
    fault(WORKER, "fedspine_edge.wire_format:unpack"),
    fault(WORKER, "fedspine_edge.device:tune", "before"),
    fault(WORKER, "fedspine_edge.device:tune"),
    fault(WORKER, "fedspine_edge.checkpoint:save_device_state", "before"),
    fault(WORKER, "fedspine_edge.checkpoint:save_device_state"),
    fault(WORKER, "fedspine_edge.wire_format:pack"),
    fault(WORKER, "os:fsync"),
]


@pytest.mark.parametrize(
    ("process", "plan"), [("device-00", AGENT_EVENTS), ("server", SERVER_EVENTS)], ids=["agent", "server"]
)
def test_killed_at_every_event_of_a_round_it_counts_everybody_once(make_fleet, undisturbed, process, plan):
    fleet = make_fleet({process: plan})
    fleet.start_run(undisturbed / "rounds.jsonl")
    run = fleet.finish(200)
    killed = fleet.server if process == "server" else fleet.devices[process]
    killed.assert_all_struck()
    assert killed.exits.count(-9) == len(plan)
    assert fleet.merged() == [["device-00", "device-01"]] * run["rounds"]
    assert run["adapter_sha256"] == json.loads((undisturbed / "summary.json").read_text())["adapter_sha256"]
    if process == "device-00":
        # Once it died before it had said hello.
        boots = [event for event in fleet.events("device_took_over") if event["device_id"] == process]
        assert len(boots) == len(plan) - 1


def test_killed_around_a_result_that_carries_its_update_it_counts_everybody_once(make_fleet, undisturbed, monkeypatch):
    monkeypatch.setenv("FEDSPINE_INLINE_BYTES", str(40 << 10))
    plans = {
        "server": [
            fault(SERVER, "fedspine_server.link.tasks:_hand_out"),
            fault(SERVER, "fedspine_server.link.tasks:_decide", "before"),
            fault(SERVER, "fedspine_server.link.tasks:_decide"),
            fault(SERVER, "fedspine_server.link.tasks:result"),
        ],
        "device-00": [
            fault(AGENT, LINK + "result", "before"),
            fault(AGENT, LINK + "result"),
            fault(AGENT, LINK + "_put", "before", does="be counted"),
        ],
    }
    fleet = make_fleet(plans)
    fleet.start_run(undisturbed / "rounds.jsonl")
    run = fleet.finish(200)
    fleet.server.assert_all_struck()
    assert fleet.devices["device-00"].struck == [1, 1, 0], "expected two deaths and no upload"
    assert fleet.merged() == [["device-00", "device-01"]] * run["rounds"]
    assert run["adapter_sha256"] == json.loads((undisturbed / "summary.json").read_text())["adapter_sha256"]


def test_a_worker_killed_at_every_event_costs_its_task_and_no_more(make_fleet):
    fleet = make_fleet({"device-00": WORKER_EVENTS})
    fleet.start_run()
    fleet.finish()
    fleet.devices["device-00"].assert_all_struck()
    # One worker died before its agent had said hello, every other one in a round.
    told = [found["device-00"] for found in fleet.missing() if "device-00" in found]
    assert len(told) == len(WORKER_EVENTS) - 1
    assert all("the worker was killed" in reason for reason in told)
    assert all(merged.count("device-01") == 1 and len(set(merged)) == len(merged) for merged in fleet.merged())
    assert fleet.merged()[-1] == ["device-00", "device-01"]
    assert -9 not in fleet.devices["device-00"].exits
