"""An image written to a disk, and read back; never to one that is in use.

Comes in: an image and a target. Goes out: the plan, then the disk. A block that does not read back as written ends it.

Source: sysfs-block, proc(5) mountinfo and swaps.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedspine_edge.errors import ImageError, UsageError, VerificationError

BLOCK = 4 << 20


@dataclass(frozen=True)
class Plan:
    """What would be written where.

    Attributes:
        image: The image.
        target: A whole disk, or a file.
        num_bytes: Size of the image.
        room_bytes: Size of the target; None for a file that grows.
        model: What the disk says it is.
        removable: Whether it says that it can be taken out.
    """

    image: Path
    target: Path
    num_bytes: int
    room_bytes: int | None
    model: str
    removable: bool

    def text(self) -> str:
        """Returns the plan for people."""
        room = "a file" if self.room_bytes is None else f"{self.room_bytes / 1e9:.1f} GB"
        kind = "removable" if self.removable else "fixed"
        what = room if self.room_bytes is None else f"{room}, {self.model or 'unnamed'}, {kind}"
        size = f"{self.num_bytes / 1e6:.0f} MB"
        return f"write {self.image} ({size})\nto    {self.target} ({what})\nall that is on it is lost"


def plan(image: Path, target: Path, *, root: Path = Path("/")) -> Plan:
    """Returns what would be done.

    Args:
        image: The image, unpacked.
        target: A disk, or a file for trying it out.
        root: Root of sysfs and procfs.

    Raises:
        UsageError: The target is a partition, in use, holds this system, or is too small.
        ImageError: There is no image.
    """
    if not image.is_file() or image.suffix == ".zst":
        raise ImageError(f"expected an image in {image}, found none", hint="zstd -d IMAGE.img.zst")
    size = image.stat().st_size
    if not target.exists() or not stat.S_ISBLK(target.stat().st_mode):
        if target.parent == Path("/dev") or target.is_dir():
            raise UsageError(f"expected a disk or a file, found {target}", hint="lsblk shows the disks")
        return Plan(image, target, size, None, "", removable=True)
    device = target.resolve().name
    folder = root / "sys/class/block" / device
    if (folder / "partition").exists():
        raise UsageError(f"expected a whole disk, found the partition {target}", hint="lsblk shows the disks")
    used = uses(device, root)
    if used:
        raise UsageError(
            f"expected a disk nobody uses, found {target} in use: {', '.join(used)}",
            hint="unmount it, or choose another",
        )
    room = int((folder / "size").read_text()) * 512
    if room < size:
        raise UsageError(
            f"expected {size / 1e6:.0f} MB on {target}, found {room / 1e6:.0f} MB", hint="use a larger one"
        )
    return Plan(image, target, size, room, _line(folder / "device/model"), removable=_line(folder / "removable") == "1")


def uses(device: str, root: Path) -> list[str]:
    """Returns what a disk, or anything on it, is used for: mount points, swap, RAID and encrypted volumes."""
    folder = root / "sys/class/block" / device
    parts = [device, *(path.name for path in sorted(folder.glob(f"{device}*")) if (path / "partition").exists())]
    numbers = {_line(root / "sys/class/block" / part / "dev"): part for part in parts}
    found = []
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        words = line.split(" ")
        if words[2] in numbers:
            found.append(f"{numbers[words[2]]} on {words[4]}")
    for line in (root / "proc/swaps").read_text().splitlines()[1:]:
        if Path(line.split()[0]).name in parts:
            found.append(f"{Path(line.split()[0]).name} as swap")
    for part in parts:
        holders = root / "sys/class/block" / part / "holders"
        found += [f"{part} by {path.name}" for path in sorted(holders.glob("*"))]
    return found


def _line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def write(found: Plan, *, tell: Callable[[int], None]) -> str:
    """Writes an image, syncs, reads it back from the disk and returns its SHA-256.

    Args:
        found: The plan.
        tell: Is told the bytes written or read so far, of twice the image's size.

    Raises:
        VerificationError: Something else reads back: the disk is bad.
        ImageError: It cannot be written.
    """
    flags = os.O_RDWR | (os.O_CREAT if found.room_bytes is None else os.O_EXCL)
    try:
        descriptor = os.open(found.target, flags, 0o644)
    except OSError as error:
        raise ImageError(
            f"cannot open {found.target}: {error.strerror}", hint="use sudo; nobody else may use it"
        ) from error
    try:
        hashes = _write_blocks(found, descriptor, tell)
        # What is read must come from the disk, not from what the kernel still remembers of it.
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        whole, done = hashlib.sha256(), 0
        for expected in hashes:
            block = os.pread(descriptor, min(BLOCK, found.num_bytes - done), done)
            if hashlib.sha256(block).digest() != expected:
                raise VerificationError(
                    f"expected what was written at byte {done} of {found.target}, read something else back",
                    hint="this disk is bad or smaller than it says; use another",
                )
            whole.update(block)
            done += len(block)
            tell(found.num_bytes + done)
    except OSError as error:
        raise ImageError(
            f"cannot write {found.target}: {error.strerror}", hint="this disk is bad; use another"
        ) from error
    finally:
        os.close(descriptor)
    return whole.hexdigest()


def _write_blocks(found: Plan, descriptor: int, tell: Callable[[int], None]) -> list[bytes]:
    hashes, done = [], 0
    with found.image.open("rb") as file:
        while block := file.read(BLOCK):
            hashes.append(hashlib.sha256(block).digest())
            view = memoryview(block)
            while view:
                count = os.pwrite(descriptor, view, done)
                view, done = view[count:], done + count
            tell(done)
    return hashes
