"""The agent beside a carrier such as Flower: no network here, a Unix socket that programs of this device call.

Comes in: tasks as the HTTPS link's, checked the same way. Goes out: updates. The model stays loaded between tasks
though the caller is a new process each time, one task runs at a time, and a task that was finished is answered from
disk when it is asked for again: after a killed caller, or a server that restarted and repeats its round. Work that
takes longer than anybody waits for its answer (`lease_seconds`) is given up.
"""

from __future__ import annotations

import hashlib
import logging
import math
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedspine_edge.agent import guards
from fedspine_edge.agent.journal import Journal
from fedspine_edge.agent.local_call import receive, send
from fedspine_edge.agent.senses import Senses, total_memory_bytes
from fedspine_edge.agent.settings import AgentSettings
from fedspine_edge.agent.tasks import checked_task
from fedspine_edge.agent.worker_process import WorkerProcess
from fedspine_edge.atomic import write_bytes
from fedspine_edge.errors import FedSpineError, LinkError, UsageError

SOCKET_FILE = "agent.sock"
LOOK_SECONDS = 1.0
CELSIUS_SECONDS = 5.0
LONGEST_PATH = 100  # the kernel takes 107 bytes

logger = logging.getLogger(__name__)


class LocalAgent:
    """One device's worker, offered on a Unix socket; a context manager.

    Args:
        state: Its state directory.
        device_id: What the server knows it by.
        settings: How it works.
        path: Where the socket is; in the state directory when None.

    Raises:
        LinkError: Model or data cannot be opened.
        UsageError: The socket's path is too long, or another agent is there.
    """

    def __init__(self, state: Path, device_id: str, settings: AgentSettings, path: Path | None = None) -> None:
        self.path = path or state / SOCKET_FILE
        self._device_id = device_id
        self._settings = settings
        self._journal = Journal(state)
        self._senses = Senses(state)
        self._worker = WorkerProcess(settings)
        self._turn = threading.Lock()
        self._listener = _listening(self.path)  # first: the model is loaded once, however many agents are started
        try:
            self._opened = self._open_worker()
        except FedSpineError:
            self._listener.close()
            self.path.unlink()
            raise

    def __enter__(self) -> LocalAgent:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self.path.unlink(missing_ok=True)
        self._worker.stop()

    def serve(self) -> None:
        """Answers calls until the socket is closed."""
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), name="call", daemon=True).start()

    def _open_worker(self) -> dict[str, Any]:
        self._worker.start()
        while (answer := self._worker.answer(LOOK_SECONDS)) is None:
            continue
        if answer["kind"] != "ready":
            self._worker.stop()
            raise LinkError(
                f"cannot open this device's model and data: {answer['reason']}", hint="check --model and --data"
            )
        return {name: answer[name] for name in ("base_sha256", "num_examples")}

    def _answer(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rwb") as stream:
            try:
                header, content = receive(stream)
                send(stream, *self._done(header, content))
            except (OSError, ValueError, KeyError, TypeError) as error:
                # The caller has gone, or says what is no call: the work that was done is kept.
                logger.warning("call not answered reason=%s", error)

    def _done(self, header: Mapping[str, Any], content: bytes) -> tuple[dict[str, Any], bytes]:
        inventory = {
            **self._opened,
            "device_id": self._device_id,
            "memory_bytes": self._settings.memory_bytes or total_memory_bytes(),
            "facts": self._senses.facts(),
        }
        if header["kind"] == "inventory":
            return {"inventory": inventory}, b""
        try:
            with self._turn:
                return {"inventory": inventory}, self._tuned(checked_task(header["task"]), content)
        except FedSpineError as error:
            logger.warning("task not done reason=%s", error)
            return {"inventory": inventory, "failure": str(error)}, b""

    def _tuned(self, task: Mapping[str, Any], frame: bytes) -> bytes:
        if self._journal.task() == task and self._journal.result() is not None:
            logger.info("task asked again task=%s", task["task_id"])
            return self._journal.update_path.read_bytes()
        self._check(task, frame)
        self._journal.clear()
        self._journal.begin(task)
        blob = self._journal.inbox / task["blob"]["sha256"]
        write_bytes(blob, frame)
        if self._worker.start():
            logger.info("worker started pid=%s", self._worker.pid)
        update = self._journal.update_path
        self._worker.ask("tune", task=task, blob=str(blob), states=str(self._journal.states), update=str(update))
        answer = self._last_answer(time.monotonic() + task["lease_seconds"])
        if answer["kind"] != "done":
            raise LinkError(str(answer["reason"]))
        manifest = {name: answer[name] for name in ("sha256", "num_bytes")}
        self._journal.finish({"attempt": task["attempt"], **manifest})
        return update.read_bytes()

    def _check(self, task: Mapping[str, Any], frame: bytes) -> None:
        found = hashlib.sha256(frame).hexdigest()
        if found != task["blob"]["sha256"]:
            raise LinkError(f"expected a message {task['blob']['sha256'][:12]}, found {found[:12]}")
        if task["device_id"] != self._device_id:
            raise LinkError(f"expected a task for {self._device_id}, found one for {task['device_id']}")
        if task["base_sha256"] != self._opened["base_sha256"]:
            own = self._opened["base_sha256"][:12]
            raise LinkError(f"expected base model {task['base_sha256'][:12]}, found {own} on this device")
        reason = guards.refusal(
            self._settings,
            message_bytes=task["blob"]["message_bytes"],
            memory_available_bytes=self._senses.memory_available_bytes(),
            disk_free_bytes=self._senses.disk_free_bytes(),
        )
        if reason is not None:
            raise LinkError(reason)

    def _last_answer(self, limit: float) -> Mapping[str, Any]:
        """Waits for the end of a task, which comes by cancelling at the limit, and lets the board cool meanwhile."""
        paused, last_look = False, time.monotonic()
        while True:
            answer = self._worker.answer(LOOK_SECONDS)
            if answer is not None and answer["kind"] not in ("step", "ready"):
                return answer
            if time.monotonic() >= limit:
                logger.warning("work given up: nobody waits for it any more")
                self._worker.ask("cancel")
                limit = math.inf
            if time.monotonic() - last_look >= CELSIUS_SECONDS:
                last_look = time.monotonic()
                reason = guards.rest(self._settings, self._senses.celsius(), resting=paused)
                if (reason is not None) != paused:
                    paused = reason is not None
                    self._worker.ask("pause" if paused else "resume")
                    logger.warning("work %s", f"paused: {reason}" if paused else "goes on")


def _listening(path: Path) -> socket.socket:
    if len(str(path)) > LONGEST_PATH:
        raise UsageError(f"expected a socket path of at most {LONGEST_PATH} bytes, found {path}", hint="give --socket")
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(str(path)) == 0:
            raise UsageError(f"expected no other agent at {path}, found one", hint="stop it first")
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    path.chmod(0o600)
    listener.listen()
    return listener
