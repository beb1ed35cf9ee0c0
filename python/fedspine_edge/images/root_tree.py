"""The root file system of a device as a directory, put together from packages, wheels and the overlay.

Comes in: Debian packages, Python packages, `device_images/overlay`. Goes out: a directory; nothing in it was ever run.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedspine_edge.appliance.updates import IMAGE_FILE, KEY_FILE
from fedspine_edge.images.board import Board
from fedspine_edge.images.debian import Deb, prune, unpack
from fedspine_edge.images.host_tools import run
from fedspine_edge.images.initrd import initrd, module_order

RUNTIME = Path("opt/fedspine/runtime")
SITE = RUNTIME / "lib/python3.11/site-packages"
UNITS = Path("etc/systemd/system")
NOT_KEPT = ("fedspine_server", "include", "lib", "bin", "torch/include", "torch/test", "torch/share")
COMPILE = """
import compileall, py_compile, sys
mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
names = {"stripdir": sys.argv[2], "prependdir": "/"}
done = compileall.compile_dir(sys.argv[1], **names, quiet=2, force=True, invalidation_mode=mode)
sys.exit(not done)
"""


def base_tree(root: Path, board: Board, debs: Sequence[Deb], source: Path) -> None:
    """Fills a directory with Debian and the overlay.

    Args:
        root: The directory; made anew.
        board: The recipe.
        debs: The resolved packages.
        source: The checkout.
    """
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    unpack([deb.path for deb in debs if deb.name not in board.left_out], root)
    prune(root, board.left_out_paths)
    overlay = source / "device_images" / "overlay"
    for path in sorted(overlay.rglob("*")):
        _lay_over(path, root / path.relative_to(overlay))
    _lay_over(source / "systemd" / "fedspine-agent.service", root / UNITS / "fedspine-agent.service")
    for target, units in board.wants.items():
        wants = root / UNITS / f"{target}.wants"
        wants.mkdir(parents=True, exist_ok=True)
        for unit in units:
            # A template's instance is a link to the template.
            name, _, kind = unit.rpartition(".")
            template = f"{name.split('@')[0]}@.{kind}" if "@" in name else unit
            own = (root / UNITS / template).exists()
            (wants / unit).symlink_to(f"/etc/systemd/system/{template}" if own else f"/lib/systemd/system/{template}")
    certificates = sorted((root / "usr/share/ca-certificates").rglob("*.crt"))
    (root / "etc/ssl/certs").mkdir(parents=True, exist_ok=True)
    (root / "etc/ssl/certs/ca-certificates.crt").write_bytes(b"".join(path.read_bytes() for path in certificates))
    _finish_etc(root)


def _lay_over(path: Path, target: Path) -> None:
    """Copies a file or makes a directory, with modes that do not depend on the checkout's."""
    if path.is_dir():
        target.mkdir(exist_ok=True)
    else:
        shutil.copyfile(path, target)
    target.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)


def _finish_etc(root: Path) -> None:
    """Does what installation scripts would have done and the overlay cannot say."""
    shutil.copy(root / "usr/share/libc-bin/nsswitch.conf", root / "etc/nsswitch.conf")
    for name, target in {
        "etc/mtab": "../proc/self/mounts",
        "etc/resolv.conf": "../run/systemd/resolve/resolv.conf",
        "usr/bin/awk": "mawk",
        "var/run": "../run",
        "var/lock": "../run/lock",
    }.items():
        path = root / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(target)
    for name, mode in {
        "etc/shadow": 0o640,
        "etc/gshadow": 0o640,
        "root": 0o700,
        "tmp": 0o1777,
        "var/tmp": 0o1777,
    }.items():
        (root / name).chmod(mode)
    for name in ("config", "efi", "var/lib/private"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "var/lib/private").chmod(0o700)


