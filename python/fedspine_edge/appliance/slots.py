"""The two slots of an image: which one runs, and the other one filled so that a power cut at any moment leaves one.

Comes in: a root file system, a kernel, an initial file system. Goes out: a slot that the boot loader will try. Its boot
entry is taken away first and put back last, under its final name, when all of it has been read back.

| entry | what the boot loader does |
|---|---|
| `slot-a.conf` | starts it: it was good once |
| `slot-b+3.conf` | starts it if it is the newest, and counts: `slot-b+2-1.conf`; at `+0-3` it is the last choice |

A good slot that dies later is put on trial again by the initial file system (`device_images/init.sh`), or by `distrust`
where that was not what failed. A slot whose three times are used up is dead: the next good boot fills it anew, and
remembers its release if that was newer, so that an update which does not come up is not brought again and again.

Source: systemd-boot(7), systemd-bless-boot.service(8).
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from fedspine_edge.atomic import sync_directory, write_bytes
from fedspine_edge.errors import CheckpointError

logger = logging.getLogger(__name__)

ENTRY = re.compile(r"slot-([ab])(?:\+(\d+)(?:-\d+)?)?\.conf")
BLOCK = 1 << 20
TRIES = 3
OWN_WORDS = ("fedspine.slot=", "fedspine.release=")
SQUASHFS_MAGIC, SQUASHFS_BYTES_AT = b"hsqs", 40
REFUSED_FILE = Path("/var/lib/private/fedspine-updates/refused")


class Readable(Protocol):
    """What a slot is filled from: a file, a partition, an answer of a server."""

    def read(self, size: int, /) -> bytes:
        """Returns at most so many bytes, none at the end."""
        ...


@dataclass(frozen=True)
class Source:
    """One of the three parts of a slot.

    Attributes:
        read: Opens it.
        num_bytes: How much of it is copied.
        sha256: What it must be; None for what is trusted as it is.
    """

    read: Callable[[], AbstractContextManager[Readable]]
    num_bytes: int
    sha256: str | None = None


def file_source(path: Path, num_bytes: int | None = None) -> Source:
    """Returns a file or the first bytes of a partition as a source."""
    return Source(lambda: path.open("rb"), path.stat().st_size if num_bytes is None else num_bytes)


@dataclass(frozen=True)
class Content:
    """What a slot holds: a release or a copy. Of two good ones the higher version is started, and a copy's is lower."""

    root: Source
    linux: Source
    initrd: Source
    version: int
    release: int


@dataclass(frozen=True)
class Board:
    """A board's slots.

    Attributes:
        running: `a` or `b`.
        efi: Where the boot partition is mounted.
        devices: The partition of each slot.
        writable: Makes the boot partition writable for a while.
        refused_file: Remembers releases that did not come up.
    """

    running: str
    efi: Path
    devices: dict[str, Path]
    writable: Callable[[], AbstractContextManager[None]] = nullcontext
    refused_file: Path = field(default=REFUSED_FILE)

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


def tries_left(entry: Path) -> int | None:
    """Returns how often a boot entry is still tried; None for a slot that was good."""
    found = ENTRY.fullmatch(entry.name)
    return int(found[2]) if found and found[2] is not None else None


def on_trial(board: Board) -> bool:
    """Says whether the running slot was not good yet while the other one was: then there is a way back."""
    own, other = board.entry(board.running), board.entry(board.spare)
    return own is not None and other is not None and tries_left(own) is not None and tries_left(other) is None


def distrust(board: Board) -> None:
    """Puts a good slot whose system stopped on trial again, if there is another one."""
    own = board.entry(board.running)
    if own is None or tries_left(own) is not None or board.entry(board.spare) is None:
        return
    with board.writable():
        own.rename(own.with_name(f"slot-{board.running}+{TRIES - 1}-1.conf"))
        sync_directory(own.parent)


def keep_spare(board: Board) -> None:
    """Fills the other slot with the running one, unless there is one that was good or is still to be tried.

    Raises:
        CheckpointError: It cannot be written.
    """
    other, text = board.entry(board.spare), _own_entry(board).read_text()
    version, release = entry_version(text), re.search(r"\bfedspine\.release=(\d+)\b", text)
    if other is not None:
        if tries_left(other) != 0:
            return
        if (dead := entry_version(other.read_text())) > version:
            refuse(board, dead)
            logger.warning("release %d did not come up and is not tried again", dead)
    folder, device = board.kernel(board.running), board.devices[board.running]
    with device.open("rb") as file:
        root = file_source(device, num_bytes_of(file))
    linux, initrd = file_source(folder / "linux"), file_source(folder / "initrd")
    fill(board, Content(root, linux, initrd, version - 1, int(release[1]) if release else version))
    logger.info("slot %s is the spare of slot %s", board.spare, board.running)


