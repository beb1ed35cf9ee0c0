"""The devices' rounds of a simulated fleet as Ray tasks, on this machine or on a cluster.

Comes in: what `workers.Workers` takes. Goes out: the same updates, bit for bit. The base model lies in Ray's object
store once and on each node's disk once; what a device remembers travels with its task, so that a task may run on any
node, and again when its node is lost. Usage statistics are off.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from fedspine_edge.atomic import write_directory
from fedspine_edge.batches import TokenSet
from fedspine_edge.checkpoint import load_device_state, save_device_state
from fedspine_edge.commands.workers import WorkerSetup
from fedspine_edge.config import cache_directory
from fedspine_edge.device import DeviceState, run_round
from fedspine_edge.errors import LinkError, TuningError, UsageError
from fedspine_edge.protocol import Assignment, Update
from fedspine_edge.workbench import GlobalModel, Workbench, num_correct, open_workbench

WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_MMAP_THRESHOLD_": "2097152",
    "MALLOC_ARENA_MAX": "2",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
}
LOOPBACK = "127.0.0.1"

logger = logging.getLogger(__name__)

CLUSTER_HINT = "ray start --head, then --ray-address HOST:PORT; Ray's own log is in /tmp/ray"
ANSWER_SECONDS = 10.0

_opened: dict[str, Workbench] = {}  # the base model in a worker process, kept between its tasks


def _check_that_somebody_answers(address: str) -> None:
    """Ray itself tries for many minutes where nobody does."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # a name that Ray resolves, such as `auto`
    try:
        socket.create_connection((host, int(port)), ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise LinkError(f"expected a Ray cluster at {address}, found: {error}", hint=CLUSTER_HINT) from error


class RayWorkers:
    """Ray tasks in the place of worker processes; a context manager.

    Args:
        setup: What each task needs to know.
        num_workers: Devices trained at once, on a cluster that is started here; one that is there uses all it has.
        address: A running cluster's address; None starts one on this machine, on the loopback alone.

    Raises:
        UsageError: Ray is not installed.
        LinkError: There is no cluster at the address.
    """

    def __init__(self, setup: WorkerSetup, num_workers: int, address: str | None) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray
        except ImportError as error:
            raise UsageError(
                "expected Ray for --engine ray, found none", hint="pip install 'fedspine-edge[ray]'"
            ) from error
        self._ray: Any = ray
        if address:
            _check_that_somebody_answers(address)
        own: dict[str, Any] = {"num_cpus": num_workers, "include_dashboard": False, "_node_ip_address": LOOPBACK}
        try:
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": WORKER_ENVIRONMENT},
                **({} if address else own),
            )
        except Exception as error:  # Ray raises bare ones here
            raise LinkError(
                f"expected a Ray cluster at {address or LOOPBACK}, found: {error}", hint=CLUSTER_HINT
            ) from error
        self._parts = num_workers
        self._judged_rows = {name: len(tokens) for name, tokens in setup.judged.items()}
        task = (setup.base_sha256, setup.num_labels, setup.choices)
        self._files = ray.put({file.name: np.fromfile(file, np.uint8) for file in _files(setup.base_path)})
        self._task = task
        self._shards = {name: ray.put(tokens) for name, tokens in setup.shards.items()}
        self._judged = {name: ray.put(tokens) for name, tokens in setup.judged.items()}
        self._tune = ray.remote(num_cpus=1)(_tune)
        self._judge = ray.remote(num_cpus=1)(_judge)

    def __enter__(self) -> RayWorkers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ray.shutdown()

    def tune(self, assignments: Sequence[Assignment], *, state_folder: Path) -> Iterator[Update]:
        """Yields the update of each assignment as it is done; a device whose loss is not finite yields none.

        Args:
            assignments: One a device.
            state_folder: Where the devices' states are kept, on this machine.

        Raises:
            LinkError: Ray lost a task for good.
        """
        by_work = sorted(assignments, key=lambda a: a.num_steps * (1 - a.pruning_ratio), reverse=True)
        calls = [
            self._tune.remote(
                self._files,
                self._task,
                self._shards[one.device_id],
                one,
                load_device_state(state_folder, one.device_id, one.round_index),
            )
            for one in by_work
        ]
        for found in self._done(calls):
            if found is not None:
                update, state = found
                save_device_state(state_folder, update.device_id, update.round_index, state)
                yield update

    def accuracy(self, world: GlobalModel, name: str) -> float:
        """Returns the share of rows of the named set that the global model classifies rightly, 0..1."""
        parts, held = self._parts, self._ray.put(world)
        calls = [
            self._judge.remote(self._files, self._task, self._judged[name], held, part, parts) for part in range(parts)
        ]
        return float(sum(self._done(calls)) / self._judged_rows[name])

    def _done(self, calls: Sequence[Any]) -> Iterator[Any]:
        waiting = list(calls)
        try:
            while waiting:
                (ready,), waiting = self._ray.wait(waiting, num_returns=1)
                yield self._ray.get(ready)
        except self._ray.exceptions.RayError as error:
            raise LinkError(
                f"a Ray task was lost for good: {error}", hint="the last finished round is saved: --resume DIR"
            ) from error


def _files(path: Path) -> list[Path]:
    return [file for file in sorted(path.iterdir()) if file.is_file()]


def _tune(
    files: Mapping[str, np.ndarray],
    task: tuple[str, int, list[int] | None],
    examples: TokenSet,
    assignment: Assignment,
    state: DeviceState,
) -> tuple[Update, DeviceState] | None:
    bench = _bench(files, task)
    try:
        return run_round(bench, assignment, examples, state)
    except TuningError as error:
        logger.warning("tuning failed device=%s round=%d: %s", assignment.device_id, assignment.round_index, error)
        return None


def _judge(
    files: Mapping[str, np.ndarray],
    task: tuple[str, int, list[int] | None],
    tokens: TokenSet,
    world: GlobalModel,
    part: int,
    parts: int,
) -> int:
    return num_correct(_bench(files, task), world, tokens.take(np.arange(part, len(tokens), parts)))


def _bench(files: Mapping[str, np.ndarray], task: tuple[str, int, list[int] | None]) -> Workbench:
    """The base model, opened once in a process from the one copy on its node's disk."""
    sha256, num_labels, choices = task
    key = repr(task)
    if key not in _opened:
        torch.set_num_threads(1)
        path = cache_directory() / "ray" / sha256
        if not path.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_directory(path, lambda folder: _write(folder, files))
        _opened.clear()
        _opened[key] = open_workbench(path, sha256=sha256, num_labels=num_labels, choices=choices)
    return _opened[key]


def _write(folder: Path, files: Mapping[str, np.ndarray]) -> None:
    for name, content in files.items():
        content.tofile(folder / name)
