"""Several server processes over one PostgreSQL, a real one that the tests start: one run, whichever of them dies."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import urllib3
from fastapi import HTTPException
from link_world import QUICK, ToyDevice, World, manifest, start_run, toy_layout, until
from sqlalchemy import update
from toy import tune_one

from fedspine_edge.agent.link import UnreachableError
from fedspine_edge.errors import LinkError
from fedspine_edge.wire_format import pack, to_bytes
from fedspine_server.link import models, rollout_views, rollouts, runs
from fedspine_server.link.credentials import CLAIM, OPERATOR, issue
from fedspine_server.link.database import Database
from fedspine_server.link.driving import TAKEN
from fedspine_server.link.hub import open_hub
from fedspine_server.link.rollout_schemas import ModelRequest, RolloutRequest
from fedspine_server.link.tables import ACCEPTED, FINISHED, DeviceRow, RolloutRow

pytestmark = pytest.mark.faults

HERE = Path(__file__).parent
PROGRAMS = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
SECONDS = 30.0


@pytest.fixture(scope="module")
def postgres():
    """A cluster of its own on a socket of its own; not as root, which PostgreSQL refuses."""
    assert PROGRAMS is not None, "expected PostgreSQL's server, found none: sh tests/server/install_postgres.sh"
    folder = Path(tempfile.mkdtemp(prefix="fedspine-postgres-"))
    as_whom = {}
    if os.geteuid() == 0:
        owner = pwd.getpwnam("postgres")
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        as_whom = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
    data, said = folder / "data", {"cwd": folder, "check": True, "capture_output": True}
    subprocess.run([PROGRAMS / "initdb", "-D", data, "-U", "fedspine", "-A", "trust", "-N"], **said, **as_whom)
    options = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={folder}"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [PROGRAMS / "postgres", "-D", data, *options], cwd=folder, stdout=log, stderr=log, **as_whom
        )
    ready = [PROGRAMS / "pg_isready", "-q", "-h", folder]
    try:
        until(lambda: subprocess.run(ready, check=False).returncode == 0, SECONDS)
        yield folder
    finally:
        server.terminate()
        server.wait(SECONDS)
        shutil.rmtree(folder)


@pytest.fixture
def database(postgres, request):
    name = f"t{abs(hash(request.node.name)) % 10**9}"
    subprocess.run([PROGRAMS / "createdb", "-h", postgres, "-U", "fedspine", name], check=True)
    return f"postgresql+psycopg://fedspine@/{name}?host={postgres}"


class Servers:
    """Server processes over one database and one directory; a device of one that died goes to another."""

    def __init__(self, folder: Path, database: str, count: int) -> None:
        self.hub = open_hub(folder, database=database, settings=QUICK)
        with self.hub.database.write() as session:
            self.operator = issue(session, OPERATOR, now=self.hub.clock(), seconds=None)
            self.claim = issue(session, CLAIM, now=self.hub.clock(), seconds=3600)
        self.processes, self.worlds, self.logs = [], [], []
        for index in range(count):
            with socket.create_server(("127.0.0.1", 0)) as listener, (folder / f"log-{index}").open("wb") as log:
                command = [sys.executable, HERE / "server_process.py", folder, str(listener.fileno()), database]
                process = subprocess.Popen(command, pass_fds=[listener.fileno()], stdout=log, stderr=log)
                url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            self.processes.append(process)
            self.worlds.append(World(self.hub, url, self.operator, self.claim))
            self.logs.append(folder / f"log-{index}")

    def driver(self) -> int:
        """Which of the living moves the runs on."""
        alive = [index for index, process in enumerate(self.processes) if process.poll() is None]
        return until(lambda: [i + 1 for i in alive if TAKEN in self.logs[i].read_text()], SECONDS)[0] - 1

    def kill(self, index: int) -> None:
        self.processes[index].kill()
        self.processes[index].wait(SECONDS)

    def move(self, device: ToyDevice, index: int) -> None:
        device.identity = dataclasses.replace(device.identity, url=self.worlds[index].url)
        device.reborn().hello()

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(SECONDS)
        self.hub.database.close()


@pytest.fixture
def servers(tmp_path, database):
    started = Servers(tmp_path / "server", database, 2)
    yield started
    started.stop()


def merged(servers):
    closed = [event.detail for event in runs.events(servers.hub, "run-a", 0) if event.kind == "round_closed"]
    return [detail["merged"] for detail in closed]


def finished(servers):
    return runs.views(servers.hub, "run-a")[0].status == FINISHED


def test_when_the_process_that_moves_the_runs_is_killed_the_other_does_and_each_device_counts_once(
    servers, settings, tmp_path
):
    devices = [ToyDevice(servers.worlds[index % 2], name) for index, name in enumerate("abcd")]
    for device in devices:
        device.hello()
    start_run(servers.worlds[0], dataclasses.replace(settings, rounds=4), min_devices=4)
    killed = servers.driver()
    for round_index in range(4):
        for device in devices:
            assert device.work(until(device.task, SECONDS), tmp_path)["fate"] == "kept"
            if round_index == 1 and device is devices[1]:
                servers.kill(killed)  # two results of this round are in, two are not
                for other in devices:
                    servers.move(other, 1 - killed)
    until(lambda: finished(servers), SECONDS)
    assert merged(servers) == [["a", "b", "c", "d"]] * 4
    assert TAKEN in servers.logs[1 - killed].read_text()


def test_no_result_is_lost_or_counted_twice_when_all_devices_answer_both_processes_at_once(servers, settings, tmp_path):
    names = [f"device-{index}" for index in range(6)]
    devices = [ToyDevice(servers.worlds[index % 2], name) for index, name in enumerate(names)]
    twins = [ToyDevice.__new__(ToyDevice) for _ in devices]
    for twin, device, index in zip(twins, devices, range(6), strict=True):
        device.hello()
        twin.identity = dataclasses.replace(device.identity, url=servers.worlds[1 - index % 2].url)
        twin.link = type(device.link)(twin.identity, device.link.boot_id)
    start_run(servers.worlds[0], dataclasses.replace(settings, rounds=5), min_devices=6)
    fates = []

    def take_part(device, twin):
        for _ in range(5):
            task = until(device.task, SECONDS)
            frame = pack(to_bytes(tune_one(toy_layout(), device.assignment(task, tmp_path), 10)))
            path = tmp_path / f"{device.identity.device_id}.update"
            path.write_bytes(frame)
            device.link.upload(task, path)
            gate = threading.Barrier(2)

            def send(link, task=task, frame=frame, gate=gate):
                gate.wait(SECONDS)
                while True:
                    with contextlib.suppress(
                        UnreachableError
                    ):  # the other one was quicker: asked again, the same answer
                        return link.result(task["task_id"], manifest(task, frame))["fate"]

            with ThreadPoolExecutor(2) as pair:
                fates.append(tuple(pair.map(send, [device.link, twin.link])))

    with ThreadPoolExecutor(len(devices)) as pool:
        list(pool.map(take_part, devices, twins))
    until(lambda: finished(servers), SECONDS)
    assert fates == [("kept", "kept")] * 30
    assert merged(servers) == [names] * 5
    assert sum(TAKEN in log.read_text() for log in servers.logs) == 1


def test_a_database_that_is_not_there_is_one_clear_error_without_its_password(tmp_path):
    with pytest.raises(LinkError, match="cannot open the database") as told:
        Database(f"postgresql+psycopg://fedspine:secret@/none?host={tmp_path}")
    assert "secret" not in str(told.value)
    with pytest.raises(LinkError, match="cannot use the database"):
        Database("mysterysql://somewhere")


def model_of(servers):
    content = b"GGUF" + bytes(4000)
    sha256 = hashlib.sha256(content).hexdigest()
    servers.hub.blobs.put(content)
    models.add(servers.hub, sha256, ModelRequest(name="m.gguf", num_bytes=len(content)))
    return sha256


def test_of_two_operators_who_begin_a_rollout_at_once_one_is_told_so(servers):
    sha256, both = model_of(servers), threading.Barrier(2)
    ToyDevice(servers.worlds[0], "a").hello()

    def begun(_):
        both.wait(SECONDS)
        try:
            rollouts.start(servers.hub, RolloutRequest(model_sha256=sha256, gate="ppl<=10", canaries=["a"]))
        except HTTPException as refused:
            return refused.status_code
        return 200

    with ThreadPoolExecutor(2) as pool:
        for _ in range(10):
            assert sorted(pool.map(begun, range(2))) == [200, 409]
            with servers.hub.database.write() as session:
                session.execute(update(RolloutRow).values(status="finished"))


def test_a_rollout_goes_on_over_two_processes_when_the_one_that_settles_it_is_killed(servers):
    sha256 = model_of(servers)
    devices = [ToyDevice(world, name) for world, name in zip(servers.worlds, "ab", strict=True)]
    for device in devices:
        device.hello()
    said = {"sha256": sha256, "current": sha256, "figures": {"ppl": 9.0}, "state": "committed"}
    rollouts.start(servers.hub, RolloutRequest(model_sha256=sha256, gate="ppl<=10", canaries=["a"]))
    until(lambda: devices[0].link.task(5.0, "none"), SECONDS)
    dead = servers.driver()
    servers.kill(dead)
    servers.move(devices[dead], 1 - dead)
    assert devices[0].link.rollout(1, said)["go_on"]
    order = until(lambda: devices[1].link.task(5.0, "none"), SECONDS)["rollout"]
    assert (order["kind"], order["model"]["sha256"]) == ("install", sha256)
    devices[1].link.rollout(1, said)
    until(lambda: rollout_views.views(servers.hub)[0].status == "finished", SECONDS)
    assert rollout_views.views(servers.hub)[0].counts == {"committed": 2}
    kinds = [event.kind for event in runs.events(servers.hub, None, 0) if event.kind.startswith("rollout")]
    assert kinds == ["rollout_started", "rollout_rolling", "rollout_finished"]


def page_of(world, method, path, *, cookie="", form=None):
    fields = {"Accept": "text/html", "Cookie": cookie}
    body = urllib.parse.urlencode(form) if form is not None else None
    reply = urllib3.request(
        method, world.url + path, headers=fields, body=body, timeout=10, retries=False, redirect=False
    )
    assert reply.status in (200, 303), (path, reply.status, reply.data[:300])
    return reply


def streamed(world, cookie, wanted):
    """Seconds until the stream of the fleet's page has said something."""
    headers, begin = {"Cookie": cookie, "Accept": "text/event-stream"}, time.monotonic()
    with urllib3.request(
        "GET", world.url + "/stream?page=fleet", headers=headers, preload_content=False, timeout=SECONDS
    ) as reply:
        assert reply.status == 200
        said = b""
        while wanted.encode() not in said:
            said += reply.read1(1 << 16)
            assert time.monotonic() - begin < SECONDS, said[-2000:]
    return time.monotonic() - begin


def test_the_page_is_one_whichever_process_answers_and_outlives_either(servers):
    first, second = servers.worlds
    cookie = page_of(first, "POST", "/login", form={"password": servers.operator}).headers["set-cookie"].split(";")[0]
    with ThreadPoolExecutor(1) as pool:
        seen = pool.submit(streamed, second, cookie, "newcomer")
        device = ToyDevice(first, "newcomer", accept=False)
        device.hello()
        assert seen.result(SECONDS) < SECONDS
    csrf = re.search(rb'data-csrf="([0-9a-f]{64})"', page_of(first, "GET", "/", cookie=cookie).data)[1].decode()
    accept = {"csrf": csrf, "confirmed": "yes"}
    page_of(second, "POST", "/devices/newcomer/accept", cookie=cookie, form=accept)
    with servers.hub.database.read() as session:
        assert session.get(DeviceRow, "newcomer").status == ACCEPTED
    servers.kill(0)
    assert b"newcomer" in page_of(second, "GET", "/", cookie=cookie).data
