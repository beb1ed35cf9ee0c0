"""SmolLM2-135M unpruned, a quarter and a half of it pruned, in llama.cpp: speed, file and memory of each format.

    python benchmarks/bench_export.py WORK_DIR [--modes per-layer uniform] [--formats F16 Q8_0 ...] [--json FILE]

WORK_DIR keeps the pruned models and files between runs. The measuring is `fedspine compare`'s; ratios are over the
unpruned model's neighbour in time, with 95 % intervals.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from fedspine_edge.hardware import this_machine

MODEL = "smollm2-135m"
RATIOS = (0.25, 0.5)
FORMATS = ("F16", "Q8_0", "Q4_0", "Q4_K_M")
PROGRAM = [sys.executable, "-c", "from fedspine_edge.cli import main; main()"]


def fedspine(*words: object) -> str:
    """Runs the program and returns what it printed."""
    return subprocess.run([*PROGRAM, *map(str, words)], check=True, stdout=subprocess.PIPE, text=True).stdout


def file_of(work: Path, ratio: float, mode: str, quantization: str) -> Path:
    """Returns a model's file, made if it is not there."""
    name = f"{ratio:g}-{mode}" if ratio else "dense"
    folder = work / f"{name}-{quantization}"
    if not list(folder.glob("*.gguf")):
        source: str | Path = MODEL
        if ratio:
            source = work / name
            if not source.is_dir():
                fedspine("prune", MODEL, "--ratio", ratio, "--mode", mode, "--steps", 24, "--out", source, "--quiet")
        folder.mkdir(parents=True, exist_ok=True)
        fedspine("export", "gguf", source, "--quant", quantization, "--out", folder, "--quiet")
    return next(folder.glob("*.gguf"))


def measure(files: list[Path], options: argparse.Namespace) -> dict[str, Any]:
    """Returns what `compare` measures of files, the first of them unpruned."""
    tests = ("-p", 512, "-n", 128, "-t", options.threads, "-r", options.repetitions, "--json", "--quiet")
    found = json.loads(fedspine("compare", *files, *tests))
    return {
        "metrics": {
            metric["name"]: {"values": metric["values"], "ratios": metric["ratios"], "trusted": metric["trusted"]}
            for metric in found["metrics"]
        },
        "noise": found["noise"],
    }


def line(quantization: str, mode: str, found: dict[str, Any]) -> str:
    """Returns the figures of a format in one line."""
    metrics = found["metrics"]
    parts = []
    for index, ratio in enumerate(RATIOS, start=1):
        prompt, generation = (metrics[f"{test}, t/s"]["ratios"][index] for test in ("pp512", "tg128"))
        parts.append(
            f"{ratio:.0%} prompt {prompt['value']:.2f}x [{prompt['low']:.2f}, {prompt['high']:.2f}]"
            f" generation {generation['value']:.2f}x [{generation['low']:.2f}, {generation['high']:.2f}]"
        )
    dense = "/".join(f"{metrics[f'{test}, t/s']['values'][0]:.0f}" for test in ("pp512", "tg128"))
    sizes = {name: [round(value) for value in metrics[name]["values"]] for name in ("file, MiB", "memory, MiB")}
    return (
        f"{quantization:7} {mode:10} dense {dense} t/s; {'; '.join(parts)}; {sizes}{' (!)' if found['noise'] else ''}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--modes", nargs="+", default=["per-layer", "uniform"])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--make-only", action="store_true", help="make the files and measure nothing")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = json.loads(options.json.read_text()) if options.json and options.json.is_file() else {}
    report["machine"] = dataclasses.asdict(this_machine())
    for mode in options.modes:
        for quantization in options.formats:
            files = [file_of(options.work, ratio, mode, quantization) for ratio in (0.0, *RATIOS)]
            if options.make_only:
                continue
            found = report[f"{quantization} {mode}"] = measure(files, options)
            print(line(quantization, mode, found), flush=True)
            if options.json:
                options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
