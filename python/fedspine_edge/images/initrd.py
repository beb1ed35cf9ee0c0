"""The file system a kernel starts with: a static busybox, some modules and one script; the same bytes every time.

Comes in: files and their modes. Goes out: a gzipped archive in the kernel's `newc` format.

Source: Documentation/driver-api/early-userspace/buffer-format.rst of Linux.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedspine_edge.errors import ImageError

DIRECTORY, FILE, LINK = 0o040755, 0o100000, 0o120777
FOLDERS = ("bin", "cow", "dev", "efi", "etc", "lib", "lib/modules", "proc", "root", "slot", "sys")
APPLETS = ("cat", "grep", "insmod", "mkdir", "mount", "mv", "reboot", "sed", "sh", "sleep", "switch_root", "umount")
"""What `device_images/init.sh` calls."""


@dataclass(frozen=True)
class Entry:
    """One name in the archive: its mode and content (a link's target is its content)."""

    mode: int
    content: bytes = b""


def newc(entries: Mapping[str, Entry]) -> bytes:
    """Returns an archive of entries, sorted by name, owned by root, without times."""
    parts = [_record(name, number, entries[name]) for number, name in enumerate(sorted(entries), 1)]
    archive = b"".join([*parts, _record("TRAILER!!!", 0, Entry(0))])
    return archive + bytes(-len(archive) % 512)


def _record(name: str, inode: int, entry: Entry) -> bytes:
    encoded = name.encode() + b"\0"
    links = 2 if entry.mode == DIRECTORY else 1
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.content), 0, 0, 0, 0, len(encoded), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
    return head + bytes(-len(head) % 4) + entry.content + bytes(-len(entry.content) % 4)


def module_order(dependencies: str, builtin: str, wanted: Sequence[str]) -> list[str]:
    """Returns paths of modules in the order they load: what a module needs comes before it.

    Args:
        dependencies: Text of modules.dep.
        builtin: Text of modules.builtin: these need no loading.
        wanted: Names of modules, as `modprobe` takes them.

    Raises:
        ImageError: The kernel has no such module.
    """
    needs = {path: rest.split() for path, _, rest in (line.partition(":") for line in dependencies.splitlines())}
    paths = {_name(path): path for path in needs}
    there = {_name(path) for path in builtin.split()}
    order: list[str] = []
    for name in wanted:
        path = paths.get(_name(name))
        if path is None and _name(name) in there:
            continue
        if path is None:
            raise ImageError(f"expected the module {name} in the kernel, found none", hint="see initrd_modules")
        # modules.dep names what a module needs nearest first, and all of it.
        order += [entry for entry in (*reversed(needs[path]), path) if entry not in order]
    return order


def _name(path: str) -> str:
    return Path(path).name.split(".")[0].replace("-", "_")


def initrd(busybox: bytes, script: bytes, modules: Mapping[str, bytes]) -> bytes:
    """Returns the initial file system.

    Args:
        busybox: The static program.
        script: `/init`.
        modules: Kernel modules by file name, in the order they load.
    """
    entries = {name: Entry(DIRECTORY) for name in FOLDERS}
    entries["init"] = Entry(FILE | 0o755, script)
    entries["bin/busybox"] = Entry(FILE | 0o755, busybox)
    entries |= {f"bin/{name}": Entry(LINK, b"busybox") for name in APPLETS}
    entries |= {f"lib/modules/{name}": Entry(FILE | 0o644, content) for name, content in modules.items()}
    entries["etc/modules"] = Entry(FILE | 0o644, "".join(f"{name}\n" for name in modules).encode())
    return gzip.compress(newc(entries), compresslevel=9, mtime=0)
