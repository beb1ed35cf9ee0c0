"""How much a device's round is worth for each arm and number of steps, learned by all devices together.

Comes in: outcomes of merged updates. Goes out: the logarithm of the expected worth, relative to the round's other
devices. Bayesian linear regression on ln worth with features x1, x1^2, x2, x2^2, x1 x2 (x1 = ratio / largest ratio,
x2 = log rank from smallest to largest) and ln(steps / nominal steps); each device has a shrunk offset. Worth and
features are centred within a round, so that the fall of the loss over rounds is not mistaken for an effect of the arms.
Runs are short, so the prior matters: more rank and more steps help with diminishing returns, missing members hurt.

Source: docs/algorithm.md, section 7; the logarithm, the steps and the centring are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedspine_server.reward import Outcome, relative_improvements

UtilityState = dict[str, Any]
# Rank: at equal scaling MiniLM on TREC-6 took 8 rounds at rank 8 and 4 at rank 32 to 70 %, at rank 2 more than 12.
RANK_WORTH = 1.2
RANK_BEND = -0.25  # of that, for the square
PRIOR_DEVIATION = (0.15, 0.1, 0.2, 0.1, 0.1, 0.1)
NOISE_DEVIATION = 0.5
STEPS_EXPONENT_RANGE = (0.4, 1.0)
SHRINKAGE = 4.0  # rounds of evidence against which a device's own offset is weighed
LEAST_WORTH, MOST_WORTH = 0.1, 4.0


def init(
    settings_ranks: Sequence[int], max_ratio: float, nominal_steps: int, rank_worth: float = RANK_WORTH
) -> UtilityState:
    """Returns the state before any observation."""
    prior_mean = (-0.2, -0.1, rank_worth, RANK_BEND * rank_worth, 0.0, 0.75)
    precision = np.diag(1 / np.square(PRIOR_DEVIATION))
    return {
        "smallest_rank": settings_ranks[0],
        "largest_rank": settings_ranks[-1],
        "max_ratio": max_ratio,
        "nominal_steps": nominal_steps,
        "precision": precision.tolist(),
        "moment": (precision @ prior_mean).tolist(),
        "offsets": {},
    }


def draw(state: UtilityState, generator: np.random.Generator, *, exploration: float) -> np.ndarray:
    """Returns a Thompson draw of the coefficients, float64 [6]; `exploration` scales its distance from the mean."""
    precision = np.array(state["precision"])
    mean = np.linalg.solve(precision, np.array(state["moment"]))
    # precision = L L^T, so L^-T z has the posterior's covariance
    noise = np.linalg.solve(np.linalg.cholesky(precision).T, generator.standard_normal(len(mean)))
    drawn = mean + exploration * noise
    drawn[-1] = np.clip(drawn[-1], *STEPS_EXPONENT_RANGE)
    return np.asarray(drawn)


def log_quality(state: UtilityState, coefficients: np.ndarray, ratios: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Returns ln worth of each arm at the nominal number of steps, float64 [K]."""
    return np.asarray(_arm_features(state, ratios, ranks) @ coefficients[:-1])


def offset(state: UtilityState, device_id: str) -> tuple[float, int]:
    """Returns how much more than expected a device brings (in ln worth, shrunk) and over how many rounds."""
    total, count = state["offsets"].get(device_id, (0.0, 0))
    return total / (count + SHRINKAGE), int(count)


def observe(state: UtilityState, outcomes: Sequence[Outcome]) -> UtilityState:
    """Returns the state after a round; needs two merged updates to compare, else changes nothing."""
    merged = sorted((outcome for outcome in outcomes if outcome.merged), key=lambda outcome: outcome.device_id)
    if len(merged) < 2:
        return state
    ratios = np.array([outcome.pruning_ratio for outcome in merged])
    ranks = np.array([outcome.rank for outcome in merged])
    log_steps = np.log([max(1, outcome.num_steps) / state["nominal_steps"] for outcome in merged])
    features = np.concatenate([_arm_features(state, ratios, ranks), log_steps[:, None]], axis=1)
    features -= features.mean(axis=0)
    norms = np.array([outcome.update_norm or 0.0 for outcome in merged])
    worth = 0.5 * np.array(relative_improvements(merged)) + 0.5 * norms / (norms.mean() or 1.0)
    target = np.log(np.clip(worth, LEAST_WORTH, MOST_WORTH))
    target -= target.mean()
    precision, moment = np.array(state["precision"]), np.array(state["moment"])
    residuals = target - features @ np.linalg.solve(precision, moment)
    offsets = dict(state["offsets"])
    for outcome, residual in zip(merged, residuals, strict=True):
        total, count = offsets.get(outcome.device_id, (0.0, 0))
        offsets[outcome.device_id] = [total + float(residual), count + 1]
    own = np.array([offset(state, outcome.device_id)[0] for outcome in merged])
    precision = precision + features.T @ features / NOISE_DEVIATION**2
    moment = moment + features.T @ (target - own + own.mean()) / NOISE_DEVIATION**2
    return {**state, "precision": precision.tolist(), "moment": moment.tolist(), "offsets": offsets}


def _arm_features(state: UtilityState, ratios: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    x1 = ratios / state["max_ratio"] if state["max_ratio"] > 0 else np.zeros(len(ratios))
    span = np.log(state["largest_rank"] / state["smallest_rank"])
    x2 = np.log(ranks / state["smallest_rank"]) / span if span > 0 else np.zeros(len(ratios))
    return np.stack([x1, x1**2, x2, x2**2, x1 * x2], axis=1)
