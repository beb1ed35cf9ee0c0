"""A newer runtime on a Jetson, where NVIDIA's slots stay as they are: checked and unpacked by the one that runs.

Comes in: the folder of `fedspine image update`, copied onto the board. Goes out: a directory, and its release's number;
`device_images/l4t/fedspine-runtime` puts it in place.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from fedspine_edge.appliance import slots, updates
from fedspine_edge.errors import CheckpointError, UsageError, VerificationError

TREE = "root"
BOUND = ("var/lib/fedspine", "etc/fedspine")
"""Directories that the agent's unit binds the board's own to."""


def unpack(folder: Path, *, own: Path = updates.OWN_FOLDER) -> int:
    """Unpacks the root file system of a release into `TREE` beside it; returns the release's number.

    Args:
        folder: Holds the signed document, its signature and the root file system.
        own: What the running runtime says of itself, and its key.

    Raises:
        UsageError: There is no such folder.
        VerificationError: It is not signed by this runtime's key, not for it, or not newer.
        CheckpointError: The root file system is not what was signed, or cannot be unpacked.
    """
    root, tree = folder / updates.PARTS[0], folder / TREE
    try:
        document, signature = ((folder / name).read_bytes() for name in (updates.UPDATE_FILE, updates.SIGNATURE_FILE))
        num_bytes = root.stat().st_size
    except OSError as error:
        raise UsageError(
            f"expected a release in {folder}, found: {error}", hint="fedspine image update IMAGE --out FOLDER"
        ) from error
    updates.check_signature(document, signature, own / updates.KEY_FILE)
    found, image = updates.parsed(document), json.loads((own / updates.IMAGE_FILE).read_text())
    updates.check_target(found, image)
    if found.number <= image.get("release", 0):
        raise VerificationError(
            f"expected a release after {image['release']}, found {found.number}", hint="fedspine-runtime back"
        )
    if (num_bytes, slots.digest(root, num_bytes)) != found.parts[updates.PARTS[0]]:
        raise CheckpointError(f"expected {root} as it was signed, found another content", hint="copy it again")
    done = subprocess.run(
        ["unsquashfs", "-quiet", "-no-progress", "-dest", tree, root], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise CheckpointError(f"cannot unpack {root}: {done.stderr[-300:].strip()}", hint="is the disk full?")
    for name in BOUND:
        (tree / name).mkdir(parents=True, exist_ok=True)
    said = tree / "usr/lib/fedspine" / updates.IMAGE_FILE
    said.write_text(json.dumps({**json.loads(said.read_text()), "release": found.number}, sort_keys=True) + "\n")
    os.sync()
    return found.number
