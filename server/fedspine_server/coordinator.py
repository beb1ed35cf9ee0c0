"""A round as pure functions: init, register, leave, enlist, assign, close_round, record_accuracy.

Comes in: settings, a layout, who is there, and what came back of a round. Goes out: the next state. Clock, randomness
and network are arguments, so the simulated fleet, a deployed server, resume and tests run the same code.

Source: FedSpine (arXiv 2501.02438), the server's side of a round; docs/algorithm.md, section 2.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from fedspine_edge.protocol import Assignment, Layout
from fedspine_server.aggregation import Factors
from fedspine_server.aggregation.low_rank import random_rows
from fedspine_server.arms import allowed_arms, cost_law, may_revive, schedule_ratio
from fedspine_server.assignments import RoundArrays, build_assignment, kept_members
from fedspine_server.controllers import CONTROLLERS, Context, DeviceFacts
from fedspine_server.lateness import LateResult, judge_late
from fedspine_server.merging import merge
from fedspine_server.opening import as_timings, is_opening, opening_choices
from fedspine_server.results import DeviceResult, judge, round_record
from fedspine_server.settings import RunSettings
from fedspine_server.state import DeviceState, RunState, adapter_sha256, weight_of

PARTICIPANTS_STREAM = 5  # keeps this draw apart from others of the same seed and round

__all__ = [
    "DeviceResult",
    "LateResult",
    "Participant",
    "RunSettings",
    "RunState",
    "adapter_sha256",
    "assign",
    "close_round",
    "enlist",
    "init",
    "leave",
    "record_accuracy",
    "register",
]


def init(settings: RunSettings, layout: Layout, task_head: Mapping[str, np.ndarray]) -> RunState:
    """Returns the state before the first round: random A, zero B, nobody registered.

    Args:
        settings: The run's settings.
        layout: The base model's layout.
        task_head: First value of each densely trained parameter, float32.

    Raises:
        ValueError: The task head is not the layout's.
    """
    expected = {name: tuple(shape) for name, shape in layout.task_head}
    found = {name: value.shape for name, value in task_head.items()}
    if expected != found:
        raise ValueError(f"expected task head {expected}, found {found}")
    adapter = {}
    for matrix in layout.matrices:
        generator = np.random.default_rng([settings.seed, zlib.crc32(matrix.name.encode())])
        lora_a = random_rows(generator, settings.max_rank, matrix.in_features).astype(np.float32)
        adapter[matrix.name] = Factors(lora_a, np.zeros((matrix.out_features, settings.max_rank), dtype=np.float32))
    identity = json.dumps([settings.to_json(), layout.to_json()], sort_keys=True)
    return RunState(
        run_id=f"run-{hashlib.sha256(identity.encode()).hexdigest()[:12]}",
        settings=settings,
        layout=layout,
        round_index=0,
        clock_seconds=0.0,
        adapter=adapter,
        task_head={name: np.asarray(value, dtype=np.float32) for name, value in task_head.items()},
        importance={group.name: np.full(group.num_members, np.nan, dtype=np.float32) for group in layout.groups},
        mean_input={
            matrix.name: np.full(matrix.in_features, np.nan, dtype=np.float32)
            for matrix in layout.matrices
            if matrix.in_group is not None
        },
        devices={},
        controller_state=CONTROLLERS[settings.controller].init(settings),
    )


@dataclasses.dataclass(frozen=True)
class Participant:
    """A device that is there.

    Attributes:
        device_id: Which device.
        num_examples: Examples it trains on.
        memory_bytes: Its memory limit.
    """

    device_id: str
    num_examples: int
    memory_bytes: int


def enlist(state: RunState, present: Iterable[Participant]) -> RunState:
    """Returns the state in which just these devices take part; one that comes back keeps its past.

    Raises:
        ValueError: A device without examples.
    """
    devices = {name: dataclasses.replace(d, active=False) if d.active else d for name, d in state.devices.items()}
    for one in present:
        if one.num_examples < 1:
            raise ValueError(f"device {one.device_id} must have at least 1 example, found {one.num_examples}")
        known = devices.get(one.device_id) or DeviceState(one.device_id, one.num_examples, one.memory_bytes)
        devices[one.device_id] = dataclasses.replace(
            known, num_examples=one.num_examples, memory_bytes=one.memory_bytes, active=True
        )
    return dataclasses.replace(state, devices=devices)


def register(state: RunState, device_id: str, *, num_examples: int, memory_bytes: int) -> RunState:
    """Returns the state with one more device taking part from the next round on; raises as `enlist` does."""
    active = [Participant(d.device_id, d.num_examples, d.memory_bytes) for d in state.devices.values() if d.active]
    return enlist(state, [*active, Participant(device_id, num_examples, memory_bytes)])


def leave(state: RunState, device_id: str) -> RunState:
    """Returns the state without that device in rounds to come; raises KeyError for one that never registered."""
    device = dataclasses.replace(state.devices[device_id], active=False)
    return dataclasses.replace(state, devices={**state.devices, device_id: device})


def assign(state: RunState) -> tuple[tuple[Assignment, ...], RunState]:
    """Returns this round's assignments, sorted by device_id, and the state that waits for their answers.

    Asked again in the same round (after a restart) it returns the same assignments.

    Raises:
        ValueError: The run is over.
    """
    settings, round_index = state.settings, state.round_index
    if round_index >= settings.rounds:
        raise ValueError(f"the run is over after {settings.rounds} rounds, found a call for round {round_index}")
    if not state.open_choices and is_opening(settings, state.layout, round_index):
        active = [device for device in state.devices.values() if device.active]
        state = dataclasses.replace(state, open_choices=opening_choices(settings, active))
    elif not state.open_choices:
        context = _context(state)
        if not context.devices:
            return (), state
        choices, controller_state = CONTROLLERS[settings.controller].propose(state.controller_state, context)
        opened = {choice.device_id: choice for choice in choices}
        state = dataclasses.replace(state, open_choices=opened, controller_state=controller_state)
    arrays = RoundArrays(state)
    return tuple(
        build_assignment(state, state.open_choices[name], arrays) for name in sorted(state.open_choices)
    ), state


def close_round(
    state: RunState, results: Sequence[DeviceResult], *, round_seconds: float, late: Sequence[LateResult] = ()
) -> RunState:
    """Returns the state after a round: updates admitted, merged and learned from, the round on record.

    The order of the results does not matter; a device without a result counts as dropped.

    Args:
        state: The state `assign` returned.
        results: What became of the assignments.
        round_seconds: Length of the round.
        late: Answers to earlier rounds that came since the last closing, each given once.
    """
    arrays = RoundArrays(state)
    controller = CONTROLLERS[state.settings.controller]
    by_device = {result.device_id: result for result in results}
    verdicts = [
        judge(state, by_device.get(device_id) or DeviceResult(device_id, "dropped", detail="no answer"), arrays)
        for device_id in sorted(state.open_choices)
    ]
    fresh = [v.update for v in verdicts if v.update is not None]
    late_verdicts = judge_late(state, late, [update.device_id for update in fresh])
    late_outcomes = [outcome for verdict in late_verdicts if (outcome := verdict.outcome(state)) is not None]
    outcomes = [*(verdict.outcome for verdict in verdicts), *late_outcomes]
    updates = [*fresh, *(verdict.update for verdict in late_verdicts if verdict.update is not None)]
    record = round_record(state, verdicts, round_seconds)
    record["late"] = [verdict.record(state.round_index) for verdict in late_verdicts]
    opening = is_opening(state.settings, state.layout, state.round_index)
    devices = dict(state.devices)
    for update in () if opening else updates:
        kept = kept_members(update, state.layout)
        last = devices[update.device_id]
        devices[update.device_id] = dataclasses.replace(last, last_ratio=update.pruning_ratio, kept=kept)
    return dataclasses.replace(
        merge(state, updates),
        round_index=state.round_index + 1,
        clock_seconds=state.clock_seconds + round_seconds,
        devices=devices,
        controller_state=controller.observe(state.controller_state, as_timings(outcomes) if opening else outcomes),
        open_choices={},
        history=(*state.history, record),
    )


def record_accuracy(state: RunState, accuracy: float) -> RunState:
    """Returns the state with the accuracy of the last closed round on record."""
    return dataclasses.replace(state, history=(*state.history[:-1], {**state.history[-1], "accuracy": accuracy}))


def _context(state: RunState) -> Context:
    settings, round_index = state.settings, state.round_index
    law = cost_law(state.layout, settings.update_dtype)
    active = _participants(state, [name for name in sorted(state.devices) if state.devices[name].active])
    total = sum(weight_of(settings, device) for device in active)
    facts = tuple(
        DeviceFacts(
            device_id=device.device_id,
            num_examples=device.num_examples,
            weight=weight_of(settings, device) / total,
            arms=allowed_arms(
                settings, law, round_index, last_ratio=device.last_ratio, memory_bytes=device.memory_bytes
            ),
            memory_bytes=device.memory_bytes,
        )
        for device in active
    )
    target = schedule_ratio(settings, round_index)
    return Context(settings, round_index, target, may_revive(settings, round_index), law, facts)


def _participants(state: RunState, active: Sequence[str]) -> list[DeviceState]:
    """Who takes part in the round: all, or a uniform draw that depends on nothing but seed, round and who is there."""
    settings, names = state.settings, list(active)
    if 0 < settings.participants < len(names):
        generator = np.random.default_rng([settings.seed, state.round_index, PARTICIPANTS_STREAM])
        names = sorted(generator.choice(names, settings.participants, replace=False).tolist())
    return [state.devices[name] for name in names]
