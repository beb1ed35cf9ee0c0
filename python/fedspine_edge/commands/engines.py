"""Who does the devices' rounds of a simulated fleet: processes of this machine, or Ray. The results are the same.

Comes in: a name, how many at once. Goes out: an open pool.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedspine_edge.commands.ray_workers import RayWorkers
from fedspine_edge.commands.workers import Workers, WorkerSetup
from fedspine_edge.errors import UsageError

ENGINE_NAMES = ("processes", "ray")

Pool = Workers | RayWorkers


@dataclass(frozen=True)
class Engine:
    """What a pool is made by.

    Attributes:
        name: One of `ENGINE_NAMES`.
        num_workers: Devices trained at once.
        ray_address: A running Ray cluster; None starts one on this machine.
    """

    name: str
    num_workers: int
    ray_address: str | None = None

    def __post_init__(self) -> None:
        if self.name not in ENGINE_NAMES:
            raise UsageError(f"expected an engine among {', '.join(ENGINE_NAMES)}, found {self.name!r}")

    def open(self, setup: WorkerSetup) -> Pool:
        """Returns a pool, to be used as a context manager.

        Raises:
            UsageError: Ray is wanted and not installed.
            LinkError: There is no Ray cluster at the address.
        """
        if self.name == "ray":
            return RayWorkers(setup, self.num_workers, self.ray_address)
        return Workers(setup, self.num_workers)
