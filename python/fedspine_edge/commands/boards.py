"""The `[fleet]` table of an experiment: how many devices of each board, and how steady they are.

Comes in: the table. Goes out: the board of each device, and the settings of the virtual world they live in.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from fedspine_server.attackers import ATTACKS, attackers
from fedspine_server.device_models import ASSUMED_LAW, FleetSettings
from fedspine_server.step_law import StepLaw


@dataclass(frozen=True)
class Fleet:
    """How many devices of each board take part, and how steadily.

    Attributes:
        tx2: Jetson TX2.
        xavier_nx: Jetson Xavier NX.
        agx_xavier: Jetson AGX Xavier.
        drop_out: Chance that a device does not answer in a round.
        churn: Chance that a device joins or leaves in mid-run.
        bandwidth_dips: Chance that a device's bandwidth is a tenth in a round.
        attackers: Share of the devices that lie.
        attack: How they do: `sign-flip`, `scaled`, `nan` or `label-flip`.
        base_step_seconds: Seconds of a step of the unpruned model on a TX2 in its best mode.
        step_law: What pruning and rank make of it: constant part, part that pruning removes, LoRA at rank 16.
    """

    tx2: int = 0
    xavier_nx: int = 0
    agx_xavier: int = 0
    drop_out: float = 0.0
    churn: float = 0.0
    bandwidth_dips: float = 0.0
    attackers: float = 0.0
    attack: str = "sign-flip"
    base_step_seconds: float = 1.0
    step_law: tuple[float, float, float] = (ASSUMED_LAW.constant, ASSUMED_LAW.kept, ASSUMED_LAW.lora)

    def __post_init__(self) -> None:
        for name in ("tx2", "xavier_nx", "agx_xavier"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, found {getattr(self, name)}")
        if not self.boards:
            raise ValueError("expected at least one device, found none")
        if not 0 <= self.churn <= 1:
            raise ValueError(f"churn must be in 0..1, found {self.churn}")
        if not 0 <= self.attackers <= 1:
            raise ValueError(f"attackers must be in 0..1, found {self.attackers}")
        if self.attack not in ATTACKS:
            raise ValueError(f"attack must be one of {', '.join(ATTACKS)}, found {self.attack}")
        StepLaw(*self.step_law)  # refuses what is none

    @property
    def boards(self) -> tuple[str, ...]:
        """The board of each device."""
        return ("TX2",) * self.tx2 + ("Xavier NX",) * self.xavier_nx + ("AGX Xavier",) * self.agx_xavier

    def scaled(self, num_devices: int) -> Fleet:
        """Returns a fleet of another size in the same mix of boards (largest remainders)."""
        mix = np.asarray([self.tx2, self.xavier_nx, self.agx_xavier]) * num_devices / len(self.boards)
        counts = np.floor(mix).astype(int)
        for index in np.argsort(counts - mix, kind="stable")[: num_devices - counts.sum()]:
            counts[index] += 1
        tx2, xavier_nx, agx_xavier = (int(count) for count in counts)
        return dataclasses.replace(self, tx2=tx2, xavier_nx=xavier_nx, agx_xavier=agx_xavier)

    def liars(self, seed: int) -> list[int]:
        """Returns which devices lie, by index."""
        return attackers(len(self.boards), self.attackers, seed)

    def world(self, seed: int) -> FleetSettings:
        """Returns the settings of the virtual world the devices live in."""
        return FleetSettings(
            seed=seed,
            base_step_seconds=self.base_step_seconds,
            step_law=StepLaw(*self.step_law),
            drop_out_probability=self.drop_out,
            bandwidth_dip_probability=self.bandwidth_dips,
        )
