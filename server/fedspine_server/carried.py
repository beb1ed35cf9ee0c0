"""A run held over a carrier: rounds opened, closed and saved around the coordinator's pure functions.

Comes in: a state, a carrier, terms. Goes out: the state at the end. A round ends with the last answer, at its deadline
once a quorum has answered, or at the timeout. An answer that comes later is merged in the next closing with less
weight; one that comes too late for that is given up. A device that comes back within a round is asked again. The state
is saved when a round opens and when it closes, so after a kill the same assignments are handed out.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedspine_edge.protocol import Assignment
from fedspine_server import coordinator
from fedspine_server.carriers import Carrier, Event, Failed, Inventory, Joined, Left, Result
from fedspine_server.closing import round_end
from fedspine_server.lateness import LateResult
from fedspine_server.recorded import with_recorded_seconds
from fedspine_server.results import DeviceResult
from fedspine_server.spool import Spool
from fedspine_server.state import RunState

LONGEST_WAIT_SECONDS = 1.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Terms:
    """How rounds are held.

    Attributes:
        min_devices: Devices that must be there before a round begins.
        round_timeout_seconds: A round ends after so long whatever is missing.
        max_staleness: Rounds by which an answer may come late and still count.
        timings: Recorded rounds whose seconds replace the measured ones; None measures.
    """

    min_devices: int = 1
    round_timeout_seconds: float = 3600.0
    max_staleness: int = 1
    timings: Sequence[Mapping[str, Any]] | None = None


@dataclass
class _Round:
    """A round that is open."""

    state: RunState
    opened_at: float
    waiting: set[str]
    spool: Spool
    answers: dict[str, tuple[float, DeviceResult]] = field(default_factory=dict)
    late: list[LateResult] = field(default_factory=list)


class CarriedRun:
    """A run and the carrier that carries it.

    Args:
        state: A new state, or one loaded from the store.
        carrier: Reaches the devices.
        terms: How rounds are held.
        save: Keeps a state.
        spool_folder: Where updates wait for their round's end; the system's temporary directory when None.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        state: RunState,
        carrier: Carrier,
        terms: Terms,
        *,
        save: Callable[[RunState], None],
        spool_folder: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state = state
        self._carrier = carrier
        self._terms = terms
        self._save = save
        self._spool_folder = spool_folder
        self._clock = clock
        self._asked: dict[tuple[str, int], Assignment] = {}
        self._late: list[LateResult] = []
        self._facts: Mapping[str, Inventory] = {}

    def run(self) -> RunState:
        """Holds all rounds that are left and returns the state after the last."""
        while self._state.round_index < self._state.settings.rounds:
            self._state = self._one_round()
            self._save(self._state)
            logger.info(
                "round closed round=%d merged=%d", self._state.round_index - 1, self._state.history[-1]["num_merged"]
            )
        self._give_up(self._state.settings.rounds)
        return self._state

    def _one_round(self) -> RunState:
        present = self._present()
        state = self._state
        if not state.open_choices:  # a round that was open when the server died keeps whom it was opened for
            state = coordinator.enlist(
                state, (coordinator.Participant(n, i.num_examples, i.memory_bytes) for n, i in sorted(present.items()))
            )
        assignments, state = coordinator.assign(state)
        self._save(state)
        oldest = state.round_index - self._terms.max_staleness
        self._give_up(oldest)
        self._asked |= {(asked.device_id, state.round_index): asked for asked in assignments}
        with Spool(self._spool_folder) as spool:
            opened = _Round(state, self._clock(), {asked.device_id for asked in assignments}, spool, late=self._late)
            self._late = []
            self._carrier.offer(assignments)
            return self._closed(opened, self._await_end(opened))

    def _give_up(self, oldest: int) -> None:
        """Forgets what was asked in rounds before the oldest whose answers still count."""
        for key in [key for key in self._asked if key[1] < oldest]:
            self._carrier.cancel(*key)
            del self._asked[key]

    def _present(self) -> Mapping[str, Inventory]:
        """Waits until enough devices with the run's base model and examples are there."""
        said = -1
        while True:
            found = self._carrier.inventory()
            base = self._state.layout.base_sha256
            present = {name: one for name, one in found.items() if one.base_sha256 == base and one.num_examples > 0}
            if len(present) >= self._terms.min_devices:
                self._facts = found
                return present
            if said != len(present):
                said = len(present)
                logger.info("waiting for %d devices with this base model, found %d", self._terms.min_devices, said)
            # What comes meanwhile answers a round that is over.
            self._late += self._late_ones(self._carrier.events(LONGEST_WAIT_SECONDS), self._state.round_index)

    def _await_end(self, opened: _Round) -> float:
        """Takes answers until the round's end and returns it."""
        while True:
            end, now = self._end(opened), self._clock()
            if end <= now:
                return end
            self._take(opened, self._carrier.events(min(LONGEST_WAIT_SECONDS, end - now)))

    def _end(self, opened: _Round) -> float:
        if not opened.waiting:
            return self._clock()
        state, timeout = opened.state, self._terms.round_timeout_seconds
        deadlines = [c.deadline_seconds for c in state.open_choices.values() if c.deadline_seconds is not None]
        limit = math.inf
        if deadlines and not self._terms.timings:
            limit = min(deadlines) * state.settings.deadline_slack
        arrivals = [at for at, result in opened.answers.values() if result.arrival == "arrived"]
        quorum = math.ceil(state.settings.min_quorum * len(state.open_choices))
        end = round_end(arrivals, num_waiting=len(opened.waiting), limit=limit, quorum=quorum)
        return opened.opened_at + min(end, timeout)

    def _take(self, opened: _Round, events: Sequence[Event]) -> None:
        now, index = self._clock() - opened.opened_at, opened.state.round_index
        for event in events:
            if isinstance(event, Joined):
                self._ask_again(opened, event.device_id)
            elif event.device_id not in opened.waiting:
                continue
            elif isinstance(event, Left):
                gone = Failed(event.device_id, index, "it can no longer be reached")
                self._answered(opened, now, gone)
            elif event.round_index == index:
                self._answered(opened, now, event)
        opened.late += self._late_ones(events, index)

    def _answered(self, opened: _Round, now: float, event: Result | Failed) -> None:
        opened.waiting.discard(event.device_id)
        result = self._result(event)
        if result.update is not None:  # once: what a carrier brings twice does not count twice
            self._asked.pop((event.device_id, event.round_index), None)
            result = dataclasses.replace(result, update=opened.spool.keep(result.update))
        opened.answers[event.device_id] = (now, result)

    def _ask_again(self, opened: _Round, device_id: str) -> None:
        """A device that came back and owes an answer: it may have it on disk."""
        asked = self._asked.get((device_id, opened.state.round_index))
        if asked is not None:
            logger.info("asked again device=%s round=%d", device_id, asked.round_index)
            opened.answers.pop(device_id, None)
            opened.waiting.add(device_id)
            self._carrier.offer([asked])

    def _result(self, event: Result | Failed) -> DeviceResult:
        known = self._facts.get(event.device_id)
        facts = known.facts if known else {}
        board: dict[str, Any] = {"board": facts.get("board") or "", "power_mode": facts.get("power_mode") or ""}
        if isinstance(event, Failed):
            return DeviceResult(event.device_id, "dropped", detail=f"failed: {event.reason}", **board)
        said = event.update.report.compute_seconds
        compute = float(said) if isinstance(said, (int, float)) and math.isfinite(said) else 0.0
        # A carrier sees a whole trip; what was not work counts as transfer.
        transfer = max(0.0, event.seconds - compute)
        return DeviceResult(
            event.device_id,
            "arrived",
            update=event.update,
            compute_seconds=compute,
            upload_seconds=transfer,
            **board,
        )

    def _late_ones(self, events: Sequence[Event], round_index: int) -> list[LateResult]:
        late = []
        for event in events:
            if not isinstance(event, Result) or event.round_index >= round_index:
                continue
            asked = self._asked.pop((event.device_id, event.round_index), None)
            if asked is not None:
                late.append(LateResult(asked, dataclasses.replace(self._result(event), arrival="late")))
        return late

    def _closed(self, opened: _Round, end: float) -> RunState:
        round_seconds = end - opened.opened_at
        results = [
            dataclasses.replace(result, waiting_seconds=max(0.0, round_seconds - at))
            for at, result in opened.answers.values()
        ]
        late: Sequence[LateResult] = opened.late
        if self._terms.timings:
            results, round_seconds = with_recorded_seconds(results, self._terms.timings[opened.state.round_index])
            late = ()  # recorded seconds are those of a fleet that had no late updates to merge
        return coordinator.close_round(opened.state, results, round_seconds=round_seconds, late=late)
