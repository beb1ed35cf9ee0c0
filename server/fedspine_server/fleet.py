"""A fleet on a virtual clock: drives the coordinator with any callable that turns assignments into updates.

Comes in: a run's state, devices, and callables that tune, evaluate, save and show. Goes out: the state at the end.
Losses come from whatever `tune` does, seconds from `device_models`. A round ends when the last update is there, or at
its deadline times the slack, but never before a quorum has answered. The order in which `tune` yields changes nothing.

Source: docs/algorithm.md, section 10.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedspine_edge.protocol import Assignment, Layout, Update, tensors_nbytes
from fedspine_server.attackers import falsified
from fedspine_server.closing import round_end
from fedspine_server.coordinator import Participant, assign, close_round, enlist, record_accuracy
from fedspine_server.device_models import (
    Conditions,
    DeviceSpec,
    FleetSettings,
    compute_seconds,
    conditions_of,
    make_specs,
)
from fedspine_server.opening import FORWARD_SHARE
from fedspine_server.results import DeviceResult
from fedspine_server.spool import Spool
from fedspine_server.state import RunState

__all__ = ["DeviceSpec", "FleetSettings", "make_specs", "run_fleet"]

Tune = Callable[[Sequence[Assignment]], Iterable[Update]]
Event = Mapping[str, Any]


@dataclass(frozen=True)
class _Trip:
    """One assignment on its way through a device."""

    spec: DeviceSpec
    conditions: Conditions
    assignment: Assignment
    download_seconds: float
    compute_seconds: float


def run_fleet(
    state: RunState,
    specs: Sequence[DeviceSpec],
    *,
    tune: Tune,
    evaluate: Callable[[RunState], float] | None = None,
    save: Callable[[RunState], None] = lambda state: None,
    on_event: Callable[[Event], None] = lambda event: None,
    eval_every: int = 1,
    fleet: FleetSettings = FleetSettings(),  # noqa: B008 - frozen
    spool_folder: Path | None = None,
) -> RunState:
    """Returns the state after the run's last round; goes on from `state.round_index`, so resume is load and run.

    Args:
        state: A new state, or one loaded from the store.
        specs: The devices.
        tune: Assignments of one round -> their updates, in any order; one that is missing counts as dropped.
        evaluate: State after a round -> accuracy of its global model, 0..1; None never evaluates.
        save: Called with the state after each round.
        on_event: Called with a dict of kind `round_start`, `device` or `round_end`; changes nothing.
        eval_every: Rounds between two evaluations; the last round is always evaluated.
        fleet: The world the devices live in.
        spool_folder: Where updates wait for the end of their round; the system's temporary directory when None.
    """
    while state.round_index < state.settings.rounds:
        with Spool(spool_folder) as spool:
            state = _run_round(state, specs, _sent(tune, specs, state.layout, spool), fleet, on_event)
        last = state.round_index == state.settings.rounds
        if evaluate is not None and (last or state.round_index % eval_every == 0):
            state = record_accuracy(state, evaluate(state))
        save(state)
        on_event({"kind": "round_end", "record": state.history[-1]})
    return state


def _sent(tune: Tune, specs: Sequence[DeviceSpec], layout: Layout, spool: Spool) -> Tune:
    """What reaches the server of what the devices tune: honest or not, and kept on disk."""
    attacks = {spec.device_id: spec.attack for spec in specs}

    def sent(assignments: Sequence[Assignment]) -> Iterable[Update]:
        asked = {assignment.device_id: assignment for assignment in assignments}
        for update in tune(assignments):
            attack = attacks[update.device_id]
            yield spool.keep(falsified(attack, layout, asked[update.device_id], update) if attack else update)

    return sent


def _run_round(
    state: RunState, specs: Sequence[DeviceSpec], tune: Tune, fleet: FleetSettings, on_event: Callable[[Event], None]
) -> RunState:
    assignments, state = assign(_with_present(state, specs))
    by_id = {spec.device_id: spec for spec in specs}
    trips = {a.device_id: _trip(by_id[a.device_id], a, fleet) for a in assignments}
    on_event(_start_event(state, trips))
    deadline = next((choice.deadline_seconds for choice in state.open_choices.values()), None)
    limit = math.inf if deadline is None else deadline * state.settings.deadline_slack
    updates = _tuned(trips, tune, limit, on_event)
    arrivals = {device_id: _arrival(trips[device_id], update) for device_id, update in updates.items()}
    quorum = math.ceil(state.settings.min_quorum * len(trips))
    end = round_end(list(arrivals.values()), num_waiting=0, limit=limit, quorum=quorum)
    if math.isinf(end):
        end = fleet.timeout_seconds
    results = [_result(trip, updates.get(device_id), end) for device_id, trip in trips.items()]
    return close_round(state, results, round_seconds=end)


def _with_present(state: RunState, specs: Sequence[DeviceSpec]) -> RunState:
    """Registers who has joined and lets go who has left by this round; what is known of a device stays."""
    here = [spec for spec in specs if spec.present(state.round_index)]
    return enlist(state, (Participant(spec.device_id, spec.num_examples, spec.memory_bytes) for spec in here))


def _trip(spec: DeviceSpec, assignment: Assignment, fleet: FleetSettings) -> _Trip:
    conditions = conditions_of(spec, assignment.round_index, fleet)
    step_seconds = compute_seconds(
        spec, conditions, num_steps=1, pruning_ratio=assignment.pruning_ratio, rank=assignment.rank, fleet=fleet
    )
    num_steps = assignment.num_steps
    if assignment.budget_seconds is not None:  # the device stops by its own clock, which is virtual here
        fitting = max(assignment.min_steps, math.floor(assignment.budget_seconds / step_seconds))
        num_steps = min(num_steps, fitting)
    if assignment.work == "head-statistics":
        step_seconds *= FORWARD_SHARE
    return _Trip(
        spec=spec,
        conditions=conditions,
        assignment=dataclasses.replace(assignment, num_steps=num_steps, budget_seconds=None),
        download_seconds=8 * tensors_nbytes(assignment) / conditions.bits_per_second,
        compute_seconds=num_steps * step_seconds,
    )


def _upload_seconds(trip: _Trip, update: Update) -> float:
    return 8 * tensors_nbytes(update) / trip.conditions.bits_per_second


def _arrival(trip: _Trip, update: Update) -> float:
    return trip.download_seconds + trip.compute_seconds + _upload_seconds(trip, update)


def _tuned(
    trips: Mapping[str, _Trip], tune: Tune, limit: float, on_event: Callable[[Event], None]
) -> dict[str, Update]:
    """Tunes everyone who will answer and shows them one by one; whether late is known for sure at the round's end."""
    for trip in trips.values():
        if trip.conditions.dropped:
            on_event(_device_event(trip, "dropped", None))
    waiting = {device_id: trip for device_id, trip in trips.items() if not trip.conditions.dropped}
    updates: dict[str, Update] = {}
    if not waiting:
        return updates
    on_event(_device_event(next(iter(waiting.values())), "tuning", None))
    for update in tune([trip.assignment for trip in waiting.values()]):
        if update.device_id not in waiting:
            raise ValueError(f"expected one update a device that was asked, found another of {update.device_id}")
        trip = waiting.pop(update.device_id)
        updates[update.device_id] = update
        on_event(_device_event(trip, "merged" if _arrival(trip, update) <= limit else "late", update))
        if waiting:
            on_event(_device_event(next(iter(waiting.values())), "tuning", None))
    return updates


