"""A newer release, brought to the slot that does not run: asked for, its signature checked, written, started.

Comes in: `[update] url` of `fedspine.toml`, and the image's own key. Goes out: a slot with three tries, and a restart.
A release is known by a number that only grows. Older ones, those of another board or variant, those that another key
signed and those that did not come up before are not taken. The web server need not be trusted, so that plain HTTP will
do: everything is covered by the signature.

Source: RFC 8032 (Ed25519), checked by openssl-pkeyutl(1).
"""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedspine_edge.appliance import slots
from fedspine_edge.errors import CheckpointError, LinkError, VerificationError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

logger = logging.getLogger(__name__)

UPDATE_FILE, SIGNATURE_FILE = "update.json", "update.json.sig"
PARTS = ("root.squashfs", "linux", "initrd")
OWN_FOLDER = Path("/usr/lib/fedspine")
IMAGE_FILE, KEY_FILE = "image.json", "update-key.pem"
TASK_FILE = Path("/var/lib/private/fedspine/task.json")
LARGEST_DOCUMENT = 1 << 16
TIMEOUT_SECONDS, POLL_SECONDS = 60.0, 5.0


@dataclass(frozen=True)
class Release:
    """A release that a signed document describes.

    Attributes:
        board, variant: What it is for.
        number: Grows from release to release.
        parts: Size and SHA-256 of each part.
    """

    board: str
    variant: str
    number: int
    parts: dict[str, tuple[int, str]]


def update(config: Path, board: slots.Board, *, own: Path = OWN_FOLDER, restart: Callable[[], None]) -> bool:
    """Brings the release that is offered to the other slot and starts it; returns whether there was one to take.

    Args:
        config: `fedspine.toml`; without `[update]` nothing is asked for.
        board: The slots.
        own: What the running image says of itself, and its key.
        restart: Starts the board again.

    Raises:
        LinkError: The folder cannot be reached.
        VerificationError: What lies there is not signed by the image's key, or not for this image.
        CheckpointError: It could not be written, or is not what was signed; the spare was filled again.
    """
    url = tomllib.loads(config.read_text()).get("update", {}).get("url")
    if not url:
        return False
    found = offered(str(url), own / KEY_FILE)
    if (reason := _not_taken(found, board, json.loads((own / IMAGE_FILE).read_text()))) is not None:
        logger.info("release %d is not taken: %s", found.number, reason)
        return False
    logger.info("taking release %d", found.number)
    root, linux, initrd = (slots.Source(_opener(str(url), name), *found.parts[name]) for name in PARTS)
    try:
        slots.fill(board, slots.Content(root, linux, initrd, found.number, found.number))
    except (CheckpointError, LinkError):
        slots.keep_spare(board)
        raise
    logger.info("release %d is in slot %s", found.number, board.spare)
    restart()
    return True


def offered(url: str, key: Path) -> Release:
    """Returns the release that a folder on a web server offers.

    Raises:
        LinkError: It cannot be reached.
        VerificationError: It is not signed by the key, or says something else than it must.
    """
    document, signature = (_document(url, name) for name in (UPDATE_FILE, SIGNATURE_FILE))
    check_signature(document, signature, key)
    return parsed(document)


def check_signature(document: bytes, signature: bytes, key: Path) -> None:
    """Raises VerificationError unless the key signed the document."""
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder) / "document", Path(folder) / "signature"
        for path, content in zip(paths, (document, signature), strict=True):
            path.write_bytes(content)
        done = subprocess.run(
            ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", key, "-rawin", "-in", paths[0], "-sigfile", paths[1]],
            capture_output=True, check=False,
        )  # fmt: skip
    if done.returncode != 0:
        raise VerificationError(
            f"expected a signature of this image's key over {UPDATE_FILE}, found another one",
            hint="fedspine image update IMAGE --key KEY, with the key the image was built with",
        )


def parsed(document: bytes) -> Release:
    """Returns a signed document's release; raises VerificationError when something is missing."""
    try:
        said: Any = json.loads(document)
        parts = {name: (int(said["files"][name]["num_bytes"]), str(said["files"][name]["sha256"])) for name in PARTS}
        if not all(num_bytes > 0 and re.fullmatch("[0-9a-f]{64}", sha256) for num_bytes, sha256 in parts.values()):
            raise ValueError("sizes or checksums that cannot be")
        return Release(str(said["board"]), str(said["variant"]), int(said["release"]), parts)
    except (ValueError, KeyError, TypeError) as error:
        raise VerificationError(f"expected a release in {UPDATE_FILE}, found: {error!r}") from error


def check_target(found: Release, image: dict[str, Any]) -> None:
    """Raises VerificationError for a release of another board or variant than this image is."""
    if (found.board, found.variant) != (image["board"], image["variant"]):
        raise VerificationError(
            f"expected a release for {image['board']}, {image['variant']}, found one for {found.board}, {found.variant}"
        )


def _not_taken(found: Release, board: slots.Board, image: dict[str, Any]) -> str | None:
    """Returns why a release is left alone, None when it is to be taken.

    Raises:
        VerificationError: It is for another board or variant.
    """
    check_target(found, image)
    running = slots.running_version(board)
    if found.number <= running:
        return f"{running} runs"
    if found.number in slots.refused(board):
        return "it did not come up before"
    own, other = board.entry(board.running), board.entry(board.spare)
    if own is None or slots.tries_left(own) is not None:
        return "the running slot is not good yet"
    if other is not None and slots.tries_left(other) and slots.entry_version(other.read_text()) == found.number:
        return "it is there and starts next"
    return None


def _document(url: str, name: str) -> bytes:
    with _opener(url, name)() as answer:
        content: bytes = answer.read(LARGEST_DOCUMENT)
    return content


def _opener(url: str, name: str) -> Callable[[], Any]:
    """Returns a function that opens a file of a folder on a web server."""

    @contextmanager
    def opened() -> Iterator[slots.Readable]:
        address = f"{url.rstrip('/')}/{name}"
        if not address.startswith(("http://", "https://")):
            raise LinkError(f"expected http:// or https:// in [update] url, found {url!r}")
        try:
            with urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as answer:
                yield answer
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            raise LinkError(
                f"cannot fetch {address}: {error}", hint="is [update] url of fedspine.toml right?"
            ) from error

    return opened


def restart_when_idle(task: Path = TASK_FILE) -> None:
    """Starts the board again once it has no task in hand."""
    while task.exists():
        time.sleep(POLL_SECONDS)
    subprocess.run(["systemctl", "--no-block", "reboot"], check=True)
