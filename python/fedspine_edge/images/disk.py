"""A disk image out of files: partitions, file systems and boot entries, without mounts, loop devices or privileges.

Comes in: a root file system, a kernel and an initial file system. Goes out: one image, the same bytes every time.

| partition | what |
|---|---|
| `esp` | systemd-boot, `slot-a/` and later `slot-b/` with kernel and initial file system, boot entries with counters |
| `root_a`, `root_b` | a squashfs each |
| `config` | FAT: `fedspine.toml`, which any laptop can edit |
| `data` | ext4: the device's identity and state; grows to the end of the disk on first boot |

Source: UAPI boot loader specification, discoverable partitions specification; mke2fs(8), mksquashfs(1), sfdisk(8).
"""

from __future__ import annotations

import hashlib
import shutil
import struct
import uuid
from dataclasses import dataclass
from pathlib import Path

from fedspine_edge.errors import ImageError
from fedspine_edge.images.host_tools import run

MIB, SECTOR = 1 << 20, 512
NAMESPACE = uuid.UUID("5c1e1e5e-fed5-4b1e-9d6e-0c5b1a6e57a1")
ESP_TYPE = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
ROOT_TYPE = "B921B045-1DF0-41C3-AF44-4C6F280D3FAE"
BASIC_TYPE = "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7"
DATA_TYPE = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
TRIES = 3


@dataclass(frozen=True)
class Layout:
    """Sizes of partitions, in MiB."""

    esp: int
    slot: int
    config: int
    data: int

    def partitions(self) -> list[tuple[str, str, int]]:
        """Returns name, type and size of each partition, in their order on the disk."""
        return [
            ("esp", ESP_TYPE, self.esp),
            ("root_a", ROOT_TYPE, self.slot),
            ("root_b", ROOT_TYPE, self.slot),
            ("config", BASIC_TYPE, self.config),
            ("data", DATA_TYPE, self.data),
        ]


@dataclass(frozen=True)
class Partition:
    """Where a partition of an image lies, in bytes."""

    name: str
    start: int
    num_bytes: int


def boot_entry(slot: str, version: int, command_line: str) -> str:
    """Returns the boot entry of a slot; of two good ones the higher version is started."""
    return (
        f"title FedSpine slot {slot}\nsort-key fedspine\nversion {version}\n"
        f"linux /slot-{slot}/linux\ninitrd /slot-{slot}/initrd\n"
        f"options fedspine.slot={slot} fedspine.release={version} {command_line}\n"
    )


def squashfs(tree: Path, target: Path, *, epoch: int) -> None:
    """Packs a tree, every file root's."""
    target.unlink(missing_ok=True)
    run(
        ["mksquashfs", tree, target, "-all-root", "-comp", "zstd", "-Xcompression-level", "15", "-b", "256K",
         "-no-xattrs", "-no-exports", "-processors", "2", "-quiet", "-no-progress"],
        variables={"SOURCE_DATE_EPOCH": str(epoch)},
    )  # fmt: skip


def fat(target: Path, files: dict[str, Path], *, size_mib: int, label: str, epoch: int) -> None:
    """Makes a FAT file system with files, their folders made on the way; times are the epoch's."""
    variables = {"SOURCE_DATE_EPOCH": str(epoch), "MTOOLS_SKIP_CHECK": "1"}
    target.unlink(missing_ok=True)
    with target.open("wb") as file:
        file.truncate(size_mib * MIB)
    serial = uuid.uuid5(NAMESPACE, label).hex[:8]
    kind = "32" if size_mib >= 64 else "16"
    run(["mkfs.vfat", "--invariant", "-F", kind, "-i", serial, "-n", label, target], variables=variables)
    made: set[str] = set()
    for name in sorted(files):
        for parent in reversed(Path(name).parents[:-1]):
            if str(parent) not in made:
                run(["mmd", "-i", target, f"::{parent}"], variables=variables)
                made.add(str(parent))
        run(["mcopy", "-m", "-i", target, files[name], f"::{name}"], variables=variables)


