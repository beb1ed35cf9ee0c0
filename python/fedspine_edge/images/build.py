"""An image from sources to a sealed folder; what was made before and has not changed is taken from the cache.

Comes in: a board and a variant. Goes out: a folder with the image (plain and compressed), manifest, bill of materials,
checksums and their signature. The same sources and packages give the same bytes.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedspine_edge.errors import ImageError
from fedspine_edge.images import disk, manifest, root_tree, wheels
from fedspine_edge.images.board import VARIANTS, Board, load_board, source_tree
from fedspine_edge.images.debian import Archive, Deb, sources_of, unpack
from fedspine_edge.images.host_tools import require, run

TOOLS = (
    "apt-get", "dpkg-deb", "tar", "depmod", "mksquashfs", "mke2fs", "mkfs.vfat", "mcopy", "sfdisk", "zstd",
    "clang++-19", "aarch64-linux-gnu-g++",
)  # fmt: skip
LOADER = "usr/lib/systemd/boot/efi/systemd-bootaa64.efi"
LOADER_SETTINGS = "timeout 0\nconsole-mode keep\neditor no\n"


@dataclass(frozen=True)
class Order:
    """What is to be built.

    Attributes:
        board: Name of the board.
        variant: `agent` or `full`.
        out: Folder of the finished files.
        cache: Where packages and wheels are kept between builds.
        key: The private key that signs; made where there is none.
        epoch: Seconds since 1970 that every time in the image is.
    """

    board: str
    variant: str
    out: Path
    cache: Path
    key: Path
    epoch: int

    @property
    def name(self) -> str:
        """What the files are called."""
        return f"fedspine-{self.board}-{self.variant}"


def source_epoch(source: Path) -> int:
    """Returns SOURCE_DATE_EPOCH, or the time of the checkout's last commit."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given is not None:
        return int(given)
    return int(run(["git", "-C", source, "log", "-1", "--format=%ct"]).decode())


def build(order: Order, *, tell: Callable[[str], None]) -> dict[str, Any]:
    """Builds an image and returns its manifest.

    Args:
        order: What.
        tell: Is told what is being done.

    Raises:
        ImageError: A program or package is missing, or something does not fit.
    """
    if order.variant not in VARIANTS:
        raise ImageError(f"expected a variant among {', '.join(VARIANTS)}, found {order.variant!r}")
    require(TOOLS)
    os.umask(0o022)  # modes in the image must not depend on who builds it
    source = source_tree()
    board = load_board(order.board, source)
    for folder in (order.cache, order.out):
        folder.mkdir(parents=True, exist_ok=True)
    tell("resolving and fetching Debian's packages")
    archive = Archive(order.cache / "apt", sources_of(board.suites), board.keyring)
    archive.update()
    debs = archive.fetch(board.packages)
    with_boot = archive.fetch([*board.packages, *board.boot_packages])
    boot_debs = [deb for deb in with_boot if deb not in debs or deb.name in board.boot_packages]
    tell("Python packages for AArch64; compiling llama.cpp takes minutes, once")
    packages, own = _python(order, source, archive)
    with tempfile.TemporaryDirectory(dir=order.cache, prefix="build-") as work:
        return _image(order, board, Parts(source, debs, boot_debs, packages, own), Path(work), tell=tell)


@dataclass(frozen=True)
class Parts:
    """What an image is put together from."""

    source: Path
    debs: list[Deb]
    boot_debs: list[Deb]
    packages: Path
    own: list[Path]

    def all_debs(self) -> list[Deb]:
        """Returns every Debian package of the image, once."""
        return sorted({*self.debs, *self.boot_debs}, key=lambda deb: deb.name)


def _python(order: Order, source: Path, archive: Archive) -> tuple[Path, list[Path]]:
    include = wheels.headers(archive, order.cache)
    own = wheels.own_wheel(source, include, order.cache, epoch=order.epoch)
    llama = wheels.llama_wheel(source, order.cache, epoch=order.epoch)
    return wheels.locked_packages(source / "requirements" / f"image-{order.variant}.txt", order.cache), [own, llama]


