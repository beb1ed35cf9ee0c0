"""`fedspine image`: device images built, checked, provisioned and written.

Comes in: a board, an image, a disk. Goes out: files, and lines that say what was done.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedspine_edge.errors import ImageError
from fedspine_edge.images import build as builder
from fedspine_edge.images import l4t, update
from fedspine_edge.images.board import source_tree

MIB = 1 << 20


def cache_folder() -> Path:
    """Returns where packages and wheels are kept between builds."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "fedspine-edge" / "images"


def default_key() -> Path:
    """Returns the private key that signs images and updates unless another one is named."""
    return cache_folder() / "signing-key.private.pem"


def make_update(image: Path, out: Path, *, key: Path | None, release: int | None) -> dict[str, Any]:
    """Makes a signed update of an image; returns what it says."""
    return update.make(image, out, key or default_key(), release=release)


def build(
    board: str, variant: str, *, out: Path | None, key: Path | None, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Builds an image; returns its manifest."""
    cache = cache_folder()
    order = builder.Order(
        board,
        variant,
        out or Path("dist") / "images" / f"{board}-{variant}",
        cache,
        key or default_key(),
        builder.source_epoch(source_tree()),
    )
    return {**builder.build(order, tell=tell), "folder": str(order.out)}


def build_text(found: dict[str, Any]) -> str:
    """Returns a build's result for people."""
    sizes = found["sizes"]
    return (
        f"image        {found['folder']}/{found['compressed']['file']}"
        f" ({found['compressed']['num_bytes'] / 1e6:.0f} MB, {found['image']['num_bytes'] / 1e6:.0f} MB unpacked)\n"
        f"root         {sizes['root.squashfs'] / 1e6:.0f} MB, kernel {sizes['linux'] / 1e6:.0f} MB,"
        f" initial file system {sizes['initrd'] / 1e6:.1f} MB\n"
        f"SHA-256      {found['image']['sha256']}\n"
        f"verified on  {found['verified']}\n\n"
        f"then         fedspine image provision {found['folder']}/{found['image']['file']} --server URL --token TOKEN"
    )


def flash_jetson(wish: l4t.Wish, *, execute: bool, password_hash: str, tell: Callable[[str], None]) -> list[l4t.Step]:
    """Prints the commands that flash a Jetson, or runs them one after another.

    Args:
        wish: What the user wants.
        execute: Whether to run them.
        password_hash: The first user's, as `mkpasswd` makes it; `!` for a user without a password.
        tell: Is told each command before it runs.

    Raises:
        ImageError: One failed; those after it were not run.
    """
    steps = l4t.plan(wish, source_tree())
    for number, step in enumerate(steps, 1):
        tell(f"# {number}/{len(steps)} {step.why}\n{step.text()}")
        if not execute:
            continue
        told = f"{wish.user}:{password_hash}\n".encode() if step.told else None
        try:
            done = subprocess.run(step.command, cwd=step.folder, input=told, check=False)
        except OSError as error:
            raise ImageError(
                f"cannot run step {number}, {step.command[0]}: {error.strerror}", hint="as root?"
            ) from error
        if done.returncode != 0:
            raise ImageError(
                f"step {number} of {len(steps)}, {step.command[0]}, failed with exit code {done.returncode}",
                hint="nothing after it was run; see what it said above",
            )
    return steps
