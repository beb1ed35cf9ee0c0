"""The Python of a device: our own wheel and llama.cpp cross-compiled, everything else by a hashed lock.

Comes in: the checkout and a cache. Goes out: wheels for AArch64, and a directory with all of them installed. pip reads
no markers (`--no-deps`): they would be this machine's, not the board's.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from fedspine_edge.errors import ImageError
from fedspine_edge.images.debian import Archive, unpack
from fedspine_edge.images.host_tools import run

PYTHON = "3.11"
EXTENSION = ".cpython-311-aarch64-linux-gnu.so"
FLAGS = "-march=armv8-a -mtune=cortex-a57"
OURS = ("CMakeLists.txt", "LICENSE", "README.md", "cmake", "csrc", "pyproject.toml", "python", "server")
LLAMA_RECIPE = ("requirements/llama.txt", "cmake/toolchain-aarch64.cmake", "python/fedspine_edge/images/wheels.py")
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
COMPLETE = ".complete"
UNUSED = "set(LLAMA_BUILD_COMMON ON "
"""What llama.cpp's programs share; a third of the compiling, and none of those programs is on a board."""
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


def headers(archive: Archive, cache: Path) -> Path:
    """Returns the directory of headers of the board's Python, which a compiler for another C library can be given."""
    found = cache / f"python-{PYTHON}-headers"
    if not (found / COMPLETE).exists():
        shutil.rmtree(found, ignore_errors=True)
        root = found / "root"
        root.mkdir(parents=True)
        unpack([archive.fetch_one(f"libpython{PYTHON}-dev", found)], root)
        for name in (f"python{PYTHON}", f"aarch64-linux-gnu/python{PYTHON}"):
            shutil.copytree(root / "usr" / "include" / name, found / name)
        shutil.rmtree(root)
        (found / COMPLETE).touch()
    return found


def own_wheel(source: Path, include: Path, cache: Path, *, epoch: int) -> Path:
    """Returns our wheel for AArch64, built once for a state of the sources."""
    folder = cache / f"wheel-{_digest(source, OURS)}"
    arguments = [
        f"-DPYTHON_MODULE_EXTENSION={EXTENSION}",
        f"-DPython_INCLUDE_DIR={include / f'python{PYTHON}'}",
        f"-DCMAKE_CXX_FLAGS={FLAGS} -isystem {include} -ffile-prefix-map={source}=.",
    ]
    return _built(folder, source, _tools(source, arguments, epoch))


def llama_wheel(source: Path, cache: Path, *, epoch: int) -> Path:
    """Returns llama-cpp-python for AArch64, compiled once a version: for ARMv8.0, so that every Jetson can run it."""
    folder = cache / f"llama-{_digest(source, LLAMA_RECIPE)}"
    code = folder / "source"
    if not (folder / COMPLETE).exists():
        shutil.rmtree(folder, ignore_errors=True)
        lock = source / "requirements" / "llama.txt"
        download = [*PIP, "download", "--no-deps", "--no-build-isolation", "--no-binary=:all:", "--require-hashes"]
        run([*download, "-d", folder, "-r", lock], variables=_tools(source, [], epoch))
        code.mkdir()
        run(["tar", "--extract", "--strip-components=1", "--file", next(folder.glob("*.tar.gz")), "--directory", code])
        _leave_out(code / "CMakeLists.txt", UNUSED)
    flags = f"{FLAGS} -ffile-prefix-map={code}=."  # ggml's assertions name their files
    arguments = [
        "-DCMAKE_C_COMPILER=clang-19", "-DCMAKE_C_COMPILER_TARGET=aarch64-linux-gnu", f"-DCMAKE_C_FLAGS={flags}",
        f"-DCMAKE_CXX_FLAGS={flags}", "-DGGML_NATIVE=OFF", "-DGGML_CPU_ARM_ARCH=armv8-a", "-DGGML_OPENMP=OFF",
        "-DLLAVA_BUILD=OFF",
    ]  # fmt: skip
    return _built(folder, code, _tools(source, arguments, epoch))


def _leave_out(lists: Path, switched_on: str) -> None:
    """Switches off what a CMake file insists on."""
    text = lists.read_text()
    if switched_on not in text:
        raise ImageError(f"expected {switched_on!r} in {lists}, found none", hint="llama-cpp-python has changed")
    lists.write_text(text.replace(switched_on, switched_on.replace(" ON ", " OFF ")))


def _tools(source: Path, arguments: Sequence[str], epoch: int) -> dict[str, str]:
    toolchain = source / "cmake" / "toolchain-aarch64.cmake"
    given = [f"-DCMAKE_TOOLCHAIN_FILE={toolchain}", "-DCMAKE_BUILD_TYPE=Release", *arguments]
    return {
        "CMAKE_ARGS": shlex.join(given),
        "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1),
        "SOURCE_DATE_EPOCH": str(epoch),
        "_PYTHON_HOST_PLATFORM": "linux-aarch64",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def _built(folder: Path, code: Path, variables: dict[str, str]) -> Path:
    if not (folder / COMPLETE).exists():
        build = folder / "build"
        folder.mkdir(parents=True, exist_ok=True)
        options = ["--no-cache-dir", "--no-deps", "--no-build-isolation", f"-Cbuild-dir={build}"]
        run([*PIP, "wheel", *options, "-w", folder, code], variables=variables)
        for used in (build, folder / "source"):
            shutil.rmtree(used, ignore_errors=True)
        (folder / COMPLETE).touch()
    return next(folder.glob("*.whl"))


def _digest(source: Path, names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        top = source / name
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".so", ".pyc"):
                digest.update(f"{path.relative_to(source)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def locked_packages(lock: Path, cache: Path) -> Path:
    """Returns a directory with a lock's AArch64 wheels installed; made once a lock."""
    folder = cache / f"{lock.stem}-{hashlib.sha256(lock.read_bytes()).hexdigest()[:12]}"
    if not folder.is_dir():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        platforms = [f"--platform={name}" for name in PLATFORMS]
        run(
            [*PIP, "install", "--no-deps", "--require-hashes", "--only-binary=:all:", "--no-compile", *platforms,
             "--implementation=cp", f"--python-version={PYTHON}", "--abi=cp311", "--abi=abi3", "--abi=none",
             "--target", partial, "-r", lock]
        )  # fmt: skip
        shutil.rmtree(partial / "bin", ignore_errors=True)  # their first line names this machine's Python
        partial.rename(folder)
    return folder


def install(wheel: Path, site: Path) -> None:
    """Unpacks a wheel, as installing it would.

    Raises:
        ImageError: A name in it would land elsewhere.
    """
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith("/") or ".." in Path(name).parts:
                raise ImageError(f"expected names inside of {wheel.name}, found {name!r}")
        archive.extractall(site)