def _result(trip: _Trip, update: Update | None, end: float) -> DeviceResult:
    facts: dict[str, Any] = {"board": trip.spec.board, "power_mode": trip.conditions.power_mode}
    if update is None:
        detail = "dropped out" if trip.conditions.dropped else "no answer"
        return DeviceResult(trip.spec.device_id, "dropped", detail=detail, **facts)
    arrival = _arrival(trip, update)
    late = arrival > end
    return DeviceResult(
        device_id=trip.spec.device_id,
        arrival="late" if late else "arrived",
        update=update,
        compute_seconds=trip.compute_seconds,
        download_seconds=trip.download_seconds,
        upload_seconds=_upload_seconds(trip, update),
        waiting_seconds=max(0.0, end - arrival),
        detail=f"arrived {arrival - end:.1f} s after the round's end" if late else None,
        **facts,
    )


def _start_event(state: RunState, trips: Mapping[str, _Trip]) -> Event:
    choices = [state.open_choices[device_id] for device_id in trips]
    return {
        "kind": "round_start",
        "round_index": state.round_index,
        "rounds": state.settings.rounds,
        "virtual_seconds": state.clock_seconds,
        "deadline_seconds": choices[0].deadline_seconds if choices else None,
        "devices": [
            {
                "device_id": choice.device_id,
                "board": trips[choice.device_id].spec.board,
                "pruning_ratio": choice.pruning_ratio,
                "rank": choice.rank,
                "num_steps": choice.num_steps,
                "reason": choice.reason,
            }
            for choice in choices
        ],
    }


def _device_event(trip: _Trip, state: str, update: Update | None) -> Event:
    event = {
        "kind": "device",
        "device_id": trip.spec.device_id,
        "board": trip.spec.board,
        "power_mode": trip.conditions.power_mode,
        "pruning_ratio": trip.assignment.pruning_ratio,
        "rank": trip.assignment.rank,
        "num_steps": trip.assignment.num_steps,
        "state": state,
    }
    if update is None:
        return event
    return {
        **event,
        "loss_before": update.report.loss_before,
        "loss_after": update.report.loss_after,
        "download_seconds": trip.download_seconds,
        "compute_seconds": trip.compute_seconds,
        "upload_seconds": _upload_seconds(trip, update),
    }
