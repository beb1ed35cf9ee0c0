"""Times a sentence classifier in torch and onnxruntime: the unpruned model in torch against pruned ones, in turn.

    python benchmarks/bench_encoder_runtimes.py DENSE_DIR NAME=ONNX_DIR ... [--tokens 64] [--turns 200] [--json FILE]

One text at a time, one thread. Ratios above 1 mean faster than the dense model in torch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from fedspine_edge.checkpoint import load_pruned
from fedspine_edge.export.onnx_session import open_onnx

WARM_UP_TURNS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dense", type=Path)
    parser.add_argument("rivals", nargs="+", help="NAME=directory of an ONNX model, or of a model for torch")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    row = torch.randint(1000, 20000, (arguments.tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    runs = {"dense, torch": torch_run(arguments.dense, row)}
    for rival in arguments.rivals:
        name, _, folder = rival.partition("=")
        runs[name] = (
            onnx_run(Path(folder), row) if (Path(folder) / "model.onnx").is_file() else torch_run(Path(folder), row)
        )
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(arguments.turns + WARM_UP_TURNS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn >= WARM_UP_TURNS:
                samples[name].append(1e3 * (time.perf_counter() - start))
    reference = samples["dense, torch"]
    report = {}
    for name, times in samples.items():
        ratios = [ours / theirs for ours, theirs in zip(reference, times, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        report[name] = {
            "p50_ms": statistics.median(times),
            "ratio": statistics.median(ratios),
            "low": low,
            "high": high,
        }
        print(f"{name:<16} p50 {report[name]['p50_ms']:6.2f} ms   {report[name]['ratio']:.2f}x [{low:.2f}, {high:.2f}]")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def torch_run(folder: Path, row: list[int]):  # type: ignore[no-untyped-def]
    model, ids = load_pruned(folder), torch.tensor([row])
    mask = torch.ones_like(ids)

    @torch.inference_mode()
    def run() -> None:
        model(input_ids=ids, attention_mask=mask)

    return run


def onnx_run(folder: Path, row: list[int]):  # type: ignore[no-untyped-def]
    session = open_onnx(folder / "model.onnx", num_threads=1)
    return lambda: session.classify([row])


if __name__ == "__main__":
    main()
