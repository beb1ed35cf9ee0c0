"""Is this the image that was built: its seal, its partitions, its root file system.

Comes in: an image beside its SHA256SUMS, and the key one trusts. Goes out: what was checked, or VerificationError.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedspine_edge.errors import ImageError, VerificationError
from fedspine_edge.images import disk, manifest

WANTED = ("esp", "root_a", "root_b", "config", "data")
SQUASHFS_MAGIC = b"hsqs"


def verify(image: Path, public_key: Path | None) -> dict[str, Any]:
    """Checks an image and returns its manifest with what was found.

    An image that was provisioned differs from the sealed one in its config partition, and only there: it is compared
    with the compressed one, partition by partition, where that lies beside it.

    Args:
        image: `NAME.img` or `NAME.img.zst`.
        public_key: The key one trusts; the one beside the image when None, which proves that nothing is damaged but not
            who made it.

    Raises:
        VerificationError: A file is damaged, missing or of somebody else.
        ImageError: It is no image.
    """
    folder = image.parent
    covered = manifest.check_seal(folder, public_key or folder / manifest.PUBLIC_KEY)
    try:
        said = json.loads((folder / "manifest.json").read_text())
        expected = said["image"]["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise VerificationError(f"expected a manifest beside {image}, found: {error}", hint="fetch it anew") from error
    found: dict[str, Any] = {"sealed": covered, "trusted_key": public_key is not None, "provisioned": None}
    if image.suffix == ".zst":
        if image.name not in covered:
            raise VerificationError(f"expected {image.name} among the sealed files, found {', '.join(covered)}")
    else:
        _check_partitions(image)
        found["provisioned"] = manifest.file_sha256(image) != expected
        if found["provisioned"]:
            _check_rest(image, said)
    return {**said, "found": found}


def _check_partitions(image: Path) -> None:
    names = tuple(partition.name for partition in disk.partitions(image))
    if names != WANTED:
        raise ImageError(f"expected the partitions {', '.join(WANTED)}, found {', '.join(names)}")
    with image.open("rb") as file:
        file.seek(disk.partition(image, "root_a").start)
        if file.read(4) != SQUASHFS_MAGIC:
            raise VerificationError(
                f"expected a root file system in root_a of {image}, found none", hint="build it anew"
            )


def _check_rest(image: Path, said: dict[str, Any]) -> None:
    """Compares every partition but the config one with the hashes in the manifest."""
    for partition in disk.partitions(image):
        expected = said["partitions"].get(partition.name)
        if partition.name != "config" and disk.partition_sha256(image, partition) != expected:
            raise VerificationError(
                f"expected partition {partition.name} of {image} as it was built, found another content",
                hint="unpack the compressed image again, or it has been started from",
            )
