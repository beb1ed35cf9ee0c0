"""Counts the instructions of a layer's forward on AArch64 and of OpenBLAS's sgemm, and holds them to their gates.

    python benchmarks/arm_gates.py [--json FILE]     after `make test-arm`, which builds what is counted

Both run in qemu-user as cortex-a57 under the same counting plugin; a run is the difference between three runs and one,
halved. A gate against regressions, never a claim of speed: docs/arm.md. Exit code 3 when a gate is missed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent
SOURCES, BUILD = HERE / "arm", HERE.parent / "build" / "aarch64"
LANES = 4


def build(folder: Path) -> None:
    """Builds the plugin for this machine and the counted program for the emulated one."""
    kernels = BUILD / "libfedspine_kernels.a"
    if not kernels.is_file():
        raise SystemExit(f"error: expected {kernels}, found none\nhint: make test-arm")
    plugin = ["clang++-19", "-O2", "-shared", "-fPIC", SOURCES / "count_instructions.cc", "-o", folder / "count.so"]
    program = ["clang++-19", "--target=aarch64-linux-gnu", "-std=c++17", "-O2", f"-I{HERE.parent / 'csrc'}"]
    program += [SOURCES / "forward.cc", kernels, "-ldl", "-o", folder / "forward"]
    for command in (plugin, program):
        subprocess.run(command, check=True)


def count(folder: Path, root: Path, which: str, sizes: list[int]) -> tuple[int, int]:
    """Returns the instructions of one forward and its FMLAs."""
    blas = root / "usr/lib/aarch64-linux-gnu/openblas-pthread"
    counts = []
    for runs in (1, 3):
        command = ["qemu-aarch64", "-cpu", "cortex-a57", "-plugin", folder / "count.so", "-L", root]
        command += ["-E", f"LD_LIBRARY_PATH={blas}", "-E", "OPENBLAS_NUM_THREADS=1", folder / "forward", which]
        done = subprocess.run([*command, *map(str, sizes), str(runs)], check=True, capture_output=True, text=True)
        found = re.search(r"instructions (\d+) fmla (\d+)", done.stderr)
        if found is None:
            raise SystemExit(f"error: expected a count, found {done.stderr!r}")
        counts.append((int(found[1]), int(found[2])))
    return (counts[1][0] - counts[0][0]) // 2, (counts[1][1] - counts[0][1]) // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    gates = tomllib.loads((HERE / "arm_gates.toml").read_text())
    sizes = [gates[name] for name in ("tokens", "in_features", "out_features")]
    root = Path(subprocess.check_output(["sh", HERE.parent / "tests/arm/root.sh"], text=True).strip())
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        ours, our_fmlas = count(Path(folder), root, "ours", sizes)
        theirs, their_fmlas = count(Path(folder), root, "openblas", sizes)
    useful = sizes[0] * sizes[1] * sizes[2] / LANES
    figures = {
        "instructions": ours,
        "fmla_share": useful / ours,
        "fmlas": our_fmlas,
        "openblas_instructions": theirs,
        "openblas_fmlas": their_fmlas,
        "of_openblas": ours / theirs,
    }
    print(f"ours      {ours / 1e6:6.2f} M instructions, {figures['fmla_share']:.1%} useful FMLA")
    print(f"OpenBLAS  {theirs / 1e6:6.2f} M instructions, {useful / theirs:.1%} useful FMLA")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    if ours > gates["max_of_openblas"] * theirs or figures["fmla_share"] < gates["min_fmla_share"]:
        print(f"error: expected at most {gates['max_of_openblas']} of OpenBLAS's instructions and a share of at least "
              f"{gates['min_fmla_share']}", file=sys.stderr)  # fmt: skip
        raise SystemExit(3)


if __name__ == "__main__":
    main()
