"""The controller that does not choose: everyone follows the schedule at one rank, and the round waits for everyone.

Source: the baselines of docs/algorithm.md, section 10 (FedAvg LoRA, federated LoRAPrune).
"""

from __future__ import annotations

from collections.abc import Sequence

from fedspine_server.controllers.contract import Choice, Context, ControllerState, check_options
from fedspine_server.reward import Outcome
from fedspine_server.settings import RunSettings


def init(settings: RunSettings) -> ControllerState:
    """Returns an empty state; raises ValueError on any option."""
    check_options(settings, ())
    return {}


def propose(state: ControllerState, context: Context) -> tuple[tuple[Choice, ...], ControllerState]:
    """Returns the schedule's ratio, `fixed_rank` and `steps_per_round` for every device."""
    settings = context.settings
    reason = f"schedule ratio {context.schedule_ratio:.3f}, fixed rank {settings.fixed_rank}"
    choices = tuple(
        Choice(device.device_id, context.schedule_ratio, settings.fixed_rank, settings.steps_per_round, reason)
        for device in context.devices
    )
    return choices, state


def observe(state: ControllerState, outcomes: Sequence[Outcome]) -> ControllerState:
    """Returns the state as it is: there is nothing to learn."""
    return state
