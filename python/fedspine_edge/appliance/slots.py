"""The two slots of an image: which one runs, and the other one filled so that a power cut at any moment leaves one.

Comes in: a root file system, a kernel, an initial file system. Goes out: a slot that the boot loader will try. Its boot
entry is taken away first and put back last, under its final name, when all of it has been read back.

| entry | what the boot loader does |
|---|---|
| `slot-a.conf` | starts it: it was good once |
| `slot-b+3.conf` | starts it if it is the newest, and counts: `slot-b+2-1.conf`; at `+0-3` it is the last choice |

Source: systemd-boot(7), systemd-bless-boot.service(8).
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from fedspine_edge.atomic import sync_directory
from fedspine_edge.errors import CheckpointError

logger = logging.getLogger(__name__)

ENTRY = re.compile(r"slot-([ab])(\+\d+(-\d+)?)?\.conf")
BLOCK = 1 << 20
TRIES = 3
SQUASHFS_MAGIC, SQUASHFS_BYTES_AT = b"hsqs", 40


@dataclass(frozen=True)
class Board:
    """A board's slots.

    Attributes:
        running: `a` or `b`.
        efi: Where the boot partition is mounted.
        devices: The partition of each slot.
        writable: Makes the boot partition writable for a while.
    """

    running: str
    efi: Path
    devices: dict[str, Path]
    writable: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def spare(self) -> str:
        """The slot that does not run."""
        return "b" if self.running == "a" else "a"

    def entry(self, slot: str) -> Path | None:
        """Returns the boot entry of a slot, None when it has none."""
        found = [path for path in self._entries.iterdir() if (match := ENTRY.fullmatch(path.name)) and match[1] == slot]
        return min(found, default=None)

    @property
    def _entries(self) -> Path:
        return self.efi / "loader" / "entries"

    def kernel(self, slot: str) -> Path:
        """Returns the folder of a slot's kernel and initial file system."""
        return self.efi / f"slot-{slot}"


def this_board() -> Board:
    """Returns the slots of the board that this runs on.

    Raises:
        CheckpointError: It was not started from a slot.
    """
    found = re.search(r"\bfedspine\.slot=([ab])\b", Path("/proc/cmdline").read_text())
    if found is None:
        raise CheckpointError("expected fedspine.slot= on the kernel's line, found none")
    devices = {slot: Path(f"/dev/disk/by-partlabel/root_{slot}") for slot in "ab"}
    return Board(found[1], Path("/efi"), devices, _writable_efi)


@contextmanager
def _writable_efi() -> Iterator[None]:
    subprocess.run(["mount", "-o", "remount,rw", "/efi"], check=True)
    try:
        yield
    finally:
        os.sync()
        subprocess.run(["mount", "-o", "remount,ro", "/efi"], check=True)


def keep_spare(board: Board) -> None:
    """Fills the other slot with the running one, unless it has a boot entry already."""
    if board.entry(board.spare) is not None:
        return
    own = board.entry(board.running)
    if own is None:
        raise CheckpointError(f"expected the boot entry of slot {board.running}, found none")
    version = entry_version(own.read_text())
    folder = board.kernel(board.running)
    fill(board, board.devices[board.running], folder / "linux", folder / "initrd", version=version - 1)
    logger.info("slot %s is the spare of slot %s", board.spare, board.running)


def entry_version(text: str) -> int:
    """Returns the version in a boot entry, 0 when there is none."""
    found = re.search(r"^version (\d+)$", text, re.M)
    return int(found[1]) if found else 0


def fill(board: Board, root: Path, kernel: Path, initrd: Path, *, version: int) -> None:
    """Writes the slot that does not run and gives it three tries; of two good slots the higher version is started.

    Raises:
        CheckpointError: It does not fit, or what was read back differs.
    """
    slot, own = board.spare, board.entry(board.running)
    if own is None:
        raise CheckpointError(f"expected the boot entry of slot {board.running}, found none")
    options = re.search(r"^options (.*)$", own.read_text(), re.M)
    words = options[1].split()[1:] if options else []
    with board.writable():
        if (old := board.entry(slot)) is not None:
            old.unlink()
            sync_directory(old.parent)
        _copy(root, board.devices[slot], _num_bytes(root))
        folder = board.kernel(slot)
        folder.mkdir(exist_ok=True)
        for source, name in ((kernel, "linux"), (initrd, "initrd")):
            _copy(source, folder / name, source.stat().st_size)
        text = (
            f"title FedSpine slot {slot}\nsort-key fedspine\nversion {version}\nlinux /slot-{slot}/linux\n"
            f"initrd /slot-{slot}/initrd\noptions {' '.join([f'fedspine.slot={slot}', *words])}\n"
        )
        partial = own.with_name(f"slot-{slot}.partial")
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(own.with_name(f"slot-{slot}+{TRIES}.conf"))
        sync_directory(own.parent)


def _num_bytes(root: Path) -> int:
    """Returns the size of a squashfs, which a partition is larger than.

    Raises:
        CheckpointError: It is none.
    """
    with root.open("rb") as file:
        head = file.read(96)
    if head[:4] != SQUASHFS_MAGIC:
        raise CheckpointError(f"expected a squashfs in {root}, found another content")
    return int.from_bytes(head[SQUASHFS_BYTES_AT : SQUASHFS_BYTES_AT + 8], "little")


def _copy(source: Path, target: Path, num_bytes: int) -> None:
    """Copies a file or partition, syncs it and reads it back."""
    digest = hashlib.sha256()
    flags = os.O_WRONLY | (0 if target.is_block_device() else os.O_CREAT | os.O_TRUNC)
    try:
        with source.open("rb") as read, os.fdopen(os.open(target, flags, 0o600), "wb") as written:
            left = num_bytes
            while left and (block := read.read(min(BLOCK, left))):
                digest.update(block)
                written.write(block)
                left -= len(block)
            written.flush()
            os.fsync(written.fileno())
            os.posix_fadvise(written.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror}") from error
    if left or _digest(target, num_bytes) != digest.hexdigest():
        raise CheckpointError(f"expected what was written in {target}, read something else back")


def _digest(path: Path, num_bytes: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while num_bytes and (block := file.read(min(BLOCK, num_bytes))):
            digest.update(block)
            num_bytes -= len(block)
    return digest.hexdigest()


def free_bytes(board: Board) -> int:
    """Returns what is free on the boot partition."""
    return shutil.disk_usage(board.efi).free