def refused(board: Board) -> set[int]:
    """Returns the releases that did not come up on this board."""
    try:
        return {int(line) for line in board.refused_file.read_text().split()}
    except (OSError, ValueError):
        return set()


def refuse(board: Board, release: int) -> None:
    """Remembers a release that did not come up."""
    board.refused_file.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{number}\n" for number in sorted({*refused(board), release}))
    write_bytes(board.refused_file, lines.encode())


def _own_entry(board: Board) -> Path:
    own = board.entry(board.running)
    if own is None:
        raise CheckpointError(f"expected the boot entry of slot {board.running}, found none")
    return own


def running_version(board: Board) -> int:
    """Returns the version of the running slot."""
    return entry_version(_own_entry(board).read_text())


def entry_version(text: str) -> int:
    """Returns the version in a boot entry, 0 when there is none."""
    found = re.search(r"^version (\d+)$", text, re.M)
    return int(found[1]) if found else 0


def fill(board: Board, content: Content) -> None:
    """Writes the slot that does not run and gives it three tries.

    Raises:
        CheckpointError: It does not fit, is not what it must be, or what was read back differs.
    """
    slot, own = board.spare, _own_entry(board)
    options = re.search(r"^options (.*)$", own.read_text(), re.M)
    kept = [word for word in (options[1].split() if options else []) if not word.startswith(OWN_WORDS)]
    words = [f"fedspine.slot={slot}", f"fedspine.release={content.release}", *kept]
    with board.writable():
        if (old := board.entry(slot)) is not None:
            old.unlink()
            sync_directory(old.parent)
        folder = board.kernel(slot)
        folder.mkdir(exist_ok=True)
        _copy(content.root, board.devices[slot])
        _copy(content.linux, folder / "linux")
        _copy(content.initrd, folder / "initrd")
        text = (
            f"title FedSpine slot {slot}\nsort-key fedspine\nversion {content.version}\nlinux /slot-{slot}/linux\n"
            f"initrd /slot-{slot}/initrd\noptions {' '.join(words)}\n"
        )
        aside = own.with_name(f"slot-{slot}.partial")
        with aside.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(own.with_name(f"slot-{slot}+{TRIES}.conf"))
        sync_directory(own.parent)


def num_bytes_of(root: BinaryIO) -> int:
    """Returns the size of the squashfs that begins here, which a partition is larger than; goes back to its beginning.

    Raises:
        CheckpointError: It is none.
    """
    head = root.read(96)
    root.seek(-len(head), os.SEEK_CUR)
    if head[:4] != SQUASHFS_MAGIC:
        raise CheckpointError(f"expected a squashfs in {root.name}, found another content")
    return int.from_bytes(head[SQUASHFS_BYTES_AT : SQUASHFS_BYTES_AT + 8], "little")


def _copy(source: Source, target: Path) -> None:
    """Copies one part of a slot, syncs it and reads it back."""
    found, left = hashlib.sha256(), source.num_bytes
    flags = os.O_WRONLY | (0 if target.is_block_device() else os.O_CREAT | os.O_TRUNC)
    try:
        with source.read() as read, os.fdopen(os.open(target, flags, 0o600), "wb") as written:
            while left and (block := read.read(min(BLOCK, left))):
                found.update(block)
                written.write(block)
                left -= len(block)
            written.flush()
            os.fsync(written.fileno())
            os.posix_fadvise(written.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error
    if left:
        raise CheckpointError(f"expected {source.num_bytes} bytes for {target}, found {source.num_bytes - left}")
    if source.sha256 not in (None, found.hexdigest()):
        raise CheckpointError(f"expected SHA-256 {source.sha256} for {target}, found {found.hexdigest()}")
    if digest(target, source.num_bytes) != found.hexdigest():
        raise CheckpointError(f"expected what was written in {target}, read something else back")


def digest(path: Path, num_bytes: int) -> str:
    """Returns the SHA-256 of the first bytes of a file or a partition."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while num_bytes and (block := file.read(min(BLOCK, num_bytes))):
            found.update(block)
            num_bytes -= len(block)
    return found.hexdigest()
