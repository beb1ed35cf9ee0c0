"""The controller that does not choose: everyone follows the schedule at a given rank, and the round waits for everyone.

Options for the published methods that set ranks without learning: `memory_per_rank` gives a device `fixed_rank` for
each so many GiB of its memory (HetLoRA's ranks by resources), `grow_from` begins everyone at a low rank that reaches
`fixed_rank` in cool-down (APT's growing ranks).

Source: the baselines of docs/algorithm.md, section 10 (FedAvg LoRA, federated LoRAPrune, HetLoRA, APT).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedspine_server.arms import num_cooldown_rounds
from fedspine_server.controllers.contract import Choice, Context, ControllerState, DeviceFacts, check_options
from fedspine_server.reward import Outcome
from fedspine_server.settings import RunSettings

GIB = 1 << 30


def init(settings: RunSettings) -> ControllerState:
    """Returns an empty state; raises ValueError on an option it does not know."""
    check_options(settings, ("memory_per_rank", "grow_from"))
    return {}


def propose(state: ControllerState, context: Context) -> tuple[tuple[Choice, ...], ControllerState]:
    """Returns the schedule's ratio, the rank set beforehand and `steps_per_round` for every device."""
    return tuple(_choice(context, device) for device in context.devices), state


def observe(state: ControllerState, outcomes: Sequence[Outcome]) -> ControllerState:
    """Returns the state as it is: there is nothing to learn."""
    return state


def _choice(context: Context, device: DeviceFacts) -> Choice:
    settings, options = context.settings, context.settings.controller_options
    rank, why = settings.fixed_rank, f"fixed rank {settings.fixed_rank}"
    if "memory_per_rank" in options:
        wanted = settings.fixed_rank * device.memory_bytes / (options["memory_per_rank"] * GIB)
        rank, why = _at_most(settings, wanted), f"rank by {device.memory_bytes / GIB:.0f} GiB of memory"
    if "grow_from" in options:
        grown = max(1, settings.rounds - num_cooldown_rounds(settings))
        share = min(1.0, context.round_index / grown)
        wanted = options["grow_from"] * math.exp(share * math.log(settings.fixed_rank / options["grow_from"]))
        rank, why = _at_most(settings, wanted), f"rank grown to {wanted:.1f}"
    reason = f"schedule ratio {context.schedule_ratio:.3f}, {why}"
    return Choice(device.device_id, context.schedule_ratio, rank, settings.steps_per_round, reason)


def _at_most(settings: RunSettings, wanted: float) -> int:
    """The largest rank of the run that is not above the wanted one; its smallest where all are."""
    return max((rank for rank in settings.ranks if rank <= wanted * (1 + 1e-9)), default=settings.ranks[0])
