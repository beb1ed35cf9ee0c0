"""How well the main loop of the NEON tile keeps a Cortex-A57's multipliers busy, by LLVM's model of that core.

    python benchmarks/arm_schedule.py [--json FILE]     after `make test-arm`, which builds what is looked at

llvm-mca schedules the loop that was really built, taken from the disassembly: cycles an iteration, against the fewest
that its FMLAs alone would take. Caches and memory are not in the model: a gate against a loop that the compiler or we
spoilt, never a claim of speed. Exit code 3 when the gate is missed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent
KERNELS = HERE.parent / "build" / "aarch64" / "libfedspine_kernels.a"
TILE = "_ZN8fedspine4neon12_GLOBAL__N_111ComputeTileILi6ELi4EEEvRKNS1_4TileE"  # 6 rows of 16 columns
ITERATIONS = 200
INSTRUCTION = re.compile(r"\s+([0-9a-f]+):\s+(.*)")
BRANCH = re.compile(r"(?:b\.\w+|cbn?z \w+,|tbn?z \w+, #\w+,) (0x[0-9a-f]+)$")
LEAVES = re.compile(r"(?:b|bl|ret)\b(?!\.)")


def disassembled(kernels: Path) -> list[tuple[int, str]]:
    """Returns address and text of each instruction of the tile."""
    command = ["llvm-objdump-19", "-d", "--no-show-raw-insn", f"--disassemble-symbols={TILE}", kernels]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = [match for match in map(INSTRUCTION.match, said.splitlines()) if match]
    return [(int(match[1], 16), match[2].split("<")[0].replace("\t", " ").strip()) for match in found]


def main_loop(code: list[tuple[int, str]]) -> list[str]:
    """Returns the loop with the most FMLAs that has no other way out than its end.

    Raises:
        SystemExit: There is none.
    """
    place = {address: index for index, (address, _) in enumerate(code)}
    loops = []
    for index, (address, text) in enumerate(code):
        branch = BRANCH.match(text)
        begin = place.get(int(branch[1], 16)) if branch else None
        if begin is not None and code[begin][0] <= address:
            loops.append([each for _, each in code[begin : index + 1]])
    loops = [loop for loop in loops if not any(map(LEAVES.match, loop))]
    best = max(loops, key=num_fmlas, default=[])
    if not num_fmlas(best):
        raise SystemExit(
            f"error: expected a loop with FMLAs in {TILE}, found none\nhint: has the tile another name now?"
        )
    return ["loop:", *best[:-1], re.sub(r"0x[0-9a-f]+$", "loop", best[-1])]


def num_fmlas(loop: list[str]) -> int:
    return sum(text.startswith("fmla") for text in loop)


def scheduled(loop: list[str]) -> tuple[float, float]:
    """Returns the cycles of an iteration, and the fewest that its FMLAs would take alone."""
    cycles = []
    for lines in (loop, [text for text in loop if text.startswith("fmla")]):
        command = ["llvm-mca-19", "-mtriple=aarch64-linux-gnu", "-mcpu=cortex-a57", f"-iterations={ITERATIONS}"]
        said = subprocess.run(command, input="\n".join(lines) + "\n", check=True, capture_output=True, text=True).stdout
        name = "Total Cycles" if lines is loop else "Block RThroughput"
        cycles.append(float(re.search(rf"{name}: +([\d.]+)", said)[1]))
    return cycles[0] / ITERATIONS, cycles[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if not KERNELS.is_file():
        raise SystemExit(f"error: expected {KERNELS}, found none\nhint: make test-arm")
    gate = tomllib.loads((HERE / "arm_gates.toml").read_text())["min_multiplier_share"]
    loop = main_loop(disassembled(KERNELS))
    cycles, fewest = scheduled(loop)
    share = fewest / cycles
    print(f"main loop {cycles:6.1f} cycles on a modelled Cortex-A57 for {num_fmlas(loop)} FMLAs, "
          f"which alone take {fewest:.0f}: {share:.1%} of their peak")  # fmt: skip
    if options.json:
        figures = {"cycles": cycles, "fewest_cycles": fewest, "fmlas": num_fmlas(loop), "multiplier_share": share}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    if share < gate:
        print(f"error: expected at least {gate} of the multipliers' peak", file=sys.stderr)
        raise SystemExit(3)


if __name__ == "__main__":
    main()
