"""Worker processes that do the devices' rounds of a simulated fleet, each with the base model loaded once.

Comes in: assignments, or the global model to be judged. Goes out: updates, or a count of right answers. Each task runs
on one thread, so that the result does not depend on how many workers there are.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from fedspine_edge.batches import TokenSet
from fedspine_edge.checkpoint import load_device_state, save_device_state
from fedspine_edge.device import run_round
from fedspine_edge.errors import MemoryLimitError, TuningError
from fedspine_edge.protocol import Assignment, Update
from fedspine_edge.workbench import GlobalModel, Workbench, num_correct, open_workbench

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker needs to know, once.

    Attributes:
        base_path: Model directory.
        base_sha256: Its hash.
        num_labels: Classes of the task.
        choices: First token of each class's word for a decoder, None for a classifier.
        shards: device_id -> its own examples.
        judged: Name -> rows the global model is judged by.
    """

    base_path: Path
    base_sha256: str
    num_labels: int
    choices: list[int] | None
    shards: Mapping[str, TokenSet]
    judged: Mapping[str, TokenSet]


@dataclass
class _Worker:
    setup: WorkerSetup
    bench: Workbench


_worker: list[_Worker] = []  # filled once in each worker process, by `_start`


def _start(setup: WorkerSetup) -> None:
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    # Ctrl-C goes to the whole process group; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    bench = open_workbench(
        setup.base_path, sha256=setup.base_sha256, num_labels=setup.num_labels, choices=setup.choices
    )
    _worker.append(_Worker(setup, bench))


def _end_with_parent() -> None:
    """A killed program must not leave workers behind that hold memory and wait for tasks forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _tune(assignment: Assignment, state_folder: Path) -> Update | None:
    worker = _worker[0]
    state = load_device_state(state_folder, assignment.device_id, assignment.round_index)
    try:
        update, state = run_round(worker.bench, assignment, worker.setup.shards[assignment.device_id], state)
    except TuningError as error:
        logger.warning("tuning failed device=%s round=%d: %s", assignment.device_id, assignment.round_index, error)
        return None
    save_device_state(state_folder, assignment.device_id, assignment.round_index, state)
    return update


def _judge(world: GlobalModel, name: str, part: int, parts: int) -> int:
    worker = _worker[0]
    tokens = worker.setup.judged[name]
    return num_correct(worker.bench, world, tokens.take(np.arange(part, len(tokens), parts)))


class Workers:
    """A pool of worker processes; a context manager.

    Args:
        setup: What each worker needs to know.
        num_workers: Devices trained at once.
    """

    def __init__(self, setup: WorkerSetup, num_workers: int) -> None:
        self._setup = setup
        self._num_workers = num_workers
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        # glibc otherwise keeps the last round's packed weights: 1.9 GB instead of 1.55 GB a worker on SmolLM2-135M.
        os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "2097152")
        os.environ.setdefault("MALLOC_ARENA_MAX", "2")
        # One process loads torch and forks the workers: they start together and share its pages.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._pool = ProcessPoolExecutor(num_workers, context, initializer=_start, initargs=(setup,))

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            for process in list((self._pool._processes or {}).values()):
                process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def tune(self, assignments: Sequence[Assignment], *, state_folder: Path) -> Iterator[Update]:
        """Yields the update of each assignment as it is done; a device whose loss is not finite yields none.

        Args:
            assignments: One a device.
            state_folder: Where the devices' states are kept.

        Raises:
            MemoryLimitError: A worker process died.
        """
        # The longest first, so that no worker idles at the end of the round.
        by_work = sorted(assignments, key=lambda a: a.num_steps * (1 - a.pruning_ratio), reverse=True)
        for update in _results([self._pool.submit(_tune, assignment, state_folder) for assignment in by_work]):
            if update is not None:
                yield update

    def accuracy(self, world: GlobalModel, name: str) -> float:
        """Returns the share of rows of the named set that the global model classifies rightly, 0..1."""
        parts = self._num_workers
        counts: Iterator[int] = _results([self._pool.submit(_judge, world, name, part, parts) for part in range(parts)])
        return sum(counts) / len(self._setup.judged[name])


def _results(futures: list[Future]) -> Iterator:  # type: ignore[type-arg]
    waiting = set(futures)
    futures.clear()  # a future holds its result: who has been yielded is let go
    try:
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            while done:
                yield done.pop().result()
    except BrokenProcessPool as error:
        raise MemoryLimitError(
            "a worker process died in the middle of a round, most likely for want of memory",
            hint="use fewer workers: --workers 1 --resume DIR",
        ) from error
