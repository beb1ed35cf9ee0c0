"""Everything a run is: what the store saves, and what each round takes in and gives back.

Comes in: nothing. Goes out: the frozen `RunState` and the hash by which two runs are compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedspine_edge.protocol import Layout
from fedspine_server.aggregation.contribution import Factors
from fedspine_server.controllers.contract import Choice, ControllerState
from fedspine_server.settings import RunSettings


@dataclass(frozen=True)
class DeviceState:
    """What the server remembers of one device.

    Attributes:
        device_id: Which device.
        num_examples: Examples it trains on; its weight.
        memory_bytes: Its memory limit.
        active: Whether it takes part; False after it left.
        last_ratio: Pruning ratio of its last merged round, 0 before that.
        kept: Group name -> members it kept in its last merged round, int32; empty before that.
    """

    device_id: str
    num_examples: int
    memory_bytes: int
    active: bool = True
    last_ratio: float = 0.0
    kept: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class RunState:
    """A run between two rounds, or with assignments handed out.

    Attributes:
        run_id: Which run.
        settings: Its settings.
        layout: The base model's layout.
        round_index: The round to come (or under way), from 0; equal to `settings.rounds` at the end.
        clock_seconds: When the last round ended, from the start of the run.
        adapter: Matrix name -> global factors.
        task_head: Parameter name -> densely trained values, float32.
        importance: Group name -> moving average of the devices' importances, float32, NaN where never measured.
        mean_input: Matrix name -> moving average of the mean inputs, float32, NaN where never measured.
        devices: device_id -> what is known of it.
        controller_state: The controller's own, JSON-ready.
        open_choices: device_id -> what it was asked in the round under way; empty between rounds.
        history: One JSON-ready record a closed round.
    """

    run_id: str
    settings: RunSettings
    layout: Layout
    round_index: int
    clock_seconds: float
    adapter: Mapping[str, Factors]
    task_head: Mapping[str, np.ndarray]
    importance: Mapping[str, np.ndarray]
    mean_input: Mapping[str, np.ndarray]
    devices: Mapping[str, DeviceState]
    controller_state: ControllerState
    open_choices: Mapping[str, Choice] = field(default_factory=dict)
    history: tuple[Mapping[str, Any], ...] = ()


def weight_of(settings: RunSettings, device: DeviceState) -> float:
    """Returns a device's weight in every mean over devices."""
    if settings.example_weights == "equal":
        return 1.0
    return device.num_examples**0.5 if settings.example_weights == "sqrt-examples" else float(device.num_examples)


def adapter_sha256(state: RunState) -> str:
    """Returns the hash of the global adapter and the task head: names, shapes and values."""
    digest = hashlib.sha256()
    arrays = {f"task_head/{name}": value for name, value in state.task_head.items()}
    for name, factors in state.adapter.items():
        arrays |= {f"lora_a/{name}": factors.lora_a, f"lora_b/{name}": factors.lora_b}
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
