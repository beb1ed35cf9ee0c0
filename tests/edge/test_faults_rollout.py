"""`kill -9` of agent, health check and server at every step of a rollout: what programs load is whole, always."""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time

import pytest
from export_models import DENSE, PER_LAYER, save_decoder
from fault_fleet import AGENT, SERVER, Watched, fault

from fedspine_edge.agent.enrolment import enrol
from fedspine_edge.agent.gguf_file import check_gguf
from fedspine_edge.agent.identity import split_token
from fedspine_edge.agent.link import UnreachableError, fetch_ca
from fedspine_edge.agent.settings import AgentSettings
from fedspine_edge.commands import rollout, serve
from fedspine_edge.commands.operate import OPERATOR_FILE, Operator
from fedspine_edge.errors import LinkError
from fedspine_edge.export.gguf import write_gguf

pytestmark = pytest.mark.faults
HEALTH = "fedspine_edge.agent.health"
WORK, MODELS, LINK = (f"fedspine_edge.agent.{name}" for name in ("rollout_work:", "models:Models.", "link:Link."))
ROLLOUTS, BLOBS = "fedspine_server.link.rollouts:", "fedspine_server.link.blobs:BlobStore."

AGENT_EVENTS = [
    fault(AGENT, MODELS + "keep_only"),
    fault(AGENT, WORK + "begun"),
    fault(AGENT, LINK + "rollout", "before"),
    fault(AGENT, LINK + "rollout"),
    fault(AGENT, LINK + "download", "before"),
    fault(AGENT, LINK + "_receive"),
    fault(AGENT, LINK + "download"),
    fault(AGENT, MODELS + "install"),
    fault(AGENT, WORK + "check_health", "before"),
    fault(AGENT, WORK + "unmet"),
    fault(AGENT, MODELS + "switch", "before"),
    fault(AGENT, MODELS + "switch"),
    fault(AGENT, WORK + "RolloutWork._tell_the_end", "before"),
    fault(AGENT, WORK + "RolloutWork._tell_the_end"),
]
RETURN_EVENTS = [
    fault(AGENT, MODELS + "switch", "before"),
    fault(AGENT, MODELS + "switch"),
    fault(AGENT, WORK + "RolloutWork._tell_the_end"),
]
SERVER_EVENTS = [
    fault(SERVER, BLOBS + "put_chunk"),
    fault(SERVER, BLOBS + "finish_upload"),
    fault(SERVER, "fedspine_server.link.models:add"),
    fault(SERVER, ROLLOUTS + "start"),
    fault(SERVER, ROLLOUTS + "order_for"),
    fault(SERVER, ROLLOUTS + "model_bytes_for"),
    fault(SERVER, ROLLOUTS + "report", "before"),
    fault(SERVER, ROLLOUTS + "report"),
    fault(SERVER, "fedspine_server.rollout:settled"),
    fault(SERVER, ROLLOUTS + "settle"),
]


class RolloutFleet:
    """A server and devices without a model of their own: they are there for rollouts alone."""

    def __init__(self, folder, ggufs, plans):
        self.folder, self.ggufs = folder, ggufs
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, directory = f"https://127.0.0.1:{port}", folder / "server"
        settings = serve.ServerSettings(self.url, "127.0.0.1", port)
        self.token = serve.init(directory, settings, ["127.0.0.1"], claim_hours=1)["token"]
        self.server = Watched(folder, "server", ["-m", SERVER, str(directory)], plans.get("server", ()))
        self.server.start()
        self.operator = Operator(directory / OPERATOR_FILE)
        self.patiently(lambda: fetch_ca(self.url, split_token(self.token)[1]))
        self.devices = {}
        for name in [f"device-{index:02d}" for index in range(2)]:
            (folder / name).mkdir()
            enrol(self.url, self.token, folder / name, AgentSettings("", "", threads=1), name=name)
            self.operator.post(f"devices/{name}/accept")
            watched = Watched(folder, name, ["-m", AGENT, str(folder / name)], plans.get(name, ()))
            self.devices[name] = watched
        self.unsound, self._over = [], threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()

    def start_devices(self):
        for watched in self.devices.values():
            watched.start()
        self.patiently(lambda: len(self.kinds("device_joined")) == len(self.devices))

    def _look(self):
        """What a program on each board would find, all the time: nothing, or a whole model."""
        while not self._over.wait(0.005):
            for name in self.devices:
                file = self.folder / name / "models" / "current" / "model.gguf"
                try:
                    check_gguf(file)
                except FileNotFoundError:
                    if (file.parents[1] / "current").is_symlink() and not file.exists():
                        self.unsound.append((name, "a link to nothing"))
                except LinkError as error:
                    self.unsound.append((name, str(error)))

    def patiently(self, action, seconds=240.0):
        limit = time.monotonic() + seconds
        while True:
            try:
                if found := action():
                    return found
            except UnreachableError:
                pass  # the server is just being killed
            assert time.monotonic() < limit, self.logs()
            time.sleep(0.05)

    def start(self, name, **more):
        request = {"gate": "", "num_canaries": 1, "replace": True, **more}
        return self.patiently(lambda: rollout.start(self.operator, str(self.ggufs[name]), request, lambda _: None))

    def status(self):
        return self.operator.get("rollouts")[0]

    def until(self, *statuses, **counts):
        def reached():
            found = self.status()
            return found if found["status"] in statuses and counts.items() <= found["counts"].items() else None

        return self.patiently(reached)

    def served(self, name):
        file = self.folder / name / "models" / "current" / "model.gguf"
        return file.read_bytes() if file.exists() else None

    def kinds(self, kind):
        found, after = [], 0
        for _ in itertools.count():
            page = self.operator.get(f"events?after={after}")
            if not page:
                return [event for event in found if event["kind"] == kind]
            found, after = found + page, page[-1]["event_id"]
        return None

    def logs(self):
        return "".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))

    def stop(self):
        self._over.set()
        self._watch.join()
        self.operator.close()
        for watched in (*self.devices.values(), self.server):
            watched.stop()
        assert self.unsound == []


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ggufs")
    return {
        name: write_gguf(
            save_decoder(folder / name, "llama", widths), folder / f"{name}.gguf", quantization="F16", name=name
        ).path
        for name, widths in (("dense", DENSE), ("pruned", PER_LAYER))
    }


