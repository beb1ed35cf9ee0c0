"""Light devices for `bench_link.py`: the calls of a real one, a thread each, and back goes what came.

Comes in: one JSON document: server, number of devices, what to do. Goes out: the seconds of each call, as JSON.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BASE = hashlib.sha256(b"bench").hexdigest()
SECRET = "s" * 43
Seconds = dict[str, list[float]]


def names(count: int) -> list[str]:
    """Returns what so many devices are called."""
    return [f"device-{index:03d}" for index in range(count)]


class Device:
    """A light device: its calls, and the seconds each took."""

    def __init__(self, server: Mapping[str, str], device_id: str, seconds: Seconds) -> None:
        from fedspine_edge.agent.identity import Identity
        from fedspine_edge.agent.link import Link

        self._link = Link(Identity(server["url"], server["ca"], device_id, SECRET, enrolled=True), uuid.uuid4().hex)
        self._seconds = seconds
        self.device_id = device_id

    def timed(self, name: str, *arguments: Any) -> Any:
        """Makes a call of the link and keeps how long it took."""
        begin = time.perf_counter()
        answer = getattr(self._link, name)(*arguments)
        self._seconds[name].append(time.perf_counter() - begin)
        return answer

    def hello(self) -> None:
        """Begins."""
        self.timed("hello", {"facts": {}, "num_examples": 10, "memory_bytes": 8 << 30, "base_sha256": BASE}, None)

    def task(self, wait_seconds: float) -> dict[str, Any] | None:
        """Returns a task, None when there is none for so long."""
        from fedspine_edge.agent.tasks import checked_task, inline_message

        reply = self._link.task(wait_seconds)
        if reply is None:
            return None
        task = checked_task(reply)
        return {**task, "message": inline_message(reply, task)}

    def download(self, task: Mapping[str, Any], folder: Path) -> Path:
        """Returns the file of a task's message."""
        path = folder / "task"
        path.unlink(missing_ok=True)
        if task["message"] is None:
            self.timed("download", task["blob"]["sha256"], task["blob"]["num_bytes"], path)
        else:
            path.write_bytes(task["message"])
        return path

    def frame(self, task: Mapping[str, Any], blob: Path, path: Path) -> dict[str, Any]:
        """Writes what comes back, which is what came, and returns what is said of it."""
        from fedspine_edge.protocol import DeviceReport, Update
        from fedspine_edge.wire_format import assignment_from_bytes, pack, to_bytes, unpack

        asked = assignment_from_bytes(unpack(blob.read_bytes(), max_bytes=task["blob"]["message_bytes"]))
        report = DeviceReport(10, task["num_steps"], 1.0, 0.5, 0.01, 1 << 20)
        back = {name: value for name, value in asked.tensors.items() if name.startswith("lora_")}
        update = Update(
            run_id=asked.run_id,
            device_id=self.device_id,
            round_index=asked.round_index,
            base_sha256=asked.base_sha256,
            pruning_ratio=0.0,
            rank=asked.rank,
            report=report,
            tensors=back,
        )
        path.write_bytes(pack(to_bytes(update)))
        said = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "num_bytes": path.stat().st_size}
        return {**said, "attempt": task["attempt"], "download_seconds": 0.01, "upload_seconds": 0.01}

    def send(self, task: Mapping[str, Any], manifest: Mapping[str, Any], path: Path) -> None:
        """Sends an update, which the server has to keep."""
        content = self.timed("upload", task, path)
        reply = self.timed("result", task["task_id"], {**manifest, **content})
        assert reply["fate"] == "kept", reply

    def take_part(self, rounds: int, folder: Path, *, reports: bool) -> None:
        """Does so many tasks, and reports progress once in each where a real one would have to work that long."""
        folder = folder / self.device_id
        folder.mkdir()
        self.hello()
        for _ in range(rounds):
            task = None
            while task is None:
                task = self.task(25.0)
            blob = self.download(task, folder)
            path = folder / "update"
            manifest = self.frame(task, blob, path)
            if reports:
                self.timed("progress", task["task_id"], {"attempt": task["attempt"]})
            self.send(task, manifest, path)

    def stand_by(self, until: float) -> None:
        """Waits in long polls, then asks once more at once."""
        self.hello()
        while time.monotonic() < until:
            assert self.task(25.0) is None
        self.timed("task", 0.0)


def light_devices(request: Mapping[str, Any]) -> None:
    """The process of the light devices: runs them all, prints the seconds of their calls."""
    seconds: Seconds = defaultdict(list)
    devices = [Device(request, device_id, seconds) for device_id in names(request["count"])]
    folder, failures = Path(request["folder"]), []
    until = time.monotonic() + request["seconds"]

    def run(device: Device) -> None:
        try:
            if request["idle"]:
                device.stand_by(until)
            else:
                device.take_part(request["rounds"], folder, reports=request["reports"])
        except Exception as error:  # noqa: BLE001 - told to who waits
            failures.append(f"{device.device_id}: {error!r}")

    threads = [threading.Thread(target=run, args=(device,), daemon=True) for device in devices]
    for thread in threads:
        thread.start()
    limit = time.monotonic() + request["limit"]
    while not failures and any(thread.is_alive() for thread in threads) and time.monotonic() < limit:
        time.sleep(0.1)
    if any(thread.is_alive() for thread in threads):
        failures.append("not all devices came to their end")
    print(json.dumps({"seconds": seconds, "failures": failures[:5]}))


if __name__ == "__main__":
    light_devices(json.loads(sys.argv[1]))
