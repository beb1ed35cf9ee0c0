"""What `fedspine profile` reports, held against llama-bench, the kernel's own memory figures, and itself.

    python benchmarks/bench_profile.py FILE.gguf --llama-bench PATH [--turns 6] [--json FILE]

`--llama-bench` is a build of llama.cpp's tool of that name; it is run with llama-cpp-python's own libraries, so that
both time the same kernels. Three figures: pp512 and tg128 over llama-bench's, in turn; the peak PSS over that of
/proc/PID/smaps_rollup sampled from outside; tg128 with the board's sensors sampled (an AGX Orin's files) over without.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from fedspine_edge.hardware import this_machine
from fedspine_edge.profiling.child import open_child
from fedspine_edge.profiling.power import find_meter
from fedspine_edge.profiling.watch import BoardWatch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "edge"))
from boards import plant

PROMPT, GENERATE, THREADS = 512, 128, 2
REPETITIONS = 3
PROGRAM = [sys.executable, "-c", "from fedspine_edge.cli import main; main()"]
TESTS = (f"-p {PROMPT} -n {GENERATE} -t {THREADS} -r {REPETITIONS} -o json").split()


def by_llama_bench(tool: Path, file: Path) -> dict[str, float]:
    """Returns tokens/s of each test as llama-bench measures them."""
    found = importlib.util.find_spec("llama_cpp")
    assert found is not None
    assert found.origin is not None
    environment = {**os.environ, "LD_LIBRARY_PATH": str(Path(found.origin).parent / "lib")}
    for name in [name for name in environment if name.startswith("OMP_")]:
        del environment[name]
    command = [str(tool), "-m", str(file), "-fa", "on", *TESTS]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return {
        ("pp" if row["n_prompt"] else "tg"): statistics.median(row["samples_ts"]) for row in json.loads(done.stdout)
    }


def by_us(file: Path) -> tuple[dict[str, float], bool]:
    """Returns tokens/s of each test as we measure them, and whether we trust that."""
    done = subprocess.run([*PROGRAM, "profile", str(file), *TESTS], check=True, capture_output=True, text=True)
    rows = json.loads(done.stdout)
    speeds = {("pp" if row["n_prompt"] else "tg"): statistics.median(row["samples_ts"]) for row in rows}
    return speeds, all(row["trusted"] for row in rows)


def agreement(tool: Path, file: Path, turns: int) -> dict[str, Any]:
    """Returns our figures over llama-bench's, turn by turn; who goes first alternates."""
    samples: dict[str, list[list[float]]] = {"pp": [], "tg": []}
    trusted = []
    for turn in range(turns):
        theirs = by_llama_bench(tool, file) if turn % 2 == 0 else None
        ours, calm = by_us(file)
        theirs = theirs or by_llama_bench(tool, file)
        trusted.append(calm)
        for test, pairs in samples.items():
            pairs.append([ours[test], theirs[test]])
    report: dict[str, Any] = {"trusted_turns": sum(trusted)}
    for test, pairs in samples.items():
        ratios = [ours / theirs for ours, theirs in pairs]
        report[test] = {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "ts": pairs}
        print(f"{test}: ours over llama-bench's {report[test]['ratio']:.3f} [{min(ratios):.3f}, {max(ratios):.3f}]")
    return report


class OutsidePss(threading.Thread):
    """The highest PSS of a program's measuring process, read from outside."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid, self.peak, self.over = pid, 0, threading.Event()

    def run(self) -> None:
        """Samples until told that it is over."""
        while not self.over.wait(0.005):
            with contextlib.suppress(psutil.Error, OSError, ValueError):
                for process in psutil.Process(self._pid).children(recursive=True):
                    text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                    self.peak = max(self.peak, 1024 * int(text.split("\nPss:")[1].split()[0]))


def pss(file: Path) -> dict[str, Any]:
    """Returns the peak PSS a profile reports, over what is seen from outside meanwhile."""
    process = subprocess.Popen(
        [*PROGRAM, "profile", str(file), *TESTS], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    watch = OutsidePss(process.pid)
    watch.start()
    output, _ = process.communicate()
    watch.over.set()
    watch.join()
    reported = max(row["pss_peak_bytes"] for row in json.loads(output))
    print(f"peak PSS: reported {reported / 2**20:.1f} MiB, from outside {watch.peak / 2**20:.1f} MiB")
    return {"reported": reported, "outside": watch.peak, "ratio": reported / watch.peak}


def overhead(file: Path, turns: int) -> dict[str, Any]:
    """Returns tg128's seconds under the sampler of power, clocks and heat, over without, turn by turn."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        root = plant("agx_orin", Path(folder))
        child = open_child(stack, file, num_context=GENERATE, num_threads=THREADS, num_batch=GENERATE)
        child.run(0, GENERATE)
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(turns):
            for watched in (True, False) if turn % 2 else (False, True):
                with BoardWatch(find_meter(root), root=root) if watched else contextlib.nullcontext():
                    time.sleep(0.2)
                    seconds[watched].append(child.run(0, GENERATE).seconds)
    ratios = [one / other for one, other in zip(seconds[True], seconds[False], strict=True)]
    share = statistics.median(ratios) - 1
    print(f"sampling the sensors slows tg{GENERATE} by {share:+.2%} (median of {turns} pairs)")
    return {"median": share, "low": min(ratios) - 1, "high": max(ratios) - 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--llama-bench", type=Path, help="leave out to skip the first figure")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {"machine": dataclasses.asdict(this_machine()), "file": options.file.name}
    if options.llama_bench:
        report["llama_bench"] = agreement(options.llama_bench, options.file, options.turns)
    report["pss"] = pss(options.file)
    report["overhead"] = overhead(options.file, 4 * options.turns)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
