"""What a rollout asks, done: fetched, installed beside the current model, measured here, kept or given up, told.

Comes in: an order. Goes out: files and reports. `rollout.next_action` says what to do; here it is done, and on disk
before the record says so. Words on the way are lost when the server is away, the last one is not.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from fedspine_edge.agent.health_process import check_health
from fedspine_edge.agent.link import Link, NotTakenError, UnreachableError
from fedspine_edge.agent.models import Models
from fedspine_edge.agent.rollout import (
    CHECKING,
    COMMITTED,
    COMMITTING,
    INSTALLED,
    RETURNING,
    ROLLED_BACK,
    Action,
    Order,
    Record,
    begun,
    failed,
    next_action,
    unfinished,
)
from fedspine_edge.agent.senses import Senses
from fedspine_edge.agent.settings import AgentSettings
from fedspine_edge.agent.tasks import checked_order
from fedspine_edge.errors import CheckpointError, IncompatibleError
from fedspine_edge.rollout_gate import unmet

logger = logging.getLogger(__name__)

MAX_REASON = 400


class _NotWantedError(Exception):
    """The server no longer wants this rollout on this device."""


class RolloutWork:
    """One device's part in rollouts.

    Args:
        models: Its models.
        link: Its server.
        senses: What is free of its disk.
        settings: Its limits.
        beat: Shows that it lives.
    """

    def __init__(
        self, models: Models, link: Link, senses: Senses, settings: AgentSettings, beat: Callable[[], None]
    ) -> None:
        self._models, self._link, self._senses, self._settings, self._beat = models, link, senses, settings, beat
        self._record = models.record()
        self._progress_seconds = 10.0
        self._asked: dict[Action, Callable[[Order], Record]] = {
            Action.BEGIN: self._begin,
            Action.DOWNLOAD: self._download,
            Action.CHECK: self._check,
        }
        self._simple: dict[Action, Callable[[], Record]] = {
            Action.GIVE_UP: self._give_up,
            Action.SWITCH: self._switch,
            Action.TAKE_BACK: lambda: self._now(RETURNING),
            Action.RETURN: self._return,
            Action.LEAVE: lambda: self._now(ROLLED_BACK),
            Action.TELL: self._tell_the_end,
        }

    @property
    def done(self) -> str:
        """The last order that was done, as the server knows it."""
        return self._record.done

    def follow(self, asked: Mapping[str, Any], progress_seconds: float) -> None:
        """Does what an order asks, from where this device stands.

        Args:
            asked: As the server says it.
            progress_seconds: How often a long step says how far it is.

        Raises:
            UnreachableError: Go on later: the server or the disk cannot take what is to be said or kept.
        """
        self._progress_seconds = progress_seconds
        try:
            order = checked_order(asked)
        except IncompatibleError as error:
            raise UnreachableError(f"{error}: agent and server do not understand each other") from error
        self._go_on(lambda: next_action(order, self._record), order)

    def catch_up(self) -> None:
        """Ends what was begun before the agent was, and tells the end that was not told, whatever is asked by now.

        Raises:
            UnreachableError: As `follow`.
        """
        self._go_on(lambda: unfinished(self._record), None)

    def _go_on(self, following: Callable[[], Action], order: Order | None) -> None:
        try:
            while (action := following()) is not Action.REST:
                self._beat()
                record = self._simple[action]() if action in self._simple else self._asked[action](_given(order))
                logger.info("rollout did=%s phase=%s reason=%s", action.value, record.phase, record.reason)
                self._record = self._models.keep_record(record)
        except _NotWantedError as error:
            logger.info("rollout no longer wanted reason=%s", error)
        except (CheckpointError, OSError) as error:
            raise UnreachableError(f"rollout stands: {error}") from error

    def _now(self, phase: str) -> Record:
        return dataclasses.replace(self._record, phase=phase)

    def _begin(self, order: Order) -> Record:
        current = self._models.current()
        self._models.keep_only(current, order.sha256)
        return begun(order, current)

    def _download(self, order: Order) -> Record:
        self._say(self._record)
        staged, partial = self._models.staged(order.sha256), self._models.staged(f"{order.sha256}.partial")
        place = self._models.path(order.sha256)
        there = sum(path.stat().st_size for path in (staged, partial, place) if path.is_file())
        needed = self._settings.min_disk_bytes + max(0, order.num_bytes - there)
        if (free := self._senses.disk_free_bytes()) < needed:
            return failed(self._record, f"expected {needed} bytes free on disk, found {free}")
        try:
            # One that is installed already is proved again: it may have lain here for years.
            self._link.download(order.sha256, order.num_bytes, place if place.is_file() else staged, self._in_touch())
        except (CheckpointError, NotTakenError) as error:
            return failed(self._record, _printable(str(error)))
        self._models.install(order.sha256)
        return self._now(INSTALLED)

    def _check(self, order: Order) -> Record:
        if self._record.phase == INSTALLED:
            self._say(self._record)
        # The try is on record before it begins: it may take the whole board down.
        self._record = self._models.keep_record(
            dataclasses.replace(self._record, phase=CHECKING, tries=self._record.tries + 1)
        )
        self._say(self._record)
        before = self._record.before
        said = check_health(
            self._models.path(order.sha256),
            self._models.path(before) if before is not None else None,
            passage=self._models.keep_passage(order.passage),
            num_threads=self._settings.threads or len(os.sched_getaffinity(0)),
            beat=self._in_touch(),
        )
        if "failure" in said:
            return failed(self._record, _printable(said["failure"]))
        record = dataclasses.replace(self._record, figures=said["figures"], base=said["base"])
        reason = unmet(order.conditions, said["figures"], said["base"])
        return failed(record, reason) if reason else dataclasses.replace(record, phase=COMMITTING)

    def _give_up(self) -> Record:
        return failed(self._record, f"the device went down in each of {self._record.tries} checks of this model")

    def _switch(self) -> Record:
        self._models.switch(self._record.sha256)
        return self._now(COMMITTED)

    def _return(self) -> Record:
        self._models.switch(self._record.before)
        return self._now(ROLLED_BACK)

    def _tell_the_end(self) -> Record:
        try:
            self._link.rollout(self._record.rollout_id, self._report(self._record))
        except NotTakenError as error:
            logger.warning("end of rollout not taken reason=%s", error)
        self._models.keep_only(self._models.current(), self._kept_before())
        return dataclasses.replace(self._record, told=self._record.phase)

    def _kept_before(self) -> str | None:
        """The model before stays as long as it may be wanted back."""
        return self._record.before if self._record.phase == COMMITTED else None

    def _say(self, record: Record, *, received_bytes: int = 0) -> None:
        """Says how far it is; a server that cannot be reached stops nothing.

        Raises:
            _NotWantedError: The server wants something else by now.
        """
        try:
            reply = self._link.rollout(record.rollout_id, {**self._report(record), "received_bytes": received_bytes})
        except UnreachableError as error:
            logger.warning("rollout's progress not delivered reason=%s", error)
            return
        except NotTakenError as error:
            raise UnreachableError(f"report not taken: {error}") from error  # asked again, but not at once
        if not reply["go_on"]:
            raise _NotWantedError(str(reply["detail"]))

    def _in_touch(self) -> Callable[..., None]:
        """Returns what a long step calls all the time: it beats, and now and then says how far the step is."""
        last = time.monotonic()

        def touch(received_bytes: int = 0) -> None:
            nonlocal last
            self._beat()
            if time.monotonic() - last >= self._progress_seconds:
                last = time.monotonic()
                self._say(self._record, received_bytes=received_bytes)

        return touch

    def _report(self, record: Record) -> dict[str, Any]:
        said = {"state": record.phase, "sha256": record.sha256, "current": self._models.current()}
        return said | {"figures": record.figures, "base": record.base, "reason": record.reason}


def _given(order: Order | None) -> Order:
    assert order is not None
    return order


def _printable(reason: str) -> str:
    return "".join(c if c.isprintable() else " " for c in reason)[:MAX_REASON]
