"""The errors of FedSpine Edge: one class a kind of trouble, each with the exit code the program ends with.

`ValueError` is for a caller's mistake; the classes here are for what the world does to us. A message states what was
expected, then what was found, then (in `hint`) the remedy.
"""

from __future__ import annotations


class FedSpineError(Exception):
    """Something outside this program is not as it must be.

    Args:
        message: What was expected and what was found; lower-case start, no full stop.
        hint: What the user can do about it.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(FedSpineError):
    """A flag, a preset or a settings file says something that cannot be done (exit code 2)."""

    exit_code = 2


class DataError(FedSpineError):
    """A data file is missing, malformed or too small for what is asked (exit code 1)."""


class CheckpointError(FedSpineError):
    """A model directory or a saved state is truncated, of another version or cannot be written (exit code 1)."""


class TuningError(FedSpineError):
    """A local round went wrong, for instance its loss is not finite (exit code 1)."""


class VerificationError(FedSpineError):
    """An exported file does not say what the model it came from says (exit code 3)."""

    exit_code = 3


class MemoryLimitError(FedSpineError):
    """The work will not fit in memory (exit code 4)."""

    exit_code = 4


class LinkError(FedSpineError):
    """Network or authentication trouble between a device and the server (exit code 5)."""

    exit_code = 5


class IncompatibleError(FedSpineError):
    """A model, an adapter or a message of a kind, a base or a version this program does not take (exit code 6)."""

    exit_code = 6


class InterruptedRunError(FedSpineError):
    """The user stopped the program; what was finished is saved (exit code 130)."""

    exit_code = 130


class ImageError(FedSpineError):
    """A device image cannot be built, is damaged, or must not be written where it was to go (exit code 1)."""
