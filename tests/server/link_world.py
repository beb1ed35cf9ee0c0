"""A server on a real socket of the loopback, in this process, and devices that train the toy task over it."""

from __future__ import annotations

import dataclasses
import hashlib
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import toy
import uvicorn
from safetensors.numpy import save as save_blob

from fedspine_edge.agent.identity import Identity
from fedspine_edge.agent.link import Link
from fedspine_edge.agent.tasks import checked_task
from fedspine_edge.protocol import Assignment, Update
from fedspine_edge.wire_format import assignment_from_bytes, pack, to_bytes, unpack
from fedspine_server.link import runs
from fedspine_server.link.app import create_app
from fedspine_server.link.credentials import CLAIM, OPERATOR, issue
from fedspine_server.link.devices import set_status
from fedspine_server.link.hub import Hub, LinkSettings, open_hub
from fedspine_server.link.operator_schemas import RunOptions, RunRequest
from fedspine_server.link.schemas import Recipe
from fedspine_server.link.tables import ACCEPTED
from fedspine_server.page.app import Front, create_page
from fedspine_server.page.fleet_source import FleetSource
from fedspine_server.page.sessions import new_password
from fedspine_server.settings import RunSettings

BASE = hashlib.sha256(b"toy").hexdigest()
# Toy messages are small: nothing inline, so that they take the way of large ones.
QUICK = LinkSettings(
    tick_seconds=0.02, wait_seconds=5.0, progress_seconds=0.2, chunk_bytes=1 << 10, inline_bytes=0, enroll_tries=1000
)


@dataclasses.dataclass
class World:
    """A server that is up: its hub, its address, an operator's token and a claim."""

    hub: Hub
    url: str
    operator: str
    claim: str


@contextmanager
def page_served(directory: Path) -> Iterator[Any]:
    """Starts a server with the fleet page beside the link; the world also has the page's password and desk."""
    desks: list[Any] = []

    def front(link: Any, hub: Hub) -> Front:
        page = create_page(FleetSource(hub), hub)
        desks.append(page.desk)  # type: ignore[attr-defined]
        return Front(link, page)

    with served(directory, around=front) as world:
        world.password, world.desk = new_password(world.hub), desks[0]  # type: ignore[attr-defined]
        yield world


@contextmanager
def served(
    directory: Path, settings: LinkSettings = QUICK, around: Callable[[Any, Hub], Any] | None = None, **more: Any
) -> Iterator[World]:
    """Starts a server over a directory, new or used before, and stops it."""
    hub = open_hub(directory, settings=settings, **more)
    with hub.database.write() as session:
        operator = issue(session, OPERATOR, now=hub.clock(), seconds=None)
        claim = issue(session, CLAIM, now=hub.clock(), seconds=3600)
    listener = socket.create_server(("127.0.0.1", 0))
    app = create_app(hub) if around is None else around(create_app(hub), hub)
    config = uvicorn.Config(app, log_level="warning", lifespan="on", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield World(hub, f"http://127.0.0.1:{listener.getsockname()[1]}", operator, claim)
    finally:
        hub.bell.close_soon()
        server.should_exit = True
        thread.join(10)
        listener.close()
        assert not thread.is_alive()


class ToyDevice:
    """A device of the toy task, driven call by call."""

    def __init__(
        self, world: World, device_id: str, *, num_examples: int = 10, memory_bytes: int = 8 << 30, accept: bool = True
    ) -> None:
        self.identity = Identity(world.url, "", device_id, "s" * 43, enrolled=True)
        self.num_examples, self.memory_bytes = num_examples, memory_bytes
        self.link = Link(self.identity, uuid.uuid4().hex)
        self.link.enroll(self.identity, world.claim, {"board": "toy"})
        if accept:
            set_status(world.hub, [device_id], ACCEPTED)

    def hello(self, task: dict[str, Any] | None = None, *, base: str = BASE) -> dict[str, Any]:
        said = {"facts": {"board": "toy"}, "num_examples": self.num_examples, "memory_bytes": self.memory_bytes}
        return self.link.hello({**said, "base_sha256": base}, task)

    def reborn(self) -> ToyDevice:
        """The same device after its power came back."""
        self.link.close()
        self.link = Link(self.identity, uuid.uuid4().hex)
        return self

    def task(self, wait_seconds: float = 5.0) -> dict[str, Any] | None:
        reply = self.link.task(wait_seconds)
        return None if reply is None else checked_task(reply)

    def assignment(self, task: dict[str, Any], folder: Path) -> Assignment:
        own_folder = folder / self.identity.device_id
        own_folder.mkdir(exist_ok=True)
        path = own_folder / "task.blob"
        self.link.download(task["blob"]["sha256"], task["blob"]["num_bytes"], path)
        message = unpack(path.read_bytes(), max_bytes=task["blob"]["message_bytes"])
        names = ("device_id", "pruning_ratio", "num_steps", "seed", "budget_seconds", "min_steps")
        own = {name: task[name] for name in names}
        return dataclasses.replace(assignment_from_bytes(message), **own)

    def send(self, task: dict[str, Any], frame: bytes, folder: Path) -> dict[str, Any]:
        path = folder / f"{self.identity.device_id}.update"
        path.write_bytes(frame)
        content = self.link.upload(task, path)
        return self.link.result(task["task_id"], manifest(task, frame) | content)

    def work(
        self, task: dict[str, Any], folder: Path, change: Callable[[Update], Update] = lambda update: update
    ) -> dict[str, Any]:
        """Does a task as it should be done, or with its update changed."""
        update = toy.tune_one(toy_layout(), self.assignment(task, folder), self.num_examples)
        return self.send(task, pack(to_bytes(change(update))), folder)


def manifest(task: dict[str, Any], frame: bytes) -> dict[str, Any]:
    return {
        "attempt": task["attempt"],
        "sha256": hashlib.sha256(frame).hexdigest(),
        "num_bytes": len(frame),
        "download_seconds": 1.0,
        "upload_seconds": 1.0,
    }


def toy_layout() -> Any:
    return dataclasses.replace(toy.layout(), base_sha256=BASE)


def start_run(world: World, settings: RunSettings, run_id: str = "run-a", **options: Any) -> None:
    request = RunRequest(
        run_id=run_id,
        settings=settings.to_json(),
        layout=toy_layout().to_json(),
        recipe=Recipe(classes=["a", "b"]),
        options=RunOptions(**options),
    )
    # As over the wire, where bytes travel as base64.
    request.task_head = save_blob(toy.task_head())
    runs.start(world.hub, request)


def until(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Waits for something that another thread does."""
    done = threading.Event()
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        found = condition()
        if found:
            return found
        done.wait(0.01)
    raise AssertionError("it did not happen in time")
