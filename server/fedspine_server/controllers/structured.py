"""Our default controller: learns what arms cost and bring from what devices report, then picks the round's length.

Comes in: allowed arms, and after each round seconds, bytes, losses and update norms. Goes out: for each device an arm
and a number of local iterations so that all finish about the deadline, and that deadline. A round is as long as the
slowest device, so matching its length matters more than any single arm: a slow device gets fewer iterations, more
pruning and less rank, a fast one more iterations. With option `own_clock` how many fit is decided on the device: nobody
else knows what else it has to do, and a device that was never timed needs no guess.

The deadline: among 70 lengths D, the one with the most expected progress a second; but a run has a given number of
rounds, so no shorter than it takes to make 1.2 times the progress of a nominal round (everyone at the schedule's ratio
and `steps_per_round` iterations), and long enough that 90 % of the examples can be heard.

Source: docs/algorithm.md, section 7; iterations a device and the nominal round as a floor are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedspine_server.arms import Arm
from fedspine_server.controllers import timing, utility
from fedspine_server.controllers.contract import Choice, Context, ControllerState, DeviceFacts, check_options
from fedspine_server.reward import Outcome
from fedspine_server.settings import RunSettings

NUM_DEADLINES = 70
DEADLINE_SMOOTHING = 0.5
COLD_START_STEPS = 0.5  # share of the nominal steps: nothing is known yet, so the fast devices wait for the slow
LEAST_STEPS, MOST_STEPS = 0.25, 2.0  # shares of the nominal steps
COVERED_EXAMPLES = 0.9
OVERSHOOT_PENALTY = 1.2  # ln worth a unit of ratio above the schedule: nobody else trains those members less
# Progress 1.2: at 1.0 a run of 12 rounds was as far at the same second, but ended 0 to 3 points lower.
DEFAULT_OPTIONS = {
    "progress": 1.2,
    "exploration": 0.5,
    "step_law": timing.PRIOR_WORK,
    "rank_worth": 1.2,
    "opening_rank": 16,
    "own_clock": False,
}


@dataclass(frozen=True)
class _Offers:
    """What one device could do: one row an arm.

    Attributes:
        device: Which device, and its weight.
        step_seconds: Of each arm, float64 [K].
        transfer_seconds: Of each arm, float64 [K].
        quality: Worth of each arm at the nominal steps, float64 [K].
        exponent: Worth grows with steps to this power.
    """

    device: DeviceFacts
    step_seconds: np.ndarray
    transfer_seconds: np.ndarray
    quality: np.ndarray
    exponent: float


def init(settings: RunSettings) -> ControllerState:
    """Returns the state before the first round.

    Options: `progress` (a round's progress in nominal rounds), `exploration` (scale of the Thompson draws), `step_law`
    (parts of the `StepLaw` believed until devices report), `rank_worth` (what the largest rank is believed to add to
    the logarithm of a round's worth; small where `learning_rate_rank` makes steps alike) and `opening_rank` (the
    largest rank not above it opens the run) and `own_clock` (devices are told a budget of seconds and stop by their
    own clock, instead of doing a number of iterations that fits what the server knows of them).

    Raises:
        ValueError: An unknown option, or no such law.
    """
    check_options(settings, tuple(DEFAULT_OPTIONS))
    options = {**DEFAULT_OPTIONS, **settings.controller_options}
    return {
        "options": {**options, "step_law": list(options["step_law"])},
        "timing": timing.init(options["step_law"]),
        "utility": utility.init(
            settings.ranks, settings.max_pruning_ratio, settings.steps_per_round, options["rank_worth"]
        ),
        "deadline_seconds": None,
    }


def propose(state: ControllerState, context: Context) -> tuple[tuple[Choice, ...], ControllerState]:
    """Returns each device's arm and steps under one deadline; without any timings a small equal start for all."""
    if not state["timing"]["devices"]:
        return tuple(_cold_start(context, device) for device in context.devices), state
    names = [device.device_id for device in context.devices]
    quantile = timing.MIDDLE_QUANTILE if state["options"]["own_clock"] else timing.CAUTIOUS_QUANTILE
    seconds = timing.seconds_of(state["timing"], names, step_quantile=quantile)
    assert seconds is not None
    offers = [_offers(state, context, device, own) for device, own in zip(context.devices, seconds, strict=True)]
    deadline = _deadline(state, context, offers)
    choices = tuple(_choice(state, context, offer, deadline) for offer in offers)
    return choices, {**state, "deadline_seconds": deadline}


def observe(state: ControllerState, outcomes: Sequence[Outcome]) -> ControllerState:
    """Returns the state after a round: timings of all that reported, worth of those that were merged."""
    return {
        **state,
        "timing": timing.observe(state["timing"], outcomes),
        "utility": utility.observe(state["utility"], outcomes),
    }


def _opening_rank(settings: RunSettings) -> int:
    wanted = {**DEFAULT_OPTIONS, **settings.controller_options}["opening_rank"]
    return max((rank for rank in settings.ranks if rank <= wanted), default=settings.ranks[0])


def _nearest(device: DeviceFacts, ratio: float, rank: int) -> Arm:
    return min(device.arms, key=lambda arm: (abs(arm.rank - rank), abs(arm.pruning_ratio - ratio), arm))


def _cold_start(context: Context, device: DeviceFacts) -> Choice:
    arm = _nearest(device, context.schedule_ratio, _opening_rank(context.settings))
    steps = max(1, round(COLD_START_STEPS * context.settings.steps_per_round))
    return Choice(device.device_id, arm.pruning_ratio, arm.rank, steps, "no timings yet: the same small start for all")


def _offers(state: ControllerState, context: Context, device: DeviceFacts, seconds: tuple[float, float]) -> _Offers:
    ratios = np.array([arm.pruning_ratio for arm in device.arms])
    ranks = np.array([arm.rank for arm in device.arms])
    coefficients = utility.draw(
        state["utility"], context.generator(device.device_id), exploration=state["options"]["exploration"]
    )
    log_quality = utility.log_quality(state["utility"], coefficients, ratios, ranks)
    log_quality -= OVERSHOOT_PENALTY * np.maximum(0.0, ratios - context.schedule_ratio)
    log_quality += utility.offset(state["utility"], device.device_id)[0]
    transfer_bytes = np.array([context.law.transfer_bytes(arm, revive=context.revive) for arm in device.arms])
    return _Offers(
        device=device,
        step_seconds=seconds[0] * timing.work(state["timing"], ratios, ranks),
        transfer_seconds=seconds[1] * transfer_bytes,
        quality=np.exp(log_quality),
        exponent=float(coefficients[-1]),
    )


def _step_limits(context: Context) -> tuple[int, int]:
    nominal = context.settings.steps_per_round
    return max(1, math.ceil(LEAST_STEPS * nominal)), max(1, int(MOST_STEPS * nominal))


def _worth(context: Context, offer: _Offers, deadlines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the worth and the steps of each deadline and arm, [D, K]; worth 0 where the least steps do not fit."""
    least, most = _step_limits(context)
    fitting = (deadlines[:, None] - offer.transfer_seconds) / offer.step_seconds
    steps = np.clip(np.floor(fitting + 1e-9), 0, most)
    worth = offer.quality * (steps / context.settings.steps_per_round) ** offer.exponent
    return np.where(steps >= least, worth, 0.0), steps


def _deadline(state: ControllerState, context: Context, offers: Sequence[_Offers]) -> float:
    nominal_steps = context.settings.steps_per_round
    least, _ = _step_limits(context)
    opening = [_nearest(o.device, context.schedule_ratio, _opening_rank(context.settings)) for o in offers]
    opening_index = [offer.device.arms.index(arm) for offer, arm in zip(offers, opening, strict=True)]
    nominal_seconds = [
        o.transfer_seconds[i] + nominal_steps * o.step_seconds[i] for o, i in zip(offers, opening_index, strict=True)
    ]
    quickest = sorted((float((o.transfer_seconds + least * o.step_seconds).min()), o.device.weight) for o in offers)
    covered = np.cumsum([weight for _, weight in quickest]) >= COVERED_EXAMPLES - 1e-9
    shortest = quickest[int(np.argmax(covered))][0] if covered.any() else quickest[-1][0]
    longest = max(shortest, max(nominal_seconds))
    deadlines = np.geomspace(shortest, longest, NUM_DEADLINES)
    progress = sum(o.device.weight * _worth(context, o, deadlines)[0].max(axis=1) for o in offers)
    nominal = sum(o.device.weight * float(o.quality[i]) for o, i in zip(offers, opening_index, strict=True))
    enough = progress >= state["options"]["progress"] * nominal
    floor = float(deadlines[int(np.argmax(enough))]) if enough.any() else float(deadlines[-1])
    wanted = max(floor, float(deadlines[int(np.argmax(progress / deadlines))]))
    last = state["deadline_seconds"]
    smoothed = (
        wanted
        if last is None
        else math.exp(DEADLINE_SMOOTHING * math.log(last) + (1 - DEADLINE_SMOOTHING) * math.log(wanted))
    )
    return float(max(smoothed, shortest))


def _choice(state: ControllerState, context: Context, offer: _Offers, deadline: float) -> Choice:
    worth, steps = _worth(context, offer, np.array([deadline]))
    device_id = offer.device.device_id
    least, _ = _step_limits(context)
    most = num_steps = _step_limits(context)[1]
    budget = None
    if worth.max() > 0:
        index = int(np.argmax(worth[0]))
        num_steps = int(steps[0, index])
        if state["options"]["own_clock"]:
            budget = float(deadline - offer.transfer_seconds[index])
        plan = "gain"
    else:  # nothing fits: the least it can do, as early as it can
        index = int(np.argmin(offer.transfer_seconds + least * offer.step_seconds))
        num_steps = least
        plan = "nothing fits, gain"
    arm = offer.device.arms[index]
    expected = float(offer.transfer_seconds[index] + num_steps * offer.step_seconds[index])
    count = utility.offset(state["utility"], device_id)[1]
    gain = float(offer.quality[index]) * (num_steps / context.settings.steps_per_round) ** offer.exponent
    reason = (
        f"{num_steps} steps in {expected:.1f} s expected of {deadline:.1f} s, {plan} {gain:.2f}, {count} rounds known"
    )
    asked = num_steps if budget is None else most
    return Choice(device_id, arm.pruning_ratio, arm.rank, asked, reason, deadline, budget, least)