def add_python(root: Path, packages: Path, wheels: Sequence[Path]) -> Path:
    """Puts the device's Python packages where the units look for them; returns the directory."""
    from fedspine_edge.images.wheels import install

    site = root / SITE
    shutil.copytree(packages, site)
    for wheel in wheels:
        install(wheel, site)
    for folder in NOT_KEPT:
        shutil.rmtree(site / folder, ignore_errors=True)
    _forget_what_is_not_kept(site)
    programs = root / RUNTIME / "bin"
    programs.mkdir(parents=True, exist_ok=True)
    (programs / "python").symlink_to("/usr/bin/python3.11")
    (root / RUNTIME / "pyvenv.cfg").write_text(
        "home = /usr/bin\ninclude-system-site-packages = false\nversion = 3.11\n"
    )
    program = programs / "fedspine"
    program.write_text(f"#!/{RUNTIME}/bin/python\nfrom fedspine_edge.cli import main\n\nmain()\n")
    program.chmod(0o755)
    return site


def _forget_what_is_not_kept(site: Path) -> None:
    """Takes files that are not there out of the records of wheels; of those, some hold the path they were built in."""
    for record in site.glob("*.dist-info/RECORD"):
        with record.open(newline="") as file:
            rows = [row for row in csv.reader(file) if row and (site / row[0]).exists()]
        with record.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


def add_facts(root: Path, facts: Mapping[str, str | int], key: bytes) -> None:
    """Tells the image what it is, and the key that must have signed what it takes for an update."""
    folder = root / "usr/lib/fedspine"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / IMAGE_FILE).write_text(json.dumps(dict(facts), sort_keys=True) + "\n")
    (folder / KEY_FILE).write_bytes(key)


def compile_python(root: Path) -> None:
    """Compiles every module: the root is read-only, so a board would do it again at each start."""
    for folder in (root / "usr/lib/python3.11", root / SITE):
        for cached in folder.rglob("__pycache__"):
            shutil.rmtree(cached)
        python: list[str | Path] = [sys.executable, "-I"]
        if sys.version_info[:2] != (3, 11):
            python = ["qemu-aarch64", "-L", root, root / "usr/bin/python3.11", "-I"]
        run([*python, "-c", COMPILE, folder, root], variables={"PYTHONHASHSEED": "0"})


def add_kernel(root: Path, unpacked: Path, board: Board, script: bytes) -> tuple[bytes, bytes]:
    """Puts the kernel's modules into the root; returns the kernel and its initial file system.

    Args:
        root: The root file system.
        unpacked: Where the packages of kernel and busybox were unpacked.
        board: Says which modules.
        script: `/init` of the initial file system.
    """
    modules = next((unpacked / "usr/lib/modules").iterdir())
    run(["depmod", "-b", unpacked / "usr", modules.name])
    dependencies, builtin = (modules / "modules.dep").read_text(), (modules / "modules.builtin").read_text()
    order = module_order(dependencies, builtin, board.initrd_modules)
    loaded = {f"{index:02d}-{Path(path).name}": (modules / path).read_bytes() for index, path in enumerate(order)}
    small = initrd((unpacked / "usr/bin/busybox").read_bytes(), script, loaded)
    kept = root / "usr/lib/modules" / modules.name
    for path in sorted({*order, *_folders(modules, board.module_folders)}):
        (kept / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(modules / path, kept / path)
    for name in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
        shutil.copy(modules / name, kept / name)
    run(["depmod", "-b", root / "usr", modules.name])
    return next((unpacked / "boot").glob("vmlinuz-*")).read_bytes(), small


def _folders(modules: Path, folders: Sequence[str]) -> set[str]:
    """Returns the modules below some folders, and those they need."""
    dependencies = (modules / "modules.dep").read_text().splitlines()
    needs = {path: rest.split() for path, _, rest in (line.partition(":") for line in dependencies)}
    chosen = {path for path in needs if any(path.startswith(f"kernel/{folder}/") for folder in folders)}
    return chosen | {need for path in chosen for need in needs[path]}


def set_times(root: Path, epoch: int) -> None:
    """Gives every file the epoch's time; what systemd takes for the earliest possible time is among them."""
    (root / "usr/lib/clock-epoch").touch()
    for path in [root, *root.rglob("*")]:
        os.utime(path, (epoch, epoch), follow_symlinks=False)
