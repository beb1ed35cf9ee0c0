"""How long an arm takes on each device, learned from the seconds that devices report.

Comes in: outcomes with compute and transfer seconds. Goes out: expected seconds a step and a byte. Seconds of a step
are a_i * work(p, r): the law `work` is shared by all devices and fitted to all of them, the factor a_i follows one
device. Seconds of a byte b_i likewise. A surprise of more than 30 % is taken for a change of power mode and followed at
once.

Source: docs/algorithm.md, section 7.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedspine_server.reward import Outcome
from fedspine_server.step_law import StepLaw

TimingState = dict[str, Any]
PRIOR_WORK = (0.2, 0.7, 0.1)  # parts of a StepLaw, until one is measured
PRIOR_DEVIATION = 0.1
NOISE_DEVIATION = 0.2
DISCOUNT = 0.95  # a round; the first observations were made against factors a_i that were not settled yet
GAIN, SURPRISED_GAIN, SURPRISE = 0.3, 0.9, 0.3
CAUTIOUS_QUANTILE = 0.75  # a device not seen before is taken to be slower and farther away than most
MIDDLE_QUANTILE = 0.5  # but no slower than the others where it stops by its own clock


def init(prior: Sequence[float] = PRIOR_WORK) -> TimingState:
    """Returns the state before any observation.

    Args:
        prior: Parts of the `StepLaw` that is believed until devices report, in any unit.

    Raises:
        ValueError: They are not three numbers, or one is negative.
    """
    if len(prior) != 3:
        raise ValueError(f"expected the three parts of a step-time law, found {list(prior)}")
    law = StepLaw(*prior).relative()
    parts = [law.constant, law.kept, law.lora]
    return {"prior": parts, "evidence": np.zeros((3, 3)).tolist(), "moment": [0.0, 0.0, 0.0], "devices": {}}


def work(state: TimingState, ratios: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Returns the relative time of a step of each arm, float64 [K]."""
    prior = np.eye(3) / PRIOR_DEVIATION**2
    coefficients = np.linalg.solve(prior + state["evidence"], prior @ state["prior"] + state["moment"])
    return np.asarray(_features(ratios, ranks) @ np.maximum(coefficients, (0.05, 0.0, 0.0)))


def seconds_of(
    state: TimingState, device_ids: Sequence[str], *, step_quantile: float = CAUTIOUS_QUANTILE
) -> list[tuple[float, float]] | None:
    """Returns (seconds of a step of relative time 1, seconds of a byte) of each; None before any device was seen."""
    known: Mapping[str, Sequence[float]] = state["devices"]
    if not known:
        return None
    steps, bytes_ = zip(*known.values(), strict=True)
    unseen = float(np.quantile(steps, step_quantile)), float(np.quantile(bytes_, CAUTIOUS_QUANTILE))
    return [(known[name][0], known[name][1]) if name in known else unseen for name in device_ids]


def observe(state: TimingState, outcomes: Sequence[Outcome]) -> TimingState:
    """Returns the state after a round; outcomes without timings change nothing."""
    evidence, moment = DISCOUNT * np.array(state["evidence"]), DISCOUNT * np.array(state["moment"])
    devices = dict(state["devices"])
    for outcome in sorted(outcomes, key=lambda outcome: outcome.device_id):
        if not outcome.compute_seconds or not outcome.transfer_seconds or not outcome.transfer_bytes:
            continue
        ratios, ranks = np.array([outcome.pruning_ratio]), np.array([outcome.rank])
        per_work = outcome.compute_seconds / outcome.num_steps / float(work(state, ratios, ranks)[0])
        per_byte = outcome.transfer_seconds / outcome.transfer_bytes
        last = devices.get(outcome.device_id)
        if last is None:
            devices[outcome.device_id] = [per_work, per_byte]
            continue
        # Clipped, so that a change of power mode does not pass for an effect of the arm.
        observed = float(np.clip(per_work / last[0], math.exp(-SURPRISE), math.exp(SURPRISE)))
        features = _features(ratios, ranks)[0]
        evidence += np.outer(features, features) / NOISE_DEVIATION**2
        moment += features * observed * float(work(state, ratios, ranks)[0]) / NOISE_DEVIATION**2
        devices[outcome.device_id] = [_follow(last[0], per_work), _follow(last[1], per_byte)]
    return {**state, "evidence": evidence.tolist(), "moment": moment.tolist(), "devices": devices}


def _features(ratios: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    return np.stack([np.ones(len(ratios)), 1 - ratios, ranks / 16], axis=1)


def _follow(last: float, observed: float) -> float:
    """Moves in the logarithm: a time is as likely half as twice what was expected."""
    surprise = math.log(observed / last)
    return last * math.exp((SURPRISED_GAIN if abs(surprise) > SURPRISE else GAIN) * surprise)