@pytest.fixture
def make(tmp_path, ggufs):
    fleets = []

    def started(plans):
        fleets.append(RolloutFleet(tmp_path, ggufs, plans))
        if "server" not in plans:
            fleets[-1].start_devices()
        return fleets[-1]

    yield started
    for fleet in fleets:
        fleet.stop()


def test_an_agent_killed_at_every_step_commits_and_killed_at_every_step_back_returns(make, ggufs):
    fleet = make({"device-00": AGENT_EVENTS + RETURN_EVENTS})
    fleet.start("dense", canaries=["device-00"])
    fleet.until("finished", committed=2)
    device = fleet.devices["device-00"]
    assert device.struck[: len(AGENT_EVENTS)] == [1] * len(AGENT_EVENTS)
    assert {fleet.served(name) for name in fleet.devices} == {ggufs["dense"].read_bytes()}
    assert len(fleet.kinds("device_committed")) == 2, "told twice, counted once"
    fleet.operator.post(f"rollouts/{fleet.status()['rollout_id']}/rollback")
    fleet.until("rolled_back", rolled_back=2)
    fleet.patiently(lambda: device.struck == [1] * len(AGENT_EVENTS + RETURN_EVENTS))
    assert device.exits.count(-9) == len(AGENT_EVENTS + RETURN_EVENTS)
    assert {fleet.served(name) for name in fleet.devices} == {None}


def test_a_server_killed_at_every_step_of_a_rollout_ends_it_as_if_nothing_had_been(make, ggufs):
    fleet = make({"server": SERVER_EVENTS})
    fleet.start("pruned", gate="ppl<=100000 and tokens_per_second>=1")
    fleet.start_devices()  # they would wait longer each time the server was not there
    found = fleet.until("finished", committed=2)
    fleet.server.assert_all_struck()
    assert fleet.server.exits.count(-9) == len(SERVER_EVENTS)
    assert {fleet.served(name) for name in fleet.devices} == {ggufs["pruned"].read_bytes()}
    assert all(1 < device["figures"]["ppl"] < 100_000 for device in found["devices"])


def test_a_health_check_killed_fails_that_device_alone_which_keeps_the_model_it_has(make, ggufs):
    fleet = make({"device-00": [fault(HEALTH, "fedspine_edge.agent.gguf_file:check_gguf")]})
    fleet.start("dense", canaries=["device-01"])
    found = fleet.until("finished")
    assert found["counts"] == {"committed": 1, "failed": 1}
    reasons = {device["device_id"]: device["reason"] for device in found["devices"]}
    assert reasons["device-00"] == "the health check was killed, most likely for want of memory"
    assert -9 not in fleet.devices["device-00"].exits, "the agent lives"
    assert fleet.served("device-00") is None


def test_a_check_that_takes_the_agent_down_each_time_is_given_up_and_the_rollout_stops(make, ggufs):
    fleet = make({"device-00": [fault(AGENT, WORK + "check_health", times=3)]})
    fleet.start("dense", canaries=["device-01"])
    fleet.until("finished")
    assert fleet.devices["device-00"].exits.count(-9) == 3
    (said,) = [device for device in fleet.status()["devices"] if device["device_id"] == "device-00"]
    assert said["reason"] == "the device went down in each of 3 checks of this model"
    fleet.start("pruned", canaries=["device-00"], gate="ppl<=base")
    found = fleet.until("stopped")
    assert "no model to compare with" in found["detail"]
    assert fleet.served("device-01") == ggufs["dense"].read_bytes(), "the others were not touched"


def test_a_device_that_was_away_for_the_whole_rollout_gets_it_when_it_comes_back_and_a_full_disk_is_said(make, ggufs):
    fleet = make({})
    away = fleet.devices["device-01"]
    away.stop()
    fleet.start("dense", canaries=["device-00"])
    found = fleet.until("rolling", committed=1)
    assert found["counts"] == {"committed": 1, "waiting": 1}
    state = fleet.folder / "device-01"
    settings = json.loads((state / "agent.json").read_text())
    (state / "agent.json").write_text(json.dumps({**settings, "min_disk_bytes": 1 << 60}))
    away.start()
    found = fleet.until("finished", failed=1)
    assert "bytes free on disk, found" in found["devices"][1]["reason"]
    (state / "agent.json").write_text(json.dumps(settings))
    away.stop()
    away.start()
    fleet.start("pruned")
    fleet.until("finished", committed=2)
    (fleet.folder / "device-00" / "models" / "rollout.json").write_bytes(b"{")  # a damaged record: it is asked again
    fleet.devices["device-00"].stop()
    fleet.devices["device-00"].start()
    fleet.patiently(lambda: len(fleet.kinds("device_took_over")) >= 3)
    fleet.patiently(lambda: (fleet.folder / "device-00.log").read_text().count("did=tell phase=committed") == 3)
    assert {fleet.served(name) for name in fleet.devices} == {ggufs["pruned"].read_bytes()}
