"""What a device's round was worth: loss improvement, pruning progress and weight of the update, over its slowness.

Comes in: what the devices of one round reported. Goes out: one reward in [0, 1] for each.

Source: FedSpine (arXiv 2501.02438) names the ingredients; the bounded form is ours (docs/algorithm.md, section 6).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedspine_server.arms import MAX_RATIO_STEP

LOSS_WEIGHT, PRUNING_WEIGHT, UPDATE_WEIGHT = 0.5, 0.25, 0.25
MAX_RELATIVE_IMPROVEMENT = 2.0


@dataclass(frozen=True)
class Outcome:
    """What is known of one device after a round; measured fields are None where nothing came back.

    Attributes:
        device_id: Which device.
        pruning_ratio: Assigned share of members to be gone.
        last_ratio: The same, in its last merged round before.
        rank: Assigned LoRA rank.
        num_steps: Local iterations done.
        merged: Whether the update became part of the global adapter.
        compute_seconds: Seconds of local work; known for late updates too.
        transfer_seconds: Seconds of both transfers.
        transfer_bytes: Bytes both ways.
        loss_before: Training loss of the first iterations.
        loss_after: Training loss of the last iterations.
        update_norm: Frobenius norm of what the device changed, scaling * (B A - assigned B A), over all matrices.
    """

    device_id: str
    pruning_ratio: float
    last_ratio: float
    rank: int
    num_steps: int
    merged: bool
    compute_seconds: float | None = None
    transfer_seconds: float | None = None
    transfer_bytes: int = 0
    loss_before: float | None = None
    loss_after: float | None = None
    update_norm: float | None = None

    @property
    def completion_seconds(self) -> float | None:
        """Seconds from the start of the round to the arrival of the update."""
        if self.compute_seconds is None or self.transfer_seconds is None:
            return None
        return self.compute_seconds + self.transfer_seconds

    @property
    def improvement(self) -> float:
        """Fall of the training loss; 0 where unknown."""
        if self.loss_before is None or self.loss_after is None:
            return 0.0
        return self.loss_before - self.loss_after


def relative_improvements(outcomes: Sequence[Outcome]) -> list[float]:
    """Returns each device's loss improvement over the round's median improvement, clipped to 0..2.

    Where the median device did not improve, any improvement counts as 2 and the rest as 0.
    """
    median = float(np.median([outcome.improvement for outcome in outcomes])) if outcomes else 0.0
    if median <= 0:
        return [MAX_RELATIVE_IMPROVEMENT if outcome.improvement > 0 else 0.0 for outcome in outcomes]
    return [min(max(outcome.improvement / median, 0.0), MAX_RELATIVE_IMPROVEMENT) for outcome in outcomes]


def rewards(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Returns the reward of each merged device, by device_id.

    Args:
        outcomes: All outcomes of one round; those that were not merged get no reward, as what they would have
            brought is unknown.
    """
    merged = [outcome for outcome in outcomes if outcome.merged]
    if not merged:
        return {}
    norms = [outcome.update_norm or 0.0 for outcome in merged]
    largest_norm = max(norms) or 1.0
    seconds = [outcome.completion_seconds or 0.0 for outcome in merged]
    mean_seconds = sum(seconds) / len(seconds) or 1.0
    result = {}
    for outcome, gain, norm, own_seconds in zip(merged, relative_improvements(merged), norms, seconds, strict=True):
        pruning = min(max(outcome.pruning_ratio - outcome.last_ratio, 0.0) / MAX_RATIO_STEP, 1.0)
        worth = (
            LOSS_WEIGHT * gain / MAX_RELATIVE_IMPROVEMENT
            + PRUNING_WEIGHT * pruning
            + UPDATE_WEIGHT * norm / largest_norm
        )
        result[outcome.device_id] = worth / (1 + abs(own_seconds - mean_seconds) / mean_seconds)
    return result
