"""How long boards take: device and bandwidth models on a virtual clock, until real boards report.

Comes in: a device's description, a round, and what it is asked. Goes out: its power mode, load and bandwidth in that
round and the seconds they make. Everything random comes from generators keyed by (seed, device, round), so a resumed
run and any order of devices see the same.

Source: docs/algorithm.md, section 10; classes and counts as in FedSpine (arXiv 2501.02438), 30 TX2, 40 NX, 10 AGX.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from fedspine_server.attackers import ATTACKS
from fedspine_server.step_law import StepLaw

GIB = 1 << 30
ROUNDS_A_MODE = 20  # power modes are drawn anew after so many rounds
LOAD_RANGE = (1.0, 1.6)
NOISE_DEVIATION = 0.08  # lognormal
BANDWIDTH_MEANS = (24e6, 16e6, 9e6, 4e6)  # bits a second, one a distance group
BANDWIDTH_DEVIATION = 0.25  # lognormal
BANDWIDTH_RANGE = (1e6, 30e6)
DIP_FACTOR = 0.1
ASSUMED_LAW = StepLaw(0.15, 0.78, 0.07)  # until a board's own is measured


@dataclass(frozen=True)
class Board:
    """A class of devices.

    Attributes:
        step_time: Time of a step in the best power mode, relative to a TX2.
        mode_multipliers: What each power mode makes of it.
        memory_bytes: Memory; where a board is sold with two sizes, both.
        share: Share of the fleet.
    """

    step_time: float
    mode_multipliers: tuple[float, ...]
    memory_bytes: tuple[int, ...]
    share: float


BOARDS: Mapping[str, Board] = MappingProxyType(
    {
        "TX2": Board(1.0, (1.0, 1.16, 1.53), (8 * GIB,), 30 / 80),
        "Xavier NX": Board(0.55, (1.0, 1.20, 1.375), (8 * GIB, 16 * GIB), 40 / 80),
        "AGX Xavier": Board(0.25, (1.0, 1.53, 2.05, 2.65), (32 * GIB,), 10 / 80),
    }
)


@dataclass(frozen=True)
class DeviceSpec:
    """One device of the fleet.

    Attributes:
        device_id: Unique in the fleet.
        board: A key of `BOARDS`.
        num_examples: Examples it trains on.
        memory_bytes: Its memory.
        bandwidth_group: Index into `BANDWIDTH_MEANS`; higher is farther.
        join_round: First round it takes part in.
        leave_round: First round it no longer takes part in; None stays to the end.
        attack: How it lies, one of `attackers.ATTACKS`; None for an honest device.
    """

    device_id: str
    board: str
    num_examples: int
    memory_bytes: int
    bandwidth_group: int
    join_round: int = 0
    leave_round: int | None = None
    attack: str | None = None

    def __post_init__(self) -> None:
        if self.attack not in (None, *ATTACKS):
            raise ValueError(f"attack must be one of {', '.join(ATTACKS)}, found {self.attack}")
        if self.board not in BOARDS:
            raise ValueError(f"board must be one of {', '.join(BOARDS)}, found {self.board}")
        if not 0 <= self.bandwidth_group < len(BANDWIDTH_MEANS):
            raise ValueError(f"bandwidth_group must be in 0..{len(BANDWIDTH_MEANS) - 1}, found {self.bandwidth_group}")

    def present(self, round_index: int) -> bool:
        """Returns whether the device takes part in a round."""
        return self.join_round <= round_index and (self.leave_round is None or round_index < self.leave_round)


@dataclass(frozen=True)
class FleetSettings:
    """The world the fleet lives in.

    Attributes:
        seed: Seed of modes, loads, bandwidths and drop-outs.
        base_step_seconds: Seconds of a step of the unpruned model on a TX2 in its best mode without load.
        step_law: What pruning and rank make of it.
        drop_out_probability: Chance that a device does not answer in a round.
        bandwidth_dip_probability: Chance that its bandwidth is a tenth in a round.
        timeout_seconds: Length of a round from which nothing comes back and that has no deadline.
    """

    seed: int = 0
    base_step_seconds: float = 1.0
    step_law: StepLaw = ASSUMED_LAW
    drop_out_probability: float = 0.0
    bandwidth_dip_probability: float = 0.0
    timeout_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("drop_out_probability", "bandwidth_dip_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, found {getattr(self, name)}")
        for name in ("base_step_seconds", "timeout_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, found {getattr(self, name)}")


@dataclass(frozen=True)
class Conditions:
    """One device in one round.

    Attributes:
        power_mode: Index of the board's power mode.
        slowdown: Step time relative to the board's best mode without load.
        bits_per_second: Bandwidth, the same both ways.
        dropped: Whether it will not answer.
    """

    power_mode: int
    slowdown: float
    bits_per_second: float
    dropped: bool


def conditions_of(spec: DeviceSpec, round_index: int, fleet: FleetSettings) -> Conditions:
    """Returns what a device meets in a round."""
    key = zlib.crc32(spec.device_id.encode())
    multipliers = BOARDS[spec.board].mode_multipliers
    power_mode = int(
        np.random.default_rng([fleet.seed, key, round_index // ROUNDS_A_MODE, 1]).integers(len(multipliers))
    )
    generator = np.random.default_rng([fleet.seed, key, round_index, 2])
    load = generator.uniform(*LOAD_RANGE) * math.exp(NOISE_DEVIATION * generator.standard_normal())
    spread = math.exp(BANDWIDTH_DEVIATION * generator.standard_normal() - BANDWIDTH_DEVIATION**2 / 2)
    bandwidth = float(np.clip(BANDWIDTH_MEANS[spec.bandwidth_group] * spread, *BANDWIDTH_RANGE))
    dropped, dips = generator.random(2) < (fleet.drop_out_probability, fleet.bandwidth_dip_probability)
    bandwidth *= DIP_FACTOR if dips else 1.0
    return Conditions(power_mode, multipliers[power_mode] * load, bandwidth, bool(dropped))


def compute_seconds(
    spec: DeviceSpec,
    conditions: Conditions,
    *,
    num_steps: int,
    pruning_ratio: float,
    rank: int,
    fleet: FleetSettings,
) -> float:
    """Returns the seconds of local work: the board's, in these conditions, for steps the law tells the size of."""
    work = fleet.step_law.work(pruning_ratio, rank)
    return num_steps * fleet.base_step_seconds * BOARDS[spec.board].step_time * conditions.slowdown * work


