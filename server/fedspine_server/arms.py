"""The (pruning ratio, rank) space, the pruning schedule, and what a device can afford of it.

Comes in: run settings, a layout, a round, a device's last ratio and memory. Goes out: the arms a controller may choose
from in that round, and what an arm costs in bytes and memory.

Source: docs/algorithm.md, section 5; the cubic schedule is LoRAPrune's (arXiv 2305.18403), the band around it is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedspine_edge.protocol import Layout
from fedspine_edge.quantized import ASSIGNMENT_DTYPE, PARAMETER_BYTES
from fedspine_server.settings import ACTIVE_MASKS_SHARE, RunSettings

RATIO_GRID_SIZE = 21
BAND = 0.15  # half width of the band around the schedule
MAX_RATIO_STEP = 0.1  # a ratio grows by at most this a round
RUNTIME_BYTES = 400 << 20  # interpreter, libraries and activations, measured on MiniLM with 16 x 64 tokens
OPTIMISER_BYTES_PER_LORA_PARAMETER = 16  # float32 value, gradient and AdamW's two moments


@dataclass(frozen=True, order=True)
class Arm:
    """What a device is asked to do in a round.

    Attributes:
        pruning_ratio: Share of the members of each kind to be gone.
        rank: LoRA rank.
    """

    pruning_ratio: float
    rank: int


@dataclass(frozen=True)
class CostLaw:
    """Bytes of an arm, linear in rank and in the share kept; from the layout alone.

    Attributes:
        lora_whole: LoRA parameters a rank that pruning never removes.
        lora_prunable: LoRA parameters a rank that go in proportion to the pruning ratio.
        constant_bytes: Bytes each way that depend on neither (masks, importances, mean inputs, task head).
        up_bytes: Bytes a LoRA parameter takes in an update.
        down_bytes: Bytes it takes in an assignment.
        prunable_parameters: Base weights that go in proportion to the pruning ratio.
        other_parameters: LoRA'd base weights that are never pruned.
    """

    lora_whole: int
    lora_prunable: int
    constant_bytes: float
    up_bytes: float
    down_bytes: float
    prunable_parameters: int
    other_parameters: int

    def transfer_bytes(self, arm: Arm, *, revive: bool) -> float:
        """Returns the bytes of an assignment and its update; with `revive` the assignment carries every member."""
        kept = 1 - arm.pruning_ratio
        up = self.up_bytes * arm.rank * (self.lora_whole + kept * self.lora_prunable) + self.constant_bytes
        offered = 1 if revive else kept
        down = self.down_bytes * arm.rank * (self.lora_whole + offered * self.lora_prunable) + self.constant_bytes
        return up + down

    def memory_bytes(self, arm: Arm) -> float:
        """Returns an estimate of a device's peak memory: float32 weights, LoRA with its optimiser, the runtime."""
        kept = 1 - arm.pruning_ratio
        weights = 4 * (self.other_parameters + kept * self.prunable_parameters)
        lora = arm.rank * (self.lora_whole + kept * self.lora_prunable) * OPTIMISER_BYTES_PER_LORA_PARAMETER
        return RUNTIME_BYTES + weights + lora


def cost_law(layout: Layout, update_dtype: str) -> CostLaw:
    """Returns what arms cost with this layout when updates travel as that type."""
    whole = prunable = weights = 0
    constant = 0.0
    for matrix in layout.matrices:
        for features, group in ((matrix.out_features, matrix.out_group), (matrix.in_features, matrix.in_group)):
            whole += features if group is None else 0
            prunable += features if group is not None else 0
        constant += 2 * matrix.in_features if matrix.in_group is not None else 0
        weights += matrix.out_features * matrix.in_features
    for _, shape in layout.task_head:
        size = 1
        for extent in shape:
            size *= extent
        constant += 4 * size
    halves = update_dtype == "float16"
    constant += sum((6 if halves else 2 + 1 / 8) * group.num_members for group in layout.groups)
    down_dtype = update_dtype if halves else ASSIGNMENT_DTYPE
    pruned = sum(group.num_members * group.parameters_per_member for group in layout.groups)
    return CostLaw(
        lora_whole=whole,
        lora_prunable=prunable,
        constant_bytes=constant,
        up_bytes=PARAMETER_BYTES[update_dtype],
        down_bytes=PARAMETER_BYTES[down_dtype],
        prunable_parameters=pruned,
        other_parameters=max(0, weights - pruned),
    )


