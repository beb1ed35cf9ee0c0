"""The agent: says hello, waits for tasks, has them done, delivers; for days, whatever happens to the network.

Comes in: a state directory. Goes out: results. At every moment what is on disk tells where it stands, so that it can be
killed anywhere: a task is kept before work on it begins, an update before it is sent, both until the server answered.
"""

from __future__ import annotations

import logging
import random
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedspine_edge.agent import guards
from fedspine_edge.agent.identity import Identity
from fedspine_edge.agent.journal import Journal
from fedspine_edge.agent.link import DismissedError, Link, NotTakenError, UnreachableError
from fedspine_edge.agent.models import Models
from fedspine_edge.agent.rollout_work import RolloutWork
from fedspine_edge.agent.senses import Senses, total_memory_bytes
from fedspine_edge.agent.settings import AgentSettings
from fedspine_edge.agent.tasks import checked_task, inline_message, own_part
from fedspine_edge.agent.worker_process import WorkerProcess
from fedspine_edge.errors import CheckpointError, IncompatibleError, LinkError
from fedspine_edge.systemd import report_heard

logger = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 0.5, 60.0
POLL_SECONDS = 1.0
CELSIUS_SECONDS = 5.0
MAX_REASON = 400
NO_MODEL = "0" * 64


class Agent:
    """One device at work.

    Args:
        state: Its state directory.
        identity: Who it is.
        settings: How it works.
        beat: Called whenever the loop shows that it lives.
        sleep: Waits some seconds.
    """

    def __init__(
        self,
        state: Path,
        identity: Identity,
        settings: AgentSettings,
        *,
        beat: Callable[[], None] = lambda: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._settings = settings
        self._identity = identity
        self._beat = beat
        self._sleep = sleep
        self._journal = Journal(state)
        self._senses = Senses(state)
        self._worker = WorkerProcess(settings)
        self._link = Link(identity, uuid.uuid4().hex)
        self._rollout = RolloutWork(Models(state), self._link, self._senses, settings, beat)
        self._inventory: Mapping[str, Any] = {}
        self._welcome: Mapping[str, Any] = {}
        self._idle_since = time.monotonic()

    def run(self) -> None:
        """Works until the server dismisses this device.

        Raises:
            LinkError: Dismissed, or its own model or data cannot be opened.
        """
        try:
            self._open_worker()
            self._patiently(self._hello)
            while True:
                self._beat()
                self._patiently(self._next)
        finally:
            self._worker.stop()
            self._link.close()

    def _patiently(self, action: Callable[[], None]) -> None:
        """Tries until the server can be reached; waits longer each time, never in step with other devices."""
        seconds = FIRST_BACKOFF_SECONDS
        while True:
            try:
                action()
                return
            except UnreachableError as error:
                wait = seconds * random.uniform(0.5, 1.0)
                logger.warning("server unreachable wait_seconds=%.1f reason=%s", wait, error)
            waited = 0.0
            while waited < wait:
                self._beat()
                self._sleep(min(POLL_SECONDS, wait - waited))
                waited += POLL_SECONDS
            seconds = min(2 * seconds, LONGEST_BACKOFF_SECONDS)

    def _open_worker(self) -> None:
        """Has the worker open model and data, and learns what they are; a device without a model is only seen."""
        if not self._settings.model:
            self._inventory = {"base_sha256": NO_MODEL, "num_examples": 0}
            return
        self._worker.start()
        answer = self._worker.answer(POLL_SECONDS)
        while answer is None:
            self._beat()
            answer = self._worker.answer(POLL_SECONDS)
        if answer["kind"] != "ready":
            raise LinkError(
                f"cannot open this device's model and data: {answer['reason']}",
                hint="check --model and --data, then join again",
            )
        self._inventory = {name: answer[name] for name in ("base_sha256", "num_examples")}
        self._idle_since = time.monotonic()

    def _hello(self) -> None:
        task = self._journal.task()
        memory = self._settings.memory_bytes or total_memory_bytes()
        in_hand = {name: task[name] for name in ("task_id", "attempt")} if task else None
        said = {**self._inventory, "facts": self._senses.facts(), "memory_bytes": memory}
        self._welcome = self._link.hello(said, in_hand)
        report_heard()
        logger.info("hello device=%s status=%s", self._identity.device_id, self._welcome["status"])
        if self._welcome.get("task") == "drop":
            logger.info("task in hand is no longer wanted task=%s", in_hand)
            self._journal.clear()

    def _next(self) -> None:
        """Goes on where the journal says: deliver what is done, do what is begun, or wait for a task."""
        task = self._journal.task()
        if task is None:
            self._rest_worker()
            self._rollout.catch_up()
            reply = self._link.task(float(self._welcome["wait_seconds"]), self._rollout.done)
            if reply is not None and "rollout" in reply:
                self._worker.stop()  # a model is measured with the memory and the quiet that its users have
                self._rollout.follow(reply["rollout"], self._welcome["progress_seconds"])
            elif reply is not None:
                self._take(reply)
            return
        manifest = self._journal.result()
        if manifest is None:
            manifest = self._work(task)
        if manifest is not None:
            self._deliver(task, manifest)

    def _take(self, reply: Mapping[str, Any]) -> None:
        """Begins a task; one that this version cannot read is given back, so that the server hears why.

        Raises:
            UnreachableError: It cannot even be given back: ask again later, as of a server that is away.
        """
        try:
            task = checked_task(reply)
        except IncompatibleError as error:
            try:
                task = own_part(reply)
            except IncompatibleError:
                raise UnreachableError(f"{error}: agent and server do not understand each other") from error
            self._deliver(task, self._failed(task, f"task not understood: {error}; upgrade the older side"))
            return
        self._begin(task, inline_message(reply, task))

    def _begin(self, task: Mapping[str, Any], message: bytes | None) -> None:
        try:
            self._journal.begin(task, message)
        except CheckpointError as error:
            self._deliver(task, self._failed(task, str(error)))

    def _rest_worker(self) -> None:
        if self._worker.pid and time.monotonic() - self._idle_since > self._settings.worker_idle_seconds:
            logger.info("worker stopped after idle_seconds=%.0f", self._settings.worker_idle_seconds)
            self._worker.stop()

    def _work(self, task: Mapping[str, Any]) -> dict[str, Any] | None:
        """Does a task; returns what to tell the server, None when nobody wants it any more."""
        attempt, blob = task["attempt"], task["blob"]
        reason = guards.refusal(
            self._settings,
            message_bytes=blob["message_bytes"],
            memory_available_bytes=self._senses.memory_available_bytes(),
            disk_free_bytes=self._senses.disk_free_bytes(),
        )
        if reason is None and task["base_sha256"] != self._inventory["base_sha256"]:
            found = self._inventory["base_sha256"][:12]
            reason = f"expected base model {task['base_sha256'][:12]}, found {found} on this device"
        if reason is not None:
            return self._failed(task, reason)
        start, path = time.monotonic(), self._journal.inbox / blob["sha256"]
        try:
            self._link.download(blob["sha256"], blob["num_bytes"], path)
        except (CheckpointError, NotTakenError) as error:
            return self._failed(task, str(error))
        download_seconds = time.monotonic() - start
        answer = self._tuned(task, path)
        self._idle_since = time.monotonic()
        if answer is None:
            self._journal.clear()
            return None
        if answer["kind"] != "done":
            return self._failed(task, answer["reason"])
        manifest = {"attempt": attempt, "sha256": answer["sha256"], "num_bytes": answer["num_bytes"]}
        manifest |= {"download_seconds": download_seconds}
        try:
            self._journal.finish(manifest)
        except CheckpointError as error:
            return self._failed(task, str(error))
        return manifest

    def _failed(self, task: Mapping[str, Any], reason: str) -> dict[str, Any]:
        printable = "".join(c if c.isprintable() else " " for c in reason)[:MAX_REASON]
        logger.warning("task not done task=%s reason=%s", task["task_id"], printable)
        manifest = {"attempt": task["attempt"], "failure": printable}
        try:
            self._journal.finish(manifest)
        except CheckpointError as error:
            # A full disk must not keep the server from hearing of it: after a power cut the task is begun again.
            logger.warning("failure not kept reason=%s", error)
        return manifest

    def _tuned(self, task: Mapping[str, Any], blob: Path) -> Mapping[str, Any] | None:
        """Has the worker tune and reports meanwhile; returns its last answer, None when the task was cancelled."""
        if self._worker.start():
            logger.info("worker started pid=%s", self._worker.pid)
        self._worker.ask(
            "tune", task=task, blob=str(blob), states=str(self._journal.states), update=str(self._journal.update_path)
        )
        report: dict[str, Any] = {"attempt": task["attempt"], "paused": None}
        last_report = last_look = time.monotonic()
        while True:
            self._beat()
            answer = self._worker.answer(POLL_SECONDS)
            if answer is not None and answer["kind"] == "step":
                report |= {name: answer[name] for name in ("step", "num_steps", "loss")}
            elif answer is not None and answer["kind"] != "ready":
                return answer
            now = time.monotonic()
            if now - last_look >= CELSIUS_SECONDS:
                last_look, report["paused"] = now, self._look_at_heat(report["paused"])
            if now - last_report >= self._welcome["progress_seconds"]:
                last_report = now
                if self._cancelled(task, report):
                    self._worker.ask("cancel")
                    self._drain()
                    return None

    def _look_at_heat(self, resting: str | None) -> str | None:
        reason = guards.rest(self._settings, self._senses.celsius(), resting=resting is not None)
        if (reason is None) != (resting is None):
            self._worker.ask("pause" if reason else "resume")
            logger.warning("work %s", f"paused: {reason}" if reason else "goes on")
        return reason

    def _cancelled(self, task: Mapping[str, Any], report: Mapping[str, Any]) -> bool:
        """Reports; a server that cannot be reached cancels nothing."""
        try:
            reply = self._link.progress(task["task_id"], {**report, "sample": self._senses.sample(self._worker.pid)})
        except UnreachableError as error:
            logger.warning("progress not delivered reason=%s", error)
            return False
        except NotTakenError as error:
            logger.warning("task no longer known reason=%s", error)
            return True
        if reply["cancel"]:
            logger.info("task cancelled task=%s reason=%s", task["task_id"], reply["detail"])
        return bool(reply["cancel"])

    def _drain(self) -> None:
        """Waits for the worker's last word on a cancelled task; one that does not stop is ended."""
        for _ in range(30):
            self._beat()
            answer = self._worker.answer(POLL_SECONDS)
            if answer is not None and answer["kind"] in ("failed", "done", "died"):
                return
        self._worker.stop()

    def _deliver(self, task: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        """Sends what there is to send; the task is forgotten once the server has answered."""
        try:
            if manifest.get("sha256") is not None:
                start = time.monotonic()
                manifest = {**manifest, **self._link.upload(task, self._journal.update_path)}
                manifest["upload_seconds"] = time.monotonic() - start
            reply = self._link.result(task["task_id"], manifest)
            logger.info("task over task=%s fate=%s detail=%s", task["task_id"], reply["fate"], reply["detail"])
        except NotTakenError as error:
            logger.warning("task given up task=%s reason=%s", task["task_id"], error)
        self._journal.clear()


__all__ = ["Agent", "DismissedError", "IncompatibleError"]
