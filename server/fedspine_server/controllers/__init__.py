"""Controllers by name: who picks each device's pruning ratio, rank and steps. One file a controller."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from fedspine_server.controllers import fixed, grid_ucb, hoo, structured, sucb
from fedspine_server.controllers.contract import Choice, Context, Controller, ControllerState, DeviceFacts

CONTROLLERS: Mapping[str, Controller] = MappingProxyType(
    {
        "structured": Controller(structured.init, structured.propose, structured.observe),
        "sucb": Controller(sucb.init, sucb.propose, sucb.observe),
        "hoo": Controller(hoo.init, hoo.propose, hoo.observe),
        "grid-ucb": Controller(grid_ucb.init, grid_ucb.propose, grid_ucb.observe),
        "fixed": Controller(fixed.init, fixed.propose, fixed.observe),
    }
)

__all__ = ["CONTROLLERS", "Choice", "Context", "Controller", "ControllerState", "DeviceFacts"]
