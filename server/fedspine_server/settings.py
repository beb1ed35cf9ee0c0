"""The settings of one run: what the coordinator, the controllers and the aggregation read, each default in one place.

Comes in: plain values (config files and flags are read elsewhere). Goes out: a frozen, checked `RunSettings`, and the
learning rate of a round.

Source: FedSpine (arXiv 2501.02438), experimental settings; the ranges of pruning ratio and rank are ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedspine_edge.dtypes import BASE_DTYPES, UPDATE_DTYPES

CONTROLLER_NAMES = ("structured", "sucb", "hoo", "grid-ucb", "fixed")
AGGREGATION_NAMES = ("spine", "hetlora", "flexlora", "flora", "fedavg", "trimmed-mean", "median")
MASK_MODES = ("uniform", "per-layer", "layers")
SCHEDULES = ("cubic", "one-shot")
IMPORTANCES = ("lora-guided", "salience", "magnitude", "gradient", "random")
HEAD_STARTS = ("random", "closed-form")
EXAMPLE_WEIGHTS = ("examples", "sqrt-examples", "equal")
ACTIVE_MASKS_SHARE = 0.7  # share of the rounds in which a pruned member may come back


@dataclass(frozen=True)
class RunSettings:
    """Everything a run's outcome depends on, apart from the base model and the devices.

    Attributes:
        rounds: Rounds of the run.
        steps_per_round: Local iterations of a round; a controller may give a device fewer or more.
        prune_interval: Local iterations between two prunings (H).
        batch_size: Examples an iteration.
        learning_rate: AdamW step size of the first round.
        learning_rate_rank: The rank that step size is meant for; others get it in inverse proportion, so that a step
            changes the product as much at every rank. 0 gives every rank the same.
        final_learning_rate_fraction: The last round's step size as a share of the first's; linear in between.
        ranks: LoRA ranks a controller may choose from, ascending; the largest is the global adapter's.
        max_pruning_ratio: Upper end of the ratio grid (p_max).
        target_sparsity: Share of the members of each kind gone at the end (S*); 0 never prunes.
        schedule: How the ratio gets there: `cubic`, or `one-shot` (nothing before cool-down, then all at once).
        warmup_fraction: Share of the rounds before the first pruning (a).
        cooldown_fraction: Share of the rounds at the end that train exactly the final structure (b).
        controller: Who picks ratios, ranks, steps and deadline; a key of `controllers.CONTROLLERS`.
        controller_options: Options of that controller, e.g. `{"mode": "paper"}` for `sucb`.
        fixed_rank: Rank of the `fixed` controller; one of `ranks`.
        aggregation: How updates become the global adapter; a key of `aggregation.AGGREGATIONS`.
        trim_share: Share of the devices that aggregation `trimmed-mean` leaves out at either end, entry by entry.
        clip_factor: A device that moved a matrix farther than this times the median device is drawn back; 0 for none.
        update_dtype: What devices send their factors as: `float16`, `int8` or `int4`, masks then as bits.
        base_dtype: What devices hold the frozen weights as: `float32`, `bfloat16` (half the memory; exact for a model
            published in it) or `int8` (a quarter, rounded).
        lora_dropout: Share of the low-rank values that devices drop in a step, in [0, 1).
        example_weights: Weight of a device: its `examples`, their square root (steadier when shards are very
            unequal) or `equal`.
        mask_agreement: Share of the server's importance in a device's ranking of members (rho); 1 in cool-down.
        mask_mode: `uniform` (the same counts in each layer), `per-layer`, or `layers` (whole layers go).
        importance: What members are ranked by; a key of `fedspine_edge.importance.KINDS`.
        mean_compensation: Whether a bias stands in for what removed members contributed on average.
        head_start: How the task head begins: `random` weights, or a `closed-form` that the first round is spent on
            (`opening`); a decoder has no task head and begins at once.
        scaling: alpha / rank (s), the same at every rank.
        importance_gain: Weight of a round's importances in the server's moving average.
        participants: Devices of a round, drawn anew for each; 0 for all.
        min_quorum: Share of the assigned devices without which a deadline does not end a round.
        deadline_slack: A round with deadline D ends at the latest after D times this.
        max_update_norm: Largest Frobenius norm of scaling * B @ A of a matrix (and of a task-head parameter) taken.
        seed: Seed of everything random on the server.
    """

    rounds: int = 20
    steps_per_round: int = 20
    prune_interval: int = 20
    batch_size: int = 16
    learning_rate: float = 2e-3
    learning_rate_rank: int = 0
    final_learning_rate_fraction: float = 0.1
    ranks: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    max_pruning_ratio: float = 0.7
    target_sparsity: float = 0.5
    schedule: str = "cubic"
    warmup_fraction: float = 0.1
    cooldown_fraction: float = 0.2
    controller: str = "structured"
    controller_options: Mapping[str, Any] = field(default_factory=dict)
    fixed_rank: int = 8
    aggregation: str = "spine"
    trim_share: float = 0.25
    clip_factor: float = 0.0
    update_dtype: str = "float16"
    base_dtype: str = "float32"
    lora_dropout: float = 0.0
    example_weights: str = "examples"
    mask_agreement: float = 0.7
    mask_mode: str = "uniform"
    importance: str = "lora-guided"
    mean_compensation: bool = True
    head_start: str = "random"
    scaling: float = 2.0
    importance_gain: float = 0.5
    participants: int = 0
    min_quorum: float = 0.5
    deadline_slack: float = 1.6
    max_update_norm: float = 1000.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check_counts(self)
        _check_shares(self)
        _check_names(self)
        if self.target_sparsity > self.max_pruning_ratio:
            raise ValueError(
                f"target_sparsity {self.target_sparsity} is above max_pruning_ratio {self.max_pruning_ratio}"
            )
        if self.warmup_fraction + self.cooldown_fraction > 1:
            raise ValueError("warmup_fraction and cooldown_fraction leave no rounds to prune in: their sum is above 1")

    @property
    def max_rank(self) -> int:
        """The global adapter's rank (r_max)."""
        return self.ranks[-1]

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON-ready dict that `from_json` reads back."""
        return {
            **dataclasses.asdict(self),
            "ranks": list(self.ranks),
            "controller_options": {**self.controller_options},
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> RunSettings:
        """Returns the settings a `to_json` document describes; raises TypeError on an unknown key."""
        return cls(**{**document, "ranks": tuple(document["ranks"])})


def learning_rate_of(settings: RunSettings, round_index: int, rank: int) -> float:
    """Returns the AdamW step size of a rank in a round: linear from `learning_rate` to its final fraction."""
    progress = round_index / max(1, settings.rounds - 1)
    at_rank = settings.learning_rate_rank / rank if settings.learning_rate_rank else 1.0
    return at_rank * settings.learning_rate * (1 - (1 - settings.final_learning_rate_fraction) * min(1.0, progress))


def _check_counts(settings: RunSettings) -> None:
    for name in ("rounds", "steps_per_round", "prune_interval", "batch_size"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be at least 1, found {getattr(settings, name)}")
    for name in ("participants", "learning_rate_rank", "clip_factor"):
        if getattr(settings, name) < 0:
            raise ValueError(f"{name} must not be negative, found {getattr(settings, name)}")
    _check_ranks(settings)
    for name in ("learning_rate", "scaling", "max_update_norm"):
        if not getattr(settings, name) > 0:
            raise ValueError(f"{name} must be positive, found {getattr(settings, name)}")
    if not 0 <= settings.trim_share < 0.5:
        raise ValueError(f"trim_share must be at least 0 and below 0.5, found {settings.trim_share}")
    if settings.deadline_slack < 1:
        raise ValueError(f"deadline_slack must be at least 1, found {settings.deadline_slack}")


def _check_ranks(settings: RunSettings) -> None:
    ranks = settings.ranks
    if not ranks or ranks[0] < 1 or list(ranks) != sorted(set(ranks)):
        raise ValueError(f"ranks must be ascending and positive, found {list(ranks)}")
    if settings.fixed_rank not in ranks and settings.controller == "fixed":
        raise ValueError(f"fixed_rank {settings.fixed_rank} is not one of ranks {list(ranks)}")


def _check_shares(settings: RunSettings) -> None:
    shares = (
        *("target_sparsity", "warmup_fraction", "cooldown_fraction", "mask_agreement", "importance_gain"),
        *("min_quorum", "final_learning_rate_fraction", "max_pruning_ratio"),
    )
    for name in shares:
        if not 0 <= getattr(settings, name) <= 1:
            raise ValueError(f"{name} must be in 0..1, found {getattr(settings, name)}")
    if not 0 <= settings.lora_dropout < 1:
        raise ValueError(f"lora_dropout must be at least 0 and below 1, found {settings.lora_dropout}")
    if settings.max_pruning_ratio >= 1:
        raise ValueError(f"max_pruning_ratio must be below 1, found {settings.max_pruning_ratio}")


def _check_names(settings: RunSettings) -> None:
    choices = {
        "controller": CONTROLLER_NAMES,
        "aggregation": AGGREGATION_NAMES,
        "mask_mode": MASK_MODES,
        "schedule": SCHEDULES,
        "importance": IMPORTANCES,
        "update_dtype": UPDATE_DTYPES,
        "base_dtype": BASE_DTYPES,
        "head_start": HEAD_STARTS,
        "example_weights": EXAMPLE_WEIGHTS,
    }
    for name, allowed in choices.items():
        if getattr(settings, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, found {getattr(settings, name)}")
    fixed = settings.controller == "fixed" and "memory_per_rank" not in settings.controller_options
    one_rank = fixed or "rank" in settings.controller_options
    if settings.aggregation == "fedavg" and not one_rank:
        raise ValueError(
            "aggregation fedavg averages equal ranks only: use controller fixed, sucb with a rank, or aggregation spine"
        )