def make_specs(
    num_examples: Sequence[int], *, seed: int, rounds: int, churn: float = 0.0, boards: Sequence[str] | None = None
) -> tuple[DeviceSpec, ...]:
    """Returns a fleet, one device for each entry.

    Args:
        num_examples: Examples of each device.
        seed: Decides which device is what.
        rounds: Rounds of the run.
        churn: Chance that a device joins or leaves in mid-run; the first device is always there.
        boards: The board of each device, in an order the seed then changes; the paper's mix when None.
    """
    generator = np.random.default_rng([seed, 3])
    names = _board_names(len(num_examples)) if boards is None else list(boards)
    shuffled = [names[index] for index in generator.permutation(len(names))]
    groups = generator.permutation(np.arange(len(num_examples)) % len(BANDWIDTH_MEANS))
    specs = []
    for index, (count, board, group) in enumerate(zip(num_examples, shuffled, groups, strict=True)):
        sizes = BOARDS[board].memory_bytes
        memory = sizes[int(generator.integers(len(sizes)))]
        changes, joins = generator.random(2) < (churn, 0.5)
        when = int(generator.integers(1, max(2, rounds)))
        changes = changes and index > 0
        specs.append(
            DeviceSpec(
                device_id=f"device-{index:02d}",
                board=board,
                num_examples=int(count),
                memory_bytes=memory,
                bandwidth_group=int(group),
                join_round=when if changes and joins else 0,
                leave_round=when if changes and not joins else None,
            )
        )
    return tuple(specs)


def _board_names(num_devices: int) -> list[str]:
    """The paper's shares by largest remainder, so that even two devices differ."""
    wanted = {name: board.share * num_devices for name, board in BOARDS.items()}
    counts = {name: int(value) for name, value in wanted.items()}
    by_remainder = sorted(wanted, key=lambda name: counts[name] - wanted[name])
    for name in by_remainder[: num_devices - sum(counts.values())]:
        counts[name] += 1
    return [name for name, count in counts.items() for _ in range(count)]
