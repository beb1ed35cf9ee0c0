"""Files that are there whole or not at all: written aside, synced, renamed.

Comes in: bytes, or a function that writes files into a new directory. Goes out: the file or directory under its final
name. When the disk is full or the process dies, what was there before is untouched.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from fedspine_edge.errors import CheckpointError


def write_bytes(path: Path, content: bytes, *, private: bool = False) -> None:
    """Writes a file whole or not at all, so that it is there after a power cut.

    Args:
        path: Final name.
        content: All of it.
        private: Whether only its owner may ever read it.

    Raises:
        CheckpointError: The disk is full or the folder cannot be written; nothing half-written stays.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with os.fdopen(os.open(partial, flags, 0o600 if private else 0o644), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise _cannot_write(path, error) from error


def sync_directory(path: Path) -> None:
    """Makes what was renamed into a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_directory(path: Path, fill: Callable[[Path], None]) -> None:
    """Writes a directory whole or not at all, in the place of one of that name.

    Args:
        path: Final name.
        fill: Called with a new, empty directory beside `path`; writes the files.

    Raises:
        CheckpointError: The disk is full or the folder cannot be written; nothing half-written stays.
    """
    partial: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        fill(partial)
        for entry in (partial, *partial.rglob("*")):
            entry.chmod(0o755 if entry.is_dir() else 0o644)
        if path.exists():
            shutil.rmtree(path)
        partial.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _cannot_write(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot write {path}: {error.strerror or error}",
        hint="free some space, or choose another folder with --out; what was saved before is intact",
    )
