"""Time to accuracy of the controllers: the same run under each, several seeds, real training on a virtual clock.

    python benchmarks/reproduce.py [--preset encoder] [--seeds 3] [--controllers structured sucb fixed]

The first controller is set against each of the others, seed by seed: the target is the highest validation accuracy that
both reach, the figure the virtual time at which each first reaches it. Held-out accuracies of the saved, pruned models
stand beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def run(preset: str, controller: str, seed: int, folder: Path) -> dict[str, object]:
    """Runs one experiment and returns its summary and its accuracy over virtual time."""
    out = folder / f"{preset}-{controller}-{seed}"
    if not (out / "summary.json").exists():
        resume = ["--resume", str(out)] if (out / "experiment.json").exists() else None
        flags = [preset, "--controller", controller, "--seed", str(seed), "--no-dense-reference", "--out", str(out)]
        command = "from fedspine_edge.cli import main; main()"
        subprocess.run([sys.executable, "-c", command, "simulate", *(resume or flags), "--quiet"], check=True)
    summary = json.loads((out / "summary.json").read_text())
    rounds = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    curve = [(r["virtual_end_seconds"], r["accuracy"]) for r in rounds if r["accuracy"] is not None]
    return {"controller": controller, "seed": seed, "accuracy": summary["accuracy"], "curve": curve,
            "sparsity": summary["sparsity"], "virtual_seconds": summary["virtual_seconds"]}  # fmt: skip


def seconds_to(curve: list[tuple[float, float]], target: float) -> float | None:
    """First virtual second at which the accuracy is reached, None when it never is."""
    return next((seconds for seconds, accuracy in curve if accuracy >= target), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="encoder")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--controllers", nargs="+", default=["structured", "sucb", "fixed"])
    parser.add_argument("--folder", type=Path, help="keep the runs here and take up those that are there")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp())
    runs = {
        (controller, seed): run(arguments.preset, controller, seed, folder)
        for seed in range(arguments.seeds)
        for controller in arguments.controllers
    }
    ours, *rivals = arguments.controllers
    print(f"| rival | seed | target | {ours}, s | rival, s | rival / {ours} | held-out: {ours}, rival |")
    print("|---|---|---|---|---|---|---|")
    for rival in rivals:
        ratios = []
        for seed in range(arguments.seeds):
            pair = runs[ours, seed], runs[rival, seed]
            target = min(max(accuracy for _, accuracy in one["curve"]) for one in pair)
            seconds = [seconds_to(one["curve"], target) for one in pair]
            ratios.append(seconds[1] / seconds[0])
            print(f"| {rival} | {seed} | {target:.3f} | {seconds[0]:.0f} | {seconds[1]:.0f} | {ratios[-1]:.2f} "
                  f"| {pair[0]['accuracy']:.3f}, {pair[1]['accuracy']:.3f} |")  # fmt: skip
        print(f"| {rival} | median | | | | {statistics.median(ratios):.2f} | |")
    for controller in arguments.controllers:
        accuracies = [float(runs[controller, seed]["accuracy"]) for seed in range(arguments.seeds)]
        print(f"{controller}: held-out {statistics.mean(accuracies):.3f} (mean of {arguments.seeds})")
    if arguments.json:
        arguments.json.write_text(json.dumps(list(runs.values()), indent=2) + "\n")


if __name__ == "__main__":
    main()
