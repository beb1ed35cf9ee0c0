"""An update of a built image: its root file system, kernel and initial file system beside a signed document.

Comes in: an image beside its seal, and the key it was built with. Goes out: a folder for any web server, from which
boards take it by themselves (`appliance/updates.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedspine_edge.appliance.slots import num_bytes_of
from fedspine_edge.appliance.updates import PARTS, SIGNATURE_FILE, UPDATE_FILE
from fedspine_edge.atomic import write_bytes
from fedspine_edge.images import disk, manifest
from fedspine_edge.images.host_tools import run
from fedspine_edge.images.verify import verify

BLOCK = 1 << 20


def make(image: Path, out: Path, key: Path, *, release: int | None = None) -> dict[str, Any]:
    """Makes the update of an image; returns what its document says.

    Args:
        image: `NAME.img`, beside its seal.
        out: The folder; an older update in it is replaced, document last.
        key: The private key.
        release: Its number; the time of the image's sources when None.

    Raises:
        VerificationError: The image is not what was sealed.
        ImageError: It is no image, or there is no key.
    """
    said = verify(image, None)
    out.mkdir(parents=True, exist_ok=True)
    _copy_root(image, out / PARTS[0])
    for name in PARTS[1:]:
        drive = f"{image}@@{disk.partition(image, 'esp').start}"
        run(["mcopy", "-o", "-n", "-i", drive, f"::slot-a/{name}", out / name], variables={"MTOOLS_SKIP_CHECK": "1"})
    facts = {name: said[name] for name in ("board", "variant", "version")}
    return sign(out, {**facts, "release": said["source_date_epoch"] if release is None else release}, key)


def sign(folder: Path, facts: Mapping[str, Any], key: Path) -> dict[str, Any]:
    """Writes the signed document of a folder with the parts of a release; returns what it says."""
    files = {
        name: {"num_bytes": (folder / name).stat().st_size, "sha256": manifest.file_sha256(folder / name)}
        for name in PARTS
    }
    document = {**facts, "files": files}
    content = (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()
    write_bytes(folder / SIGNATURE_FILE, manifest.sign(content, key))
    write_bytes(folder / UPDATE_FILE, content)
    return document


def _copy_root(image: Path, target: Path) -> None:
    with image.open("rb") as source, target.open("wb") as file:
        source.seek(disk.partition(image, "root_a").start)
        left = num_bytes_of(source)
        while left and (block := source.read(min(BLOCK, left))):
            file.write(block)
            left -= len(block)
