"""What systemd is told of a service: that it is ready, what it does, and that it still lives.

Comes in: `NOTIFY_SOCKET` and `WATCHDOG_USEC` from the environment. Goes out: datagrams; nothing without systemd.

Source: sd_notify(3).
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path


def notify(state: str) -> None:
    """Sends one message such as `READY=1`; does nothing outside systemd."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.connect("\0" + address[1:] if address.startswith("@") else address)
            sender.sendall(state.encode())
        except OSError:
            return  # a service must not die because its supervisor does not listen


def report_heard() -> None:
    """Leaves `heard` in the service's runtime directory: since this boot, the server has answered this device."""
    if directory := os.environ.get("RUNTIME_DIRECTORY"):
        (Path(directory.split(":")[0]) / "heard").touch()


class Pulse:
    """Feeds the watchdog from a thread, as long as the main loop shows that it lives.

    Loading torch takes a minute on a slow board, so the loop cannot feed it by itself; a thread alone would feed it for
    a loop that hangs.

    Args:
        patience_seconds: How long the loop may be silent.
        clock: Seconds, monotonic.
    """

    def __init__(self, patience_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._patience = patience_seconds
        self._clock = clock
        self._last = clock()

    def beat(self) -> None:
        """Says that the loop lives."""
        self._last = self._clock()

    @property
    def alive(self) -> bool:
        """Whether the loop was heard of lately."""
        return self._clock() - self._last < self._patience

    def start(self) -> None:
        """Begins to feed, where systemd asked for it."""
        microseconds = os.environ.get("WATCHDOG_USEC", "")
        if microseconds.isdecimal() and int(microseconds) > 0:
            threading.Thread(target=self._feed, args=(int(microseconds) / 2e6,), name="watchdog", daemon=True).start()

    def _feed(self, every_seconds: float) -> None:
        while True:
            if self.alive:
                notify("WATCHDOG=1")
            time.sleep(every_seconds)
