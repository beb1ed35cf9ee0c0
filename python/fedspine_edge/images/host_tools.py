"""The host's programs that images are made with: found, run, and their trouble told.

Comes in: arguments. Goes out: what they print. Which Debian package has a program stands here and nowhere else.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fedspine_edge.errors import ImageError

PACKAGES = {
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "tar": "tar",
    "depmod": "kmod",
    "mksquashfs": "squashfs-tools",
    "mke2fs": "e2fsprogs",
    "mkfs.vfat": "dosfstools",
    "mcopy": "mtools",
    "mtype": "mtools",
    "mmd": "mtools",
    "mdir": "mtools",
    "sfdisk": "fdisk",
    "zstd": "zstd",
    "lsblk": "util-linux",
    "clang++-19": "clang-19",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "qemu-aarch64": "qemu-user",
}
SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")
TOLD_CHARACTERS = 1200


def environment() -> dict[str, str]:
    """Returns this process's environment with the directories of administrators' programs, which users lack."""
    path = os.environ.get("PATH", "/usr/bin:/bin")
    return {**os.environ, "PATH": os.pathsep.join([path, *SBIN]), "LC_ALL": "C.UTF-8", "TZ": "UTC"}


def require(programs: Iterable[str]) -> None:
    """Raises ImageError that names the packages of missing programs."""
    path = environment()["PATH"]
    missing = sorted({PACKAGES[name] for name in programs if shutil.which(name, path=path) is None})
    if missing:
        raise ImageError(
            f"expected the programs that make images, missing those of: {' '.join(missing)}",
            hint=f"sudo apt-get install --no-install-recommends {' '.join(missing)}",
        )


def run(
    command: Sequence[str | Path],
    *,
    told: bytes | None = None,
    variables: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> bytes:
    """Runs a program and returns its output.

    Args:
        command: Program and arguments.
        told: Its standard input.
        variables: More environment.
        folder: Where it runs.

    Raises:
        ImageError: It is missing or failed; says its last words.
    """
    try:
        done = subprocess.run(
            list(command),
            input=told if told is not None else b"",
            env={**environment(), **(variables or {})},
            cwd=folder,
            capture_output=True,
            check=False,
        )
    except FileNotFoundError as error:
        name = Path(command[0]).name
        raise ImageError(
            f"expected the program {name}, found none", hint=f"apt-get install {PACKAGES.get(name, name)}"
        ) from error
    if done.returncode != 0:
        words = (done.stderr or done.stdout).decode(errors="replace").strip()[-TOLD_CHARACTERS:]
        raise ImageError(f"{Path(command[0]).name} failed with exit code {done.returncode}: {words}")
    return done.stdout
