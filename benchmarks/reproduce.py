"""Time to accuracy of the controllers: the same run under each, several seeds, real training on a virtual clock.

    python benchmarks/reproduce.py [--preset encoder] [--seeds 3] [--controllers structured sucb fixed]

For each seed the target is the highest validation accuracy that every controller reaches; the figure is the virtual
time at which a run first reaches it. Held-out accuracy of the saved, pruned model stands beside it.
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


def common_target(runs: list[dict]) -> float:  # type: ignore[type-arg]
    """The highest accuracy that every run of a seed reaches."""
    return min(max(accuracy for _, accuracy in one["curve"]) for one in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="encoder")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--controllers", nargs="+", default=["structured", "sucb", "fixed"])
    parser.add_argument("--folder", type=Path, help="keep the runs here and take up those that are there")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp())
    runs = [
        run(arguments.preset, controller, seed, folder)
        for seed in range(arguments.seeds)
        for controller in arguments.controllers
    ]
    print("| seed | target | " + " | ".join(f"{name}: s to target, held-out" for name in arguments.controllers) + " |")
    print("|---|---|" + "---|" * len(arguments.controllers))
    ratios: dict[str, list[float]] = {name: [] for name in arguments.controllers}
    for seed in range(arguments.seeds):
        of_seed = {str(one["controller"]): one for one in runs if one["seed"] == seed}
        target = common_target(list(of_seed.values()))
        seconds = {name: seconds_to(one["curve"], target) for name, one in of_seed.items()}
        best = seconds[arguments.controllers[0]]
        cells = []
        for name in arguments.controllers:
            ratios[name].append(seconds[name] / best)
            cells.append(f"{seconds[name]:.0f}, {of_seed[name]['accuracy']:.3f}")
        print(f"| {seed} | {target:.3f} | " + " | ".join(cells) + " |")
    for name in arguments.controllers:
        accuracies = [float(one["accuracy"]) for one in runs if one["controller"] == name]
        print(f"{name}: {statistics.median(ratios[name]):.2f}x the time of {arguments.controllers[0]} (median), "
              f"held-out {statistics.mean(accuracies):.3f} (mean)")  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(runs, indent=2) + "\n")


if __name__ == "__main__":
    main()