def ext4(target: Path, *, size_mib: int, label: str, epoch: int, folder: Path) -> None:
    """Makes an empty ext4 file system whose root only root may enter."""
    empty = folder / "empty"
    shutil.rmtree(empty, ignore_errors=True)
    empty.mkdir(mode=0o700)
    target.unlink(missing_ok=True)
    seed = uuid.uuid5(NAMESPACE, label)
    options = f"hash_seed={seed},root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0"
    run(
        ["mke2fs", "-q", "-t", "ext4", "-L", label, "-U", str(seed), "-E", options, "-d", empty, target,
         f"{size_mib}M"],
        variables={"E2FSPROGS_FAKE_TIME": str(epoch), "SOURCE_DATE_EPOCH": str(epoch)},
    )  # fmt: skip


def assemble(target: Path, layout: Layout, contents: dict[str, Path]) -> None:
    """Writes the partition table and the partitions' contents into one sparse file.

    Raises:
        ImageError: A content is larger than its partition.
    """
    target.unlink(missing_ok=True)
    lines, start = ["label: gpt", f"label-id: {uuid.uuid5(NAMESPACE, 'disk')}", "first-lba: 2048"], 1
    for name, kind, size in layout.partitions():
        identity = uuid.uuid5(NAMESPACE, name)
        lines.append(f'start={start}MiB, size={size}MiB, type={kind}, uuid={identity}, name="{name}"')
        start += size
    with target.open("wb") as file:
        file.truncate((start + 1) * MIB)
    run(["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", target], told="\n".join(lines).encode())
    for partition in partitions(target):
        content = contents.get(partition.name)
        if content is None:
            continue
        size, room = content.stat().st_size, partition.num_bytes
        if size > room:
            raise ImageError(
                f"expected at most {room / MIB:.0f} MiB for {partition.name}, found {size / MIB:.1f} MiB",
                hint="make the partition larger in the board's file",
            )
        write_at(target, partition.start, content)


def write_at(target: Path, offset: int, content: Path) -> None:
    """Copies a file into another at an offset; blocks of zeros stay holes."""
    with content.open("rb") as source, target.open("r+b") as file:
        while block := source.read(MIB):
            if block.count(0) != len(block):
                file.seek(offset)
                file.write(block)
            offset += len(block)


def partitions(image: Path) -> list[Partition]:
    """Returns the partitions of an image.

    Raises:
        ImageError: It has no partition table.
    """
    try:
        with image.open("rb") as file:
            file.seek(SECTOR)
            header = file.read(SECTOR)
            signature, table, count, size = struct.unpack_from("<8s64xQII", header)
            if signature != b"EFI PART" or not 128 <= size <= SECTOR or count > 128:
                raise ValueError("no partition table")
            file.seek(table * SECTOR)
            entries = [file.read(size) for _ in range(count)]
    except (OSError, ValueError, struct.error) as error:
        raise ImageError(
            f"expected a disk image in {image}, found: {error}", hint="unpack it first: zstd -d IMAGE.img.zst"
        ) from error
    found = []
    for entry in entries:
        first, last = struct.unpack_from("<QQ", entry, 32)
        if any(entry[:16]):
            name = entry[56:128].decode("utf-16-le", errors="replace").rstrip("\0")
            found.append(Partition(name, first * SECTOR, (last - first + 1) * SECTOR))
    return found


def partition_sha256(image: Path, found: Partition) -> str:
    """Returns the hash of a partition's content."""
    digest, left = hashlib.sha256(), found.num_bytes
    with image.open("rb") as file:
        file.seek(found.start)
        while left and (block := file.read(min(MIB, left))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def partition(image: Path, name: str) -> Partition:
    """Returns one partition of an image; raises ImageError when it has none of that name."""
    for found in partitions(image):
        if found.name == name:
            return found
    raise ImageError(f"expected a partition {name} in {image}, found none", hint="is it an image of fedspine?")
