"""Settings and states that several tests of the server begin with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import toy

from fedspine_server import coordinator
from fedspine_server.settings import RunSettings
from fedspine_server.state import RunState

EXAMPLES = {"a": 10, "b": 30, "c": 20}


@pytest.fixture
def settings() -> RunSettings:
    return RunSettings(rounds=10, steps_per_round=8, ranks=(2, 4), fixed_rank=4, controller="fixed")


@pytest.fixture
def begin(settings: RunSettings) -> Callable[..., RunState]:
    """Returns a state with three devices registered, of the settings with the given changes."""

    def make(**changes: Any) -> RunState:
        state = coordinator.init(dataclasses.replace(settings, **changes), toy.layout(), toy.task_head())
        for device_id, count in EXAMPLES.items():
            state = coordinator.register(state, device_id, num_examples=count, memory_bytes=8 << 30)
        return state

    return make
