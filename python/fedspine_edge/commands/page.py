"""The page of one run on this machine: read-only, on the loopback, over the run's directory.

Comes in: a run directory, and while a simulation runs its progress. Goes out: a server in a thread of this process, and
`live.json` in the directory, by which any page over it knows what goes on between two closed rounds.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import uvicorn

from fedspine_edge.atomic import write_bytes
from fedspine_edge.errors import LinkError, UsageError
from fedspine_edge.progress import Progress
from fedspine_server.page.app import create_page
from fedspine_server.page.directory_source import LIVE_FILE, DirectorySource

NOTE_SECONDS = 0.5
ALIVE_SECONDS = 5.0
START_SECONDS = 20.0


def open_page(run_dir: Path, port: int) -> str:
    """Serves a run's page from a thread of this process and returns its address.

    Args:
        run_dir: With `experiment.json` or `rounds.jsonl`.
        port: On the loopback; 0 takes a free one.

    Raises:
        UsageError: The directory is no run's.
        LinkError: The port is taken, or the page does not start.
    """
    if not any((run_dir / name).is_file() for name in ("rounds.jsonl", "experiment.json")):
        raise UsageError(f"expected a run in {run_dir}, found no rounds.jsonl", hint="give the directory of a run")
    try:
        listener = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise LinkError(f"cannot listen on 127.0.0.1:{port}: {error.strerror}", hint="choose another port") from error
    config = uvicorn.Config(
        create_page(DirectorySource(run_dir)),
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
    )
    server = _Server(config)
    threading.Thread(target=server.run, args=([listener],), name="page", daemon=True).start()
    limit = time.monotonic() + START_SECONDS
    while not server.started:
        if time.monotonic() > limit:
            raise LinkError("the page did not start", hint="see the messages above")
        time.sleep(0.01)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    print(f"page       {url}", file=sys.stderr, flush=True)  # noqa: T201 - said while the program goes on
    return url


class _Server(uvicorn.Server):
    """uvicorn beside a program that has its own ideas of signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        """Captures none: Ctrl-C is the program's."""
        yield


def stay() -> None:
    """Waits until Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()


class Feed:
    """Notes a simulation's progress in its directory, twice a second at most; and that it is alive, when it is silent.

    Args:
        run_dir: Of the simulation.
    """

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / LIVE_FILE
        self._began = time.monotonic()
        self._wall: dict[int, float] = {}
        if self._file.exists():
            known = json.loads(self._file.read_text())
            self._wall = {int(index): seconds for index, seconds in known.get("wall", {}).items()}
            self._began -= max(self._wall.values(), default=0.0)
        self._progress = Progress()
        self._noted_at = float("-inf")
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="page-feed", daemon=True)
        self._heart.start()

    def follow(self, progress: Progress) -> None:
        """Takes the progress after an event."""
        closed = progress.rounds_done - 1
        if progress.rounds_done > self._progress.rounds_done and not self._over.is_set():
            self._wall.setdefault(closed, round(time.monotonic() - self._began, 2))
        self._progress = progress
        if time.monotonic() - self._noted_at >= NOTE_SECONDS:
            self._note()

    def close(self) -> None:
        """Notes that the simulation is over."""
        self._over.set()
        self._heart.join()
        self._note()

    def _beat(self) -> None:
        while not self._over.wait(ALIVE_SECONDS):
            self._note()

    def _note(self) -> None:
        progress = self._progress
        document = {
            "at": time.time(),
            "over": self._over.is_set(),
            "pid": os.getpid(),
            "phase": progress.phase,
            "rounds": progress.rounds,
            "deadline_seconds": progress.deadline_seconds,
            "devices": dict(progress.devices),
            "wall": self._wall,
        }
        with self._lock:
            self._noted_at = time.monotonic()
            write_bytes(self._file, json.dumps(document).encode())


def simulate_with_page(run_dir: Path, port: int, *, workers: int | None, quiet: bool) -> dict[str, Any]:
    """Runs a simulation and shows it while it goes on; returns its summary."""
    from fedspine_edge.commands.simulate import simulate  # torch, which a page alone does without

    open_page(run_dir, port)
    feed = Feed(run_dir)
    try:
        return simulate(run_dir, workers=workers, quiet=quiet, follow=feed.follow)
    finally:
        feed.close()
