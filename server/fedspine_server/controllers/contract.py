"""What a controller sees and what it answers; the one interface of all of them.

Comes in: nothing. Goes out: the types. A controller is three pure functions over a JSON-serialisable state: `init`
makes the state, `propose` picks an arm for each device of a round, `observe` learns from the round's outcomes.
Randomness comes from the seed in the context. A controller knows only what devices report, never how fast a device is
meant to be.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedspine_server.arms import Arm, CostLaw
from fedspine_server.reward import Outcome
from fedspine_server.settings import RunSettings

ControllerState = dict[str, Any]


@dataclass(frozen=True)
class DeviceFacts:
    """One device that takes part in a round.

    Attributes:
        device_id: Which device.
        num_examples: Examples it trains on.
        weight: Its share of the round's update, summing to 1 over the round's devices.
        arms: What it may be given, ascending; never empty.
        memory_bytes: Its memory limit; 0 where unknown.
    """

    device_id: str
    num_examples: int
    weight: float
    arms: tuple[Arm, ...]
    memory_bytes: int = 0


@dataclass(frozen=True)
class Context:
    """One round, as a controller sees it.

    Attributes:
        settings: The run's settings.
        round_index: Round, from 0.
        schedule_ratio: Pruning ratio of the schedule at the end of the round.
        revive: Whether assignments carry every member.
        law: What arms cost in bytes.
        devices: Who takes part, sorted by device_id.
    """

    settings: RunSettings
    round_index: int
    schedule_ratio: float
    revive: bool
    law: CostLaw
    devices: tuple[DeviceFacts, ...]

    def generator(self, device_id: str) -> np.random.Generator:
        """Returns the randomness of one device in this round."""
        return np.random.default_rng([self.settings.seed, self.round_index, zlib.crc32(device_id.encode())])


@dataclass(frozen=True)
class Choice:
    """What a controller asks of one device.

    Attributes:
        device_id: Which device.
        pruning_ratio: Share of members to be gone.
        rank: LoRA rank.
        num_steps: Local iterations.
        reason: Why, for the history and the live table.
        deadline_seconds: Planned length of the round, the same for all devices; None waits for everyone.
        budget_seconds: Local work after which the device stops by its own clock, whatever is left of `num_steps`; None
            does them all.
        min_steps: Iterations that it does all the same.
    """

    device_id: str
    pruning_ratio: float
    rank: int
    num_steps: int
    reason: str
    deadline_seconds: float | None = None
    budget_seconds: float | None = None
    min_steps: int = 1


@dataclass(frozen=True)
class Controller:
    """One way to pick arms.

    Attributes:
        init: Settings -> first state; raises ValueError on an unknown option.
        propose: (state, context) -> (a choice for each device of the context, next state).
        observe: (state, outcomes) -> next state; the order of the outcomes does not matter.
    """

    init: Callable[[RunSettings], ControllerState]
    propose: Callable[[ControllerState, Context], tuple[tuple[Choice, ...], ControllerState]]
    observe: Callable[[ControllerState, Sequence[Outcome]], ControllerState]


def check_options(settings: RunSettings, allowed: Sequence[str]) -> None:
    """Raises ValueError when `controller_options` has a key that the controller does not know."""
    unknown = sorted(set(settings.controller_options) - set(allowed))
    if unknown:
        known = ", ".join(allowed) or "none"
        raise ValueError(f"controller {settings.controller} has no option {unknown[0]}; it knows: {known}")
