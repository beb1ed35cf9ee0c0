"""A Jetson's power modes through nvpmodel: list them, choose one, and put the first one back whatever happens.

Comes in: the program's name and a filesystem ROOT. Goes out: the board in another mode, for the length of a block.

Source: NVIDIA's Jetson Linux guide, nvpmodel.
"""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from fedspine_edge.errors import FedSpineError, IncompatibleError, InterruptedRunError
from fedspine_edge.profiling.board import mode_names

PROGRAM = "nvpmodel"
TIMEOUT_SECONDS = 60.0
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Mode(NamedTuple):
    """A power mode: its number and what it is called."""

    number: int
    name: str


def available_modes(root: Path = Path("/")) -> list[Mode]:
    """Returns the modes of this board, by number.

    Raises:
        IncompatibleError: The board has none.
    """
    modes = [Mode(number, name) for number, name in sorted(mode_names(root).items())]
    if not modes:
        raise IncompatibleError(
            "expected power modes in /etc/nvpmodel.conf, found none", hint="only Jetsons have them: leave the sweep out"
        )
    return modes


def current_mode(program: str = PROGRAM) -> int:
    """Returns the number of the mode that is set.

    Raises:
        IncompatibleError: nvpmodel is not there or does not say.
    """
    numbers = re.findall(r"^\s*(\d+)\s*$", _run(program, "-q"), re.MULTILINE)
    if not numbers:
        raise IncompatibleError(f"expected a power mode from {program} -q, found none", hint="try it with sudo")
    return int(numbers[-1])


def choose_mode(number: int, program: str = PROGRAM) -> bool:
    """Chooses a mode and returns whether it is set now; some take a restart, which is refused here.

    Raises:
        IncompatibleError: nvpmodel is not there or fails.
    """
    _run(program, "-m", str(number))
    return current_mode(program) == number


@contextlib.contextmanager
def mode_kept(program: str = PROGRAM) -> Iterator[int]:
    """Yields the mode that is set and chooses it again at the end: after an error, Ctrl-C or SIGTERM as well.

    Raises:
        IncompatibleError: nvpmodel is not there or does not say.
        InterruptedRunError: A signal ended the block; the mode is back by then.
        FedSpineError: The mode could not be put back.
    """
    before = current_mode(program)
    handlers = {number: signal.signal(number, _interrupted) for number in ENDING}
    try:
        yield before
    finally:
        # A second signal must not end the program before the mode is back.
        for number in ENDING:
            signal.signal(number, signal.SIG_IGN)
        try:
            _put_back(before, program)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _put_back(number: int, program: str) -> None:
    if current_mode(program) != number and not choose_mode(number, program):
        raise FedSpineError(
            f"expected power mode {number} again, found {current_mode(program)}",
            hint=f"set it by hand: sudo {program} -m {number}",
        )


def _interrupted(number: int, _: FrameType | None) -> None:
    raise InterruptedRunError(f"interrupted by {signal.Signals(number).name}", hint="the power mode was put back")


def _run(program: str, *arguments: str) -> str:
    command = [program, *arguments]
    try:
        # A session of its own: Ctrl-C in the terminal must not end the program that puts the mode back.
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_SECONDS,
            start_new_session=True,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise IncompatibleError(
            f"expected {' '.join(command)} to run, found {type(error).__name__}",
            hint="power modes need nvpmodel, which only Jetsons have",
        ) from error
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
        raise IncompatibleError(
            f"expected {' '.join(command)} to work, it ended with {done.returncode}: {reason}", hint="run with sudo"
        )
    return done.stdout
