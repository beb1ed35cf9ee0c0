"""Requests and frames no honest device sends: none ends in a 5xx, none hangs, and the server's memory stays flat.

`FEDSPINE_FUZZ` says how many (default 2,000); `make test-fuzz-nightly` sends 100,000.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests
import schemathesis
import toy
import zstandard
from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from link_world import QUICK, ToyDevice, World, start_run, toy_layout, until
from schemathesis import GenerationMode

from fedspine_edge.errors import IncompatibleError
from fedspine_edge.wire_format import pack, to_bytes, unpack, update_from_bytes
from fedspine_server import coordinator
from fedspine_server.admission import refusal
from fedspine_server.link.credentials import CLAIM, OPERATOR, issue
from fedspine_server.link.hub import open_hub
from fedspine_server.link.tables import DeviceRow
from fedspine_server.settings import RunSettings

pytestmark = pytest.mark.faults

COUNT = int(os.environ.get("FEDSPINE_FUZZ", "2000"))
FLAT_BYTES = 64 << 20  # caches, pools and the allocator's slack; 100,000 requests of 1 KiB kept would be more
SECONDS = 30.0
HERE = Path(__file__).parent


def drawn(count: int):
    """Settings of a property that is tried so often, each time the same way unless `FEDSPINE_FUZZ_SEED` changes it."""
    return hypothesis_settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


SEED = int(os.environ.get("FEDSPINE_FUZZ_SEED", "1"))


class Target:
    """A server process, with a run under way, a device with a task and one that may be revoked."""

    def __init__(self, folder: Path) -> None:
        hub = open_hub(folder, settings=QUICK)
        with hub.database.write() as session:
            operator = issue(session, OPERATOR, now=hub.clock(), seconds=None)
            claim = issue(session, CLAIM, now=hub.clock(), seconds=3600)
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        self.log = folder / "server.log"
        with self.log.open("ab") as log:
            command = [sys.executable, str(HERE / "server_process.py"), str(folder), str(listener.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[listener.fileno()], stdout=log, stderr=log)
        listener.close()
        self.world = World(hub, f"http://127.0.0.1:{port}", operator, claim)
        self.session = requests.Session()
        self.device = ToyDevice(self.world, "fuzzed")
        self.device.hello()

    def boot(self) -> str:
        with self.world.hub.database.read() as session:
            return session.get_one(DeviceRow, "fuzzed").boot_id

    def memory_bytes(self) -> int:
        return psutil.Process(self._process.pid).memory_info().rss

    def is_up(self) -> bool:
        return self._process.poll() is None and self.session.get(f"{self.world.url}/v1/health", timeout=SECONDS).ok

    def stop(self) -> None:
        self.session.close()
        self._process.terminate()
        self._process.wait(SECONDS)
        self.world.hub.database.close()


@pytest.fixture
def target(tmp_path):
    target = Target(tmp_path / "server")
    yield target
    target.stop()


def try_all(cases, known, count, send) -> None:
    """Sends so many requests, half of them about things that are really there; none where nothing can be wrong."""

    @seed(SEED)
    @drawn(count)
    @given(case=cases, real=st.booleans())
    def fuzz(case, real):
        if real and case.path_parameters:
            case.path_parameters = {name: known.get(name, value) for name, value in case.path_parameters.items()}
        send(case)

    with contextlib.suppress(Unsatisfiable):
        fuzz()


def test_mutated_requests_end_in_no_5xx_and_leave_memory_flat(target, settings):
    """Every call of the published document as a stranger, a device and the operator, with good and with bad fields."""
    ToyDevice(target.world, "victim")
    for run_id in ("run-a", "run-b"):
        start_run(target.world, dataclasses.replace(settings, rounds=100_000), run_id)
    task = target.device.task()
    known = {
        "sha256": task["blob"]["sha256"], "task_id": task["task_id"], "index": 0, "device_id": "victim",
        "run_id": "run-b",
    }  # fmt: skip
    bearers = {
        "stranger": {},
        "device": {"Authorization": f"Bearer fuzzed.{target.device.identity.secret}"},
        "operator": {"Authorization": f"Bearer {target.world.operator}"},
    }
    document = target.session.get(f"{target.world.url}/v1/openapi.json", headers=bearers["operator"]).json()
    operations = [found.ok() for found in schemathesis.openapi.from_dict(document).get_all_operations()]
    assert len(operations) >= 20
    statuses, sizes = Counter[int](), list[int]()
    each = max(1, COUNT // (len(operations) * len(bearers) * 2))

    def send(case, headers) -> None:
        if "Authorization" in headers and "fuzzed" in headers["Authorization"]:
            headers = {**headers, "X-Boot": target.boot()}
        case.headers = {**(case.headers or {}), **headers}
        reply = case.call(base_url=target.world.url, session=target.session, timeout=SECONDS)
        statuses[reply.status_code] += 1
        assert reply.status_code < 500, (case.as_curl_command(), reply.text, target.log.read_text()[-2000:])

    for operation in operations:
        for headers, mode in itertools.product(bearers.values(), GenerationMode):
            try_all(operation.as_strategy(generation_mode=mode), known, each, functools.partial(send, headers=headers))
        sizes.append(target.memory_bytes())
    assert target.is_up()
    said = ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items()))
    sys.stdout.write(f"{statuses.total()} requests ({said}); {sizes[0] >> 20} to {sizes[-1] >> 20} MiB\n")
    # Something gets through, and something is refused: else nothing was tried.
    assert statuses.total() >= COUNT // 3
    assert min(statuses[200], statuses[401], statuses[422]) > 0
    assert sizes[-1] - sizes[0] < FLAT_BYTES


@st.composite
def mutated(draw, message: bytes):
    """A frame as a broken or hostile device would send it: damaged before or after it was packed."""
    kind = draw(st.sampled_from(["frame", "message", "header", "bomb", "noise"]))
    if kind == "noise":
        return draw(st.binary(max_size=4096))
    if kind == "bomb":
        return zstandard.ZstdCompressor().compress(bytes(draw(st.integers(1, 1 << 24))))
    content = bytearray(pack(message) if kind == "frame" else message)
    length = 8 + int.from_bytes(message[:8], "little")
    end = min(len(content), length) if kind == "header" else len(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, end - 1))
        change = draw(st.sampled_from(["flip", "cut", "add", "byte"]))
        if change == "flip":
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif change == "byte":
            content[at] = draw(st.integers(0, 255))
        elif change == "add":
            content[at:at] = draw(st.binary(min_size=1, max_size=64))
        else:
            del content[at : at + draw(st.integers(1, 64))]
        end = min(end, len(content))
        if not content or end < 1:
            break
    return bytes(content) if kind == "frame" else pack(bytes(content))


@pytest.fixture
def asked():
    """What a device was asked in the middle of a round, and the update it would send."""
    settings = RunSettings(rounds=10, steps_per_round=2, ranks=(2,), fixed_rank=2, controller="fixed")
    state = coordinator.init(settings, toy_layout(), toy.task_head())
    state = coordinator.register(state, "fuzzed", num_examples=10, memory_bytes=8 << 30)
    (assignment,), state = coordinator.assign(state)
    return assignment, toy.tune_one(toy_layout(), assignment, 10)


def test_a_mutated_frame_is_an_update_or_is_refused_with_a_reason(asked):
    assignment, update = asked
    message, ends = to_bytes(update), Counter[str]()

    @seed(SEED)
    @drawn(COUNT)
    @given(frame=mutated(message))
    def fuzz(frame):
        try:
            found = update_from_bytes(unpack(frame, max_bytes=4 * len(message)))
        except IncompatibleError:
            ends["no update"] += 1
            return
        reason = refusal(found, assignment, toy_layout(), num_examples=10, max_update_norm=1e3)
        ends["taken" if reason is None else "rejected"] += 1
        if reason is None:
            assert all(np.isfinite(array).all() for array in found.tensors.values() if array.dtype.kind == "f")

    fuzz()
    sys.stdout.write(f"{ends.total()} frames: {dict(ends)}\n")
    assert min(ends["no update"], ends["taken"], ends["rejected"]) > 0


def test_a_device_that_sends_mutated_frames_for_ever_holds_up_no_round(target, settings, tmp_path):
    start_run(target.world, dataclasses.replace(settings, rounds=1_000_000))
    fates, sizes = Counter[str](), list[int]()
    message = to_bytes(toy.tune_one(toy_layout(), target.device.assignment(target.device.task(), tmp_path), 10))
    target.device.reborn().hello()

    @seed(SEED)
    @drawn(max(50, COUNT // 20))
    @given(frame=mutated(message), inline=st.booleans())
    def fuzz(frame, inline):
        task = until(target.device.task, SECONDS)
        task["inline_bytes"] = task["max_update_bytes"] if inline else 0
        fates[target.device.send(task, frame[: task["max_update_bytes"]], tmp_path)["fate"]] += 1
        sizes.append(target.memory_bytes())

    fuzz()
    assert target.is_up()
    sys.stdout.write(f"{fates.total()} rounds: {dict(fates)}; {sizes[0] >> 20} to {sizes[-1] >> 20} MiB\n")
    assert fates["refused"]
    assert sizes[-1] - sizes[0] < FLAT_BYTES
