"""Debian packages of another architecture, resolved, fetched and unpacked without installing anything.

apt resolves and verifies in a state directory of its own; nothing of the host's is read or changed, no maintainer
script runs, nothing is emulated, no privilege is needed. So a root file system takes seconds and is the same each time.

Comes in: sources and package names. Goes out: `Deb`s with the hash of each file, and directories.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedspine_edge.errors import ImageError
from fedspine_edge.images.host_tools import environment, run

ARCHITECTURE = "arm64"
INSTALLED = r"^Inst (\S+) \((\S+) .*\[(\S+)\]\)"
"""What apt-get says it would install: name, version, architecture."""
MERGED = ("bin", "lib", "sbin")
"""Directories of Debian 12 that are links into /usr; packages still ship them as directories."""


@dataclass(frozen=True)
class Deb:
    """A package's file.

    Attributes:
        name, version, architecture: As its control file says.
        sha256: Of the file.
        path: Where it is.
    """

    name: str
    version: str
    architecture: str
    sha256: str
    path: Path


class Archive:
    """An apt of its own.

    Args:
        folder: Where it keeps lists and packages.
        sources: Lines `URL SUITE COMPONENT`.
        keyring: Keys that sign them.
    """

    def __init__(self, folder: Path, sources: Sequence[str], keyring: str) -> None:
        self._cache = folder / "cache"
        for made in ("lists/partial", "cache/archives/partial", "etc"):
            (folder / made).mkdir(parents=True, exist_ok=True)
        lines = [f"deb [arch={ARCHITECTURE} signed-by={keyring}] {source}\n" for source in sources]
        (folder / "etc" / "sources.list").write_text("".join(lines))
        (folder / "status").write_text("")
        settings = {
            "APT::Architecture": ARCHITECTURE,
            "APT::Architectures": ARCHITECTURE,
            "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
            "Dir::Etc": folder / "etc",
            "Dir::Etc::SourceList": folder / "etc" / "sources.list",
            "Dir::Etc::SourceParts": "/dev/null",
            "Dir::State": folder,
            "Dir::State::Lists": folder / "lists",
            "Dir::State::status": folder / "status",
            "Dir::Cache": self._cache,
        }
        self._apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in settings.items())]

    def update(self) -> None:
        """Fetches the archive's lists."""
        run([*self._apt, "update"])

    def fetch(self, packages: Sequence[str]) -> list[Deb]:
        """Returns the packages and all they depend on, sorted by name; apt has verified them against signed lists."""
        plan = run([*self._apt, "--simulate", "install", *packages]).decode()
        run([*self._apt, "--yes", "--download-only", "install", *packages])
        return [_deb(self._cache / "archives", *found) for found in sorted(re.findall(INSTALLED, plan, re.MULTILINE))]

    def fetch_one(self, package: str, folder: Path) -> Path:
        """Returns one package's file, without what it depends on."""
        folder.mkdir(parents=True, exist_ok=True)
        run([*self._apt, "download", package], folder=folder)
        return max(folder.glob(f"{package}_*.deb"), key=lambda path: path.stat().st_mtime_ns)


def sources_of(suites: Sequence[str]) -> list[str]:
    """Returns `URL SUITE COMPONENT` of each suite, from the archive that this machine's own apt uses.

    Raises:
        ImageError: This machine knows no archive of one of them.
    """
    said = run(["apt-get", "indextargets", "--format", "$(SITE) $(RELEASE) $(COMPONENT)"]).decode()
    sites = {suite: site for site, suite, component in map(str.split, said.splitlines()) if component == "main"}
    missing = [suite for suite in suites if suite not in sites]
    if missing:
        raise ImageError(
            f"expected apt to know Debian's {', '.join(missing)}, found {', '.join(sorted(sites)) or 'nothing'}",
            hint="build on Debian 12, or add its suites to /etc/apt/sources.list.d, then: apt-get update",
        )
    return [f"{sites[suite]} {suite} main" for suite in suites]


def _deb(folder: Path, name: str, version: str, architecture: str) -> Deb:
    path = folder / f"{name}_{version.replace(':', '%3a')}_{architecture}.deb"
    return Deb(name, version, architecture, hashlib.sha256(path.read_bytes()).hexdigest(), path)


def unpack(debs: Iterable[Path], root: Path) -> None:
    """Unpacks packages over one another into a directory whose /bin, /lib and /sbin are links.

    Raises:
        ImageError: A package cannot be unpacked.
    """
    for name in MERGED:
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
        if not (root / name).is_symlink():
            (root / name).symlink_to(f"usr/{name}")
    for path in debs:
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", path], stdout=subprocess.PIPE, env=environment()) as deb:
            extract = ["tar", "--extract", "--keep-directory-symlink", "--no-same-owner", "--preserve-permissions"]
            done = subprocess.run(
                [*extract, "--directory", root], stdin=deb.stdout, capture_output=True, env=environment(), check=False
            )
        if deb.returncode or done.returncode:
            raise ImageError(
                f"cannot unpack {path.name}: {done.stderr.decode(errors='replace').strip()[-300:]}",
                hint="free some space, or remove the file and build again",
            )


def prune(root: Path, patterns: Sequence[str]) -> None:
    """Removes the paths that match a pattern, and all below them."""
    for path in sorted(root.rglob("*"), key=lambda path: len(path.parts), reverse=True):
        relative = path.relative_to(root)
        names = ["/".join(relative.parts[: depth + 1]) for depth in range(len(relative.parts))]
        if any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
