"""A Jetson flashed by NVIDIA's own tools, with our runtime laid over its root file system.

Comes in: the user's BSP and sample root file system as NVIDIA packs them, a board's name. Goes out: commands, each of
which is printed before anything runs. Nothing of NVIDIA's is in this repository, and nobody's licence is accepted here.

Source: device_images/l4t, whose files say where each fact is from and what it was seen on.
"""

from __future__ import annotations

import re
import secrets
import shlex
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedspine_edge.errors import IncompatibleError, UsageError
from fedspine_edge.images import disk

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TOP = "Linux_for_Tegra"
RELEASE_FILE = f"{TOP}/nv_tegra/bsp_version"
ROOTFS_NEEDS = ("etc/passwd", "usr/bin")
UNIT, TOOL = "fedspine-agent.service", "fedspine-runtime"
PREREQUISITES = "tools/l4t_flash_prerequisites.sh"
USER_NAME = re.compile(r"[a-z_][a-z0-9_-]{0,31}")


@dataclass(frozen=True)
class Wish:
    """What the user wants.

    Attributes:
        board: A file in device_images/l4t.
        bsp, rootfs: NVIDIA's tarballs.
        image: A generic image, whose root file system becomes the runtime.
        work: Directory that the tarballs are unpacked in.
        config: `fedspine.toml` of the device.
        user, host: The first user and the board's name.
        accept_license: Whether the user accepts NVIDIA's licence.
        massflash: Boards at once; 0 for one.
    """

    board: str
    bsp: Path
    rootfs: Path
    image: Path
    work: Path
    config: Path | None = None
    user: str = "fedspine"
    host: str = "fedspine"
    accept_license: bool = False
    massflash: int = 0


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        command: Program and arguments.
        folder: Where it runs.
        why: What it is for.
        told: What its standard input is: a secret's place; `password` or empty.
    """

    command: tuple[str, ...]
    folder: Path
    why: str
    told: str = ""

    def text(self) -> str:
        """Returns the line one could type."""
        line = f"cd {shlex.quote(str(self.folder))} && sudo {shlex.join(self.command)}"
        return f"{line} < {self.told.upper()}" if self.told else line


def boards(root: Path) -> dict[str, dict[str, Any]]:
    """Returns what is known of each Jetson."""
    files = sorted((root / "device_images" / "l4t").glob("*.toml"))
    return {path.stem: tomllib.loads(path.read_text()) for path in files}


def names_in(tarball: Path) -> tuple[set[str], str]:
    """Returns the names in a tarball, without a leading `./`, and the text of its release file.

    Raises:
        IncompatibleError: It is no tarball, or cut off.
    """
    names, release = set[str](), ""
    try:
        with tarfile.open(tarball, "r:*") as archive:
            for member in archive:
                name = member.name.removeprefix("./").rstrip("/")
                names.add(name)
                if name == RELEASE_FILE and (file := archive.extractfile(member)) is not None:
                    release = file.read(1 << 16).decode(errors="replace")
    except (OSError, EOFError, tarfile.TarError) as error:
        raise IncompatibleError(
            f"expected a whole tarball in {tarball}, found: {error}", hint="fetch it from NVIDIA again"
        ) from error
    return names, release


def release_of(text: str) -> tuple[int, int, int]:
    """Returns L4T's release from `nv_tegra/bsp_version`.

    Raises:
        IncompatibleError: It says none.
    """
    found = dict(re.findall(r"^\s*(BSP_BRANCH|BSP_MAJOR|BSP_MINOR)=\"?(\d+)", text, re.M))
    if set(found) != {"BSP_BRANCH", "BSP_MAJOR", "BSP_MINOR"}:
        raise IncompatibleError(
            f"expected a release in {RELEASE_FILE}, found {text.strip()[:60]!r}",
            hint="is it Jetson_Linux_R...?",
        )
    return int(found["BSP_BRANCH"]), int(found["BSP_MAJOR"]), int(found["BSP_MINOR"])


def plan(wish: Wish, root: Path) -> list[Step]:
    """Returns every step, after all that can be known beforehand was checked.

    Args:
        wish: What the user wants.
        root: The checkout.

    Raises:
        UsageError: No such board, or a name that cannot be.
        IncompatibleError: The release is not for this board, or a tarball lacks a file or is cut off.
    """
    known = boards(root)
    if wish.board not in known:
        raise UsageError(f"expected a board among {', '.join(known)}, found {wish.board!r}")
    for name in (wish.user, wish.host):
        if not USER_NAME.fullmatch(name):
            raise UsageError(f"expected a name of small letters and digits, found {name!r}")
    names, text = names_in(wish.bsp)
    release = _release(known[wish.board], wish.board, release_of(text))
    _need({f"{TOP}/{name}" for name in release["needs"]}, names, wish.bsp)
    _need(set(ROOTFS_NEEDS), names_in(wish.rootfs)[0], wish.rootfs)
    tools = wish.work / TOP
    return [*_unpack(wish, names), *_user(wish, tools), *_overlay(wish, root), *_flash(wish, release, tools)]


def _release(board: dict[str, Any], name: str, found: tuple[int, int, int]) -> dict[str, Any]:
    for release in board["release"]:
        first = tuple(int(part) for part in release["first"].split("."))
        if release["branch"] == found[0] and found[: len(first)] >= first:
            return dict(release)
    wanted = ", ".join(f"L4T {release['branch']} from {release['first']}" for release in board["release"])
    raise IncompatibleError(
        f"expected {wanted} for {board['title']}, found L4T {'.'.join(map(str, found))}",
        hint=f"fetch the BSP that NVIDIA names for this board, or check --board {name}",
    )


def _need(wanted: set[str], names: set[str], tarball: Path) -> None:
    folders = {str(parent) for name in names for parent in Path(name).parents}
    missing = sorted(wanted - names - folders)
    if missing:
        raise IncompatibleError(
            f"expected {', '.join(missing)} in {tarball}, found none of that name",
            hint="another release or another tarball than this board needs",
        )


def _unpack(wish: Wish, names: set[str]) -> list[Step]:
    tools = wish.work / TOP
    bsp, rootfs = str(wish.bsp.resolve()), str(wish.rootfs.resolve())
    steps = [
        Step(("mkdir", "-p", str(wish.work)), Path("/"), "a place to work in"),
        Step(("tar", "xpf", bsp, "-C", str(wish.work)), wish.work, "NVIDIA's tools"),
        Step(("tar", "xpf", rootfs, "-C", str(tools / "rootfs")), wish.work, "NVIDIA's root file system"),
    ]
    if f"{TOP}/{PREREQUISITES}" in names:
        steps.append(Step((f"./{PREREQUISITES}",), tools, "what NVIDIA's tools need of this machine"))
    return [*steps, Step(("./apply_binaries.sh",), tools, "NVIDIA's drivers into the root file system")]


def _user(wish: Wish, tools: Path) -> list[Step]:
    """The script takes a password on its command line only: it gets one that is worth nothing, replaced at once."""
    worthless = secrets.token_urlsafe(18)
    accept = ("--accept-license",) if wish.accept_license else ()
    create = ("./tools/l4t_create_default_user.sh", "-u", wish.user, "-p", worthless, "-n", wish.host, *accept)
    rootfs = str(tools / "rootfs")
    return [
        Step(create, tools, "the first user, with a password that the next step replaces"),
        Step(("chpasswd", "--encrypted", "--root", rootfs), tools, "the user's own password", told="password"),
    ]


def _overlay(wish: Wish, root: Path) -> list[Step]:
    rootfs = wish.work / TOP / "rootfs"
    offset = disk.partition(wish.image, "root_a").start
    runtime, units = rootfs / "opt/fedspine/runtime", rootfs / "etc/systemd/system"
    unit, image = root / "device_images" / "l4t" / UNIT, str(wish.image.resolve())
    tool = root / "device_images" / "l4t" / TOOL
    steps = [
        (("mkdir", "-p", str(runtime.parent), str(rootfs / "var/lib/fedspine")), "places for runtime and state"),
        (("unsquashfs", "-quiet", "-offset", str(offset), "-dest", str(runtime), image), "the runtime"),
        (("mkdir", "-p", str(runtime / "var/lib/fedspine"), str(runtime / "etc/fedspine")), "where they are bound to"),
        (("install", "-D", "-m", "0644", str(unit), str(units / UNIT)), "the agent's unit"),
        (("install", "-D", "-m", "0755", str(tool), str(rootfs / "usr/local/sbin" / TOOL)), "the runtime's updates"),
        (("mkdir", "-p", str(units / "multi-user.target.wants")), "it starts"),
        (("ln", "-sf", f"../{UNIT}", str(units / "multi-user.target.wants" / UNIT)), "with the system"),
    ]
    if wish.config is not None:
        target = str(rootfs / "etc/fedspine/fedspine.toml")
        steps.append((("install", "-D", "-m", "0600", str(wish.config.resolve()), target), "its fleet"))
    return [Step(command, wish.work, why) for command, why in steps]


def _flash(wish: Wish, release: dict[str, Any], tools: Path) -> list[Step]:
    doubt = f" (not confirmed: {release['unconfirmed']})" if release["unconfirmed"] else ""
    if not wish.massflash:
        return [Step(tuple(release["command"]), tools, f"the board, in recovery mode{doubt}")]
    if not release["mass"]:
        raise UsageError(
            f"expected a board that l4t_initrd_flash.sh writes many of, found {wish.board}, L4T {release['branch']}",
            hint="without --massflash, once a board",
        )
    steps = []
    for phase, why in (("--no-flash", "packages for all boards"), ("--flash-only", "all boards, in recovery mode")):
        words = (word.format(phase=phase, count=wish.massflash) for word in release["mass"])
        steps.append(Step(tuple(words), tools, f"{why}{doubt}"))
    return steps
