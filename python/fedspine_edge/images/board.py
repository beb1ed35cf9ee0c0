"""What an image is made of: one TOML file a board, every field checked.

Comes in: a name or a file below `device_images/boards`. Goes out: `Board`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fedspine_edge.errors import ImageError, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VARIANTS = ("agent", "full")


@dataclass(frozen=True)
class Board:
    """An image's recipe.

    Attributes:
        name: Of the board.
        source: Where its facts are from.
        verified: What it was run on.
        suites: Debian's suites; their component `main`.
        keyring: Keys that sign the archive.
        packages: Debian packages of the root file system; what they depend on comes with them.
        left_out: Packages that only others' installation scripts need: resolved, not unpacked.
        left_out_paths: Paths in the root that are not kept.
        boot_packages: Packages whose files go into the boot partition and the initial file system.
        initrd_modules: Kernel modules loaded before there is a root.
        module_folders: Folders of kernel modules kept in the root.
        command_line: The kernel's.
        wants: systemd target -> units it starts.
        esp_mib, slot_mib, config_mib, data_mib: Sizes of partitions; a slot's by variant.
    """

    name: str
    source: str
    verified: str
    suites: list[str]
    keyring: str
    packages: list[str]
    left_out: list[str]
    left_out_paths: list[str]
    boot_packages: list[str]
    initrd_modules: list[str]
    module_folders: list[str]
    command_line: str
    wants: dict[str, list[str]]
    esp_mib: int
    slot_mib: dict[str, int]
    config_mib: int
    data_mib: int


def source_tree() -> Path:
    """Returns the checkout that images are built from.

    Raises:
        ImageError: This program was installed without one.
    """
    root = Path(__file__).resolve().parents[3]
    if not (root / "device_images" / "boards").is_dir():
        raise ImageError(
            f"expected the sources of fedspine-edge around {Path(__file__).parent}, found none",
            hint="images are built from a checkout: make demo, then .venv/bin/fedspine image build",
        )
    return root


def boards(root: Path) -> dict[str, Path]:
    """Returns the files of the boards that images are built for."""
    return {path.stem: path for path in sorted((root / "device_images" / "boards").glob("*.toml"))}


def load_board(name: str, root: Path) -> Board:
    """Returns a board's recipe.

    Raises:
        UsageError: No such board, or its file lacks a field or has one too many.
    """
    known = boards(root)
    if name not in known:
        raise UsageError(f"expected a board among {', '.join(known)}, found {name!r}", hint="fedspine image boards")
    table: dict[str, Any] = tomllib.loads(known[name].read_text())
    wanted = {field.name for field in fields(Board)}
    if set(table) != wanted:
        odd = ", ".join(sorted(set(table) ^ wanted))
        raise UsageError(f"expected the fields of a board in {known[name]}, missing or unknown: {odd}")
    return Board(**table)