def num_warmup_rounds(settings: RunSettings) -> int:
    """Returns how many rounds come before the first pruning: at least one that tunes, so that importances are known."""
    least = 2 if settings.head_start == "closed-form" else 1
    return min(
        max(least, round(settings.warmup_fraction * settings.rounds)), settings.rounds - num_cooldown_rounds(settings)
    )


def num_cooldown_rounds(settings: RunSettings) -> int:
    """Returns how many rounds at the end train exactly the final structure: at least one."""
    return max(1, round(settings.cooldown_fraction * settings.rounds))


def in_cooldown(settings: RunSettings, round_index: int) -> bool:
    """Returns whether a round trains exactly the final structure."""
    return round_index >= settings.rounds - num_cooldown_rounds(settings)


def may_revive(settings: RunSettings, round_index: int) -> bool:
    """Returns whether members outside a device's last mask may come back in a round.

    True in cool-down as well: there every device takes the server's mask, which need not be inside its own last one.
    """
    return round_index < ACTIVE_MASKS_SHARE * settings.rounds or in_cooldown(settings, round_index)


def schedule_ratio(settings: RunSettings, round_index: int) -> float:
    """Returns the schedule's pruning ratio at the end of a round; `one-shot` is 0 before cool-down.

    0 in the warm-up rounds, `target_sparsity` in cool-down, S* (1 - (1 - x)^3) in between, where x grows in equal steps
    and would reach 1 in the first cool-down round.

    Source: LoRAPrune (arXiv 2305.18403), cubic schedule.
    """
    if in_cooldown(settings, round_index):
        return settings.target_sparsity
    if settings.schedule == "one-shot":
        return 0.0
    warmup = num_warmup_rounds(settings)
    if round_index < warmup:
        return 0.0
    between = settings.rounds - warmup - num_cooldown_rounds(settings)
    progress = (round_index - warmup + 1) / (between + 1)
    return settings.target_sparsity * (1 - (1 - progress) ** 3)


def ratio_band(settings: RunSettings, round_index: int, *, last_ratio: float) -> tuple[float, float]:
    """Returns the lowest and the highest pruning ratio a device may be given in a round.

    The band is s(t) - 0.15 .. s(t) + 0.15, cut at `max_pruning_ratio` and at 0.1 above the device's last ratio (or
    above last round's schedule, for a device that was away). The lower end of the band wins over that cut, so that a
    short run still reaches its target; and while members may not come back, the last ratio is the lowest.

    Args:
        settings: The run's settings.
        round_index: Round, from 0.
        last_ratio: The device's ratio in its last merged round, 0 before that.
    """
    target = schedule_ratio(settings, round_index)
    if settings.target_sparsity == 0 or in_cooldown(settings, round_index) or target == 0:
        return target, target
    reached = max(last_ratio, schedule_ratio(settings, round_index - 1))
    low = max(0.0, target - BAND)
    if not may_revive(settings, round_index):
        low = max(low, last_ratio)
    high = max(low, min(target + BAND, reached + MAX_RATIO_STEP, settings.max_pruning_ratio))
    return low, high


def allowed_arms(
    settings: RunSettings, law: CostLaw, round_index: int, *, last_ratio: float, memory_bytes: int
) -> tuple[Arm, ...]:
    """Returns the arms a device may be given in a round, ascending; never empty.

    Ratios are the grid's inside the band, and the schedule's own (in cool-down only that one). Where nothing fits the
    device's memory the cheapest arm remains: the device then says itself that it ran out.

    Args:
        settings: The run's settings.
        law: What arms cost.
        round_index: Round, from 0.
        last_ratio: The device's ratio in its last merged round.
        memory_bytes: The device's memory limit.
    """
    low, high = ratio_band(settings, round_index, last_ratio=last_ratio)
    grid = [index * settings.max_pruning_ratio / (RATIO_GRID_SIZE - 1) for index in range(RATIO_GRID_SIZE)]
    inside = {ratio for ratio in grid if low <= ratio <= high}
    inside.add(min(max(schedule_ratio(settings, round_index), low), high))
    arms = sorted(Arm(ratio, rank) for ratio in inside for rank in settings.ranks)
    affordable = tuple(arm for arm in arms if law.memory_bytes(arm) <= memory_bytes)
    return affordable or (min(arms, key=law.memory_bytes),)