def _image(order: Order, board: Board, parts: Parts, work: Path, *, tell: Callable[[str], None]) -> dict[str, Any]:
    tell("the root file system")
    root, boot = work / "root", work / "boot"
    root_tree.base_tree(root, board, parts.debs, parts.source)
    boot.mkdir()
    unpack([deb.path for deb in parts.boot_debs], boot)
    script = (parts.source / "device_images" / "init.sh").read_bytes()
    kernel, initrd = root_tree.add_kernel(root, boot, board, script)
    site = root_tree.add_python(root, parts.packages, parts.own)
    facts: dict[str, str | int] = {"board": board.name, "variant": order.variant, "release": order.epoch}
    root_tree.add_facts(root, facts, manifest.public_key(order.key))
    root_tree.compile_python(root)
    bill = manifest.bill_of_materials(order.name, _version(), parts.all_debs(), site)
    root_tree.set_times(root, order.epoch)
    tell("packing it")
    disk.squashfs(root, work / "root.squashfs", epoch=order.epoch)
    shutil.rmtree(root)
    tell("the disk image")
    _write(work / "linux", kernel)
    _write(work / "initrd", initrd)
    image = order.out / f"{order.name}.img"
    _disk(order, board, work, loader=boot / LOADER, image=image)
    tell("compressing it")
    run(["zstd", "-q", "-f", "-15", "-T2", image, "-o", f"{image}.zst"])
    return _sealed(
        order,
        board,
        parts,
        image,
        bill,
        sizes={name: (work / name).stat().st_size for name in ("root.squashfs", "linux", "initrd")},
    )


def _disk(order: Order, board: Board, work: Path, *, loader: Path, image: Path) -> None:
    _write(work / "loader.conf", LOADER_SETTINGS.encode())
    _write(work / "entry.conf", disk.boot_entry("a", order.epoch, board.command_line).encode())
    files = {
        "EFI/BOOT/BOOTAA64.EFI": loader,
        "EFI/systemd/systemd-bootaa64.efi": loader,
        "loader/loader.conf": work / "loader.conf",
        f"loader/entries/slot-a+{disk.TRIES}.conf": work / "entry.conf",
        "slot-a/linux": work / "linux",
        "slot-a/initrd": work / "initrd",
    }
    for path in files.values():
        os.utime(path, (order.epoch, order.epoch))
    disk.fat(work / "esp", files, size_mib=board.esp_mib, label="ESP", epoch=order.epoch)
    disk.fat(work / "config", {}, size_mib=board.config_mib, label="CONFIG", epoch=order.epoch)
    disk.ext4(work / "data", size_mib=board.data_mib, label="data", epoch=order.epoch, folder=work)
    layout = disk.Layout(board.esp_mib, board.slot_mib[order.variant], board.config_mib, board.data_mib)
    contents = {name: work / name for name in ("esp", "config", "data")} | {"root_a": work / "root.squashfs"}
    disk.assemble(image, layout, contents)


def _sealed(
    order: Order, board: Board, parts: Parts, image: Path, bill: dict[str, Any], *, sizes: dict[str, int]
) -> dict[str, Any]:
    packed = Path(f"{image}.zst")
    document = {
        "name": order.name,
        "board": board.name,
        "variant": order.variant,
        "version": _version(),
        "source_date_epoch": order.epoch,
        "verified": board.verified,
        "image": {"file": image.name, "num_bytes": image.stat().st_size, "sha256": manifest.file_sha256(image)},
        "compressed": {"file": packed.name, "num_bytes": packed.stat().st_size},
        "partitions": {part.name: disk.partition_sha256(image, part) for part in disk.partitions(image)},
        "sizes": sizes,
        "debian": {deb.name: deb.version for deb in parts.all_debs()},
        "wheels": [path.name for path in parts.own],
    }
    manifest.write_json(order.out / "manifest.json", document)
    manifest.write_json(order.out / "sbom.cdx.json", bill)
    manifest.seal(order.out, [packed.name, "manifest.json", "sbom.cdx.json"], order.key)
    return document


def _version() -> str:
    return importlib.metadata.version("fedspine-edge")


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
