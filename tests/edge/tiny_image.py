"""A disk image with the partitions of ours and next to nothing in them."""

from __future__ import annotations

import struct
import uuid
from pathlib import Path

NAMES = ("esp", "root_a", "root_b", "config", "data")
SECTORS = 64


def save_tiny_image(path: Path, names: tuple[str, ...] = NAMES) -> Path:
    """Writes a partition table (its checksums left out) and a squashfs's first bytes in root_a."""
    header = struct.pack("<8s64xQII", b"EFI PART", 2, 128, 128)
    entries = b""
    for index, name in enumerate(names):
        first = 64 + index * SECTORS
        kind = uuid.uuid5(uuid.NAMESPACE_DNS, name).bytes_le
        entries += (
            kind + kind + struct.pack("<QQQ", first, first + SECTORS - 1, 0) + name.encode("utf-16-le").ljust(72, b"\0")
        )
    content = bytearray((64 + len(names) * SECTORS) * 512)
    content[512 : 512 + len(header)] = header
    content[1024 : 1024 + len(entries)] = entries
    if "root_a" in names:
        start = (64 + names.index("root_a") * SECTORS) * 512
        content[start : start + 4] = b"hsqs"
    path.write_bytes(content)
    return path
