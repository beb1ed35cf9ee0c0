"""Times the native layer, forward and backward, against peft's LoRA Linear, and the importance against dense torch.

Both sides run in turns in one process; each turn gives one ratio, so drift of the machine cancels. Before anything is
timed the two are asserted to agree. Ratios above 1 mean that the native kernel is faster.

    python benchmarks/bench_kernels.py [--json results.json] [--quick]

The JSON's `geomean_vs_peft` and `min_vs_peft` are over all shapes and ranks of the layer; `vs_onednn` is against an
autograd.Function on weights that oneDNN has prepacked for both directions, the fastest way there is in torch;
`half_vs_dense` is how much faster the layer is with half of its rows and columns; `bfloat16_vs_float32` and
`int8_vs_float32` are of the layer on a narrower weight. Each is a geometric mean for a number of threads and tokens.
`peak_fraction` is what the layer does of the multiply-adds that as many cores do on registers alone (fma_peak.cc,
before and after, the better one).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import peft
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear

from fedspine_edge import kernels

SHAPES = {  # (inputs, outputs)
    "MiniLM": ((384, 384), (384, 1536), (1536, 384)),
    "SmolLM2": ((576, 576), (576, 192), (576, 1536), (1536, 576)),
    "RoBERTa-base": ((768, 768), (768, 3072), (3072, 768)),
    "TinyLlama": ((2048, 5632),),
}
TOKENS = (64, 128, 512, 2048)
RANKS = (8, 16)
SCALING = 2.0
TURN_SECONDS = 0.02
Run = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """One row of the table: medians over the turns; ratios are theirs (of `half`: dense) over ours."""

    what: str
    model: str
    in_features: int
    out_features: int
    tokens: int
    rank: int
    threads: int
    wall: float
    wall_low: float
    wall_high: float
    cpu: float
    milliseconds: float
    gflops: float


def layer_pair(inputs: int, outputs: int, tokens: int, rank: int) -> tuple[Run, Run]:
    """Returns (peft, native): a forward and a backward that also gives dx."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.nn.Linear(inputs, outputs)
    config = LoraConfig(r=rank, lora_alpha=int(SCALING * rank), lora_dropout=0.0)
    layer = PeftLinear(dense, "default", config=config, r=rank, lora_alpha=int(SCALING * rank))
    layer.requires_grad_(False)
    lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    lora_b.data.normal_(std=0.02, generator=generator)
    lora_a.requires_grad_(True)
    lora_b.requires_grad_(True)
    x = torch.randn(tokens, inputs, generator=generator).requires_grad_(True)
    dy = torch.randn(tokens, outputs, generator=generator)
    packed = kernels.pack(dense.weight.detach())
    bias = dense.bias.detach()
    leaves = (x, lora_a, lora_b)

    def theirs() -> tuple[torch.Tensor, ...]:
        y = layer(x)
        return (y, *torch.autograd.grad(y, leaves, dy))

    def ours() -> tuple[torch.Tensor, ...]:
        y = kernels.lora_linear(x, packed, bias=bias, lora_a=lora_a, lora_b=lora_b, scaling=SCALING)
        return (y, *torch.autograd.grad(y, leaves, dy))

    for expected, found in zip(theirs(), ours(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))
    return theirs, ours


class OneDnn(torch.autograd.Function):
    """The layer on oneDNN's own prepacked weights: W for the forward, its transpose for the backward."""

    @staticmethod
    def forward(ctx, x, packed, transposed, bias, lora_a, lora_b):
        """Returns y."""
        linear = torch.ops.mkldnn._linear_pointwise
        hidden = x @ lora_a.T
        ctx.save_for_backward(x, hidden, lora_a, lora_b)
        ctx.transposed = transposed
        return linear(x, packed, bias, "none", [], "").addmm_(hidden, lora_b.T, alpha=SCALING)

    @staticmethod
    def backward(ctx, dy):
        """Returns what a layer's backward gives: of x, A and B."""
        x, hidden, lora_a, lora_b = ctx.saved_tensors
        dhidden = (dy @ lora_b).mul_(SCALING)
        dx = torch.ops.mkldnn._linear_pointwise(dy, ctx.transposed, None, "none", [], "").addmm_(dhidden, lora_a)
        return dx, None, None, None, dhidden.T @ x, (dy.T @ hidden).mul_(SCALING)


def onednn_pair(inputs: int, outputs: int, tokens: int, rank: int) -> tuple[Run, Run]:
    """Returns (oneDNN, native): the same layer on weights that each has packed once."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weight, bias, dy = draw(outputs, inputs) * inputs**-0.5, draw(outputs), draw(tokens, outputs)
    leaves = [draw(tokens, inputs), draw(rank, inputs) * inputs**-0.5, draw(outputs, rank) * 0.02]
    x, lora_a, lora_b = (leaf.requires_grad_() for leaf in leaves)
    reorder = torch.ops.mkldnn._reorder_linear_weight
    both_ways = reorder(weight, tokens), reorder(weight.T.contiguous(), tokens)
    packed = kernels.pack(weight)

    def theirs() -> tuple[torch.Tensor, ...]:
        y = OneDnn.apply(x, *both_ways, bias, lora_a, lora_b)
        return (y, *torch.autograd.grad(y, leaves, dy))

    def ours() -> tuple[torch.Tensor, ...]:
        y = kernels.lora_linear(x, packed, bias=bias, lora_a=lora_a, lora_b=lora_b, scaling=SCALING)
        return (y, *torch.autograd.grad(y, leaves, dy))

    for expected, found in zip(theirs(), ours(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))
    return theirs, ours


def narrow_pair(inputs: int, outputs: int, tokens: int, rank: int, dtype: str) -> tuple[Run, Run]:
    """Returns (float32, narrow): the native layer, and the same on a weight held in a narrower format."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator)
    leaves = [torch.randn(*shape, generator=generator) for shape in ((tokens, inputs), (rank, inputs), (outputs, rank))]
    x, lora_a, lora_b = (leaf.requires_grad_() for leaf in leaves)
    dy = torch.randn(tokens, outputs, generator=generator)

    def run_on(packed: kernels.PackedWeight) -> Run:
        def run() -> tuple[torch.Tensor, ...]:
            y = kernels.lora_linear(x, packed, bias=None, lora_a=lora_a, lora_b=lora_b, scaling=SCALING)
            return (y, *torch.autograd.grad(y, leaves, dy))

        return run

    narrow = kernels.pack(weight, dtype=dtype)
    for expected, found in zip(run_on(kernels.pack(kernels.unpack(narrow)))(), run_on(narrow)(), strict=True):
        assert torch.equal(found, expected), f"{dtype}: another result than float32 panels of the same numbers give"
    return run_on(kernels.pack(weight)), run_on(narrow)


def peak_gflops(threads: int) -> float:
    """Returns the multiply-adds of as many cores at once on registers alone, as 10^9 operations a second."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "fma_peak"
        flags = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=fast"]
        subprocess.run(["c++", *flags, Path(__file__).parent / "native/fma_peak.cc", "-o", program], check=True)
        running = [subprocess.Popen([program], stdout=subprocess.PIPE, text=True) for _ in range(threads)]
        return sum(float(one.communicate()[0]) for one in running)


def half_pair(inputs: int, outputs: int, tokens: int, rank: int) -> tuple[Run, Run]:
    """Returns (dense, half): the native layer, and what is left of it with half of its rows and columns."""
    return layer_pair(inputs, outputs, tokens, rank)[1], layer_pair(inputs // 2, outputs // 2, tokens, rank)[1]


def importance_pair(inputs: int, outputs: int, rank: int) -> tuple[Run, Run]:
    """Returns (torch, native): the row sums of the importance."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weight = draw(outputs, inputs)
    factors = {"lora_a": draw(rank, inputs), "lora_b": draw(outputs, rank)}
    a, b, da, db = *factors.values(), draw(rank, inputs), draw(outputs, rank)
    packed = kernels.pack(weight)

    def theirs() -> torch.Tensor:
        gradient = torch.cat([db, b], 1) @ torch.cat([a - da, da], 0)
        return gradient.mul_(torch.addmm(weight, b, a, alpha=SCALING)).abs_().sum(1)

    def ours() -> torch.Tensor:
        return kernels.importance(packed, lora_a=a, lora_b=b, grad_a=da, grad_b=db, scaling=SCALING, axis="out")

    torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=0)
    return theirs, ours


def time_turn(run: Run, repeats: int) -> tuple[float, float]:
    """Returns the wall and CPU seconds of one run."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats


def compare(theirs: Run, ours: Run, turns: int) -> tuple[list[float], list[float], float]:
    """Returns the wall ratios, the CPU ratios and our median wall seconds."""
    theirs(), ours()
    repeats = max(1, round(TURN_SECONDS / max(time_turn(ours, 2)[0], 1e-6)))
    walls, cpus, seconds = [], [], []
    for turn in range(turns):
        order = (theirs, ours) if turn % 2 == 0 else (ours, theirs)
        timed = {run: time_turn(run, repeats) for run in order}
        walls.append(timed[theirs][0] / timed[ours][0])
        cpus.append(timed[theirs][1] / max(timed[ours][1], 1e-9))
        seconds.append(timed[ours][0])
    return walls, cpus, statistics.median(seconds)


def measure(threads: int, turns: int, tokens: tuple[int, ...], ranks: tuple[int, ...]) -> Iterator[Ratio]:
    """Yields a row for each shape, number of tokens and rank."""
    torch.set_num_threads(threads)
    for model, shapes in SHAPES.items():
        for inputs, outputs in shapes:
            for rank in ranks:
                for count in tokens:
                    flops = 4.0 * count * inputs * outputs + 6.0 * count * rank * (inputs + outputs)
                    found = compare(*layer_pair(inputs, outputs, count, rank), turns)
                    yield row("layer", model, (inputs, outputs, count, rank, threads), flops, found)
                    found = compare(*onednn_pair(inputs, outputs, count, rank), turns)
                    yield row("onednn", model, (inputs, outputs, count, rank, threads), flops, found)
                    for dtype in ("bfloat16", "int8"):
                        found = compare(*narrow_pair(inputs, outputs, count, rank, dtype), turns)
                        yield row(dtype, model, (inputs, outputs, count, rank, threads), flops, found)
                    flops = count * inputs * outputs + 3.0 * count * rank * (inputs + outputs)
                    found = compare(*half_pair(inputs, outputs, count, rank), turns)
                    yield row("half", model, (inputs, outputs, count, rank, threads), flops, found)
                found = compare(*importance_pair(inputs, outputs, rank), turns)
                flops = 6.0 * rank * inputs * outputs
                yield row("importance", model, (inputs, outputs, 0, rank, threads), flops, found)


def row(
    what: str,
    model: str,
    sizes: tuple[int, int, int, int, int],
    flops: float,
    found: tuple[list[float], list[float], float],
) -> Ratio:
    """Returns the row of one comparison."""
    walls, cpus, seconds = found
    low, _, high = statistics.quantiles(walls, n=4)
    wall, cpu = statistics.median(walls), statistics.median(cpus)
    return Ratio(what, model, *sizes, wall, low, high, cpu, seconds * 1e3, flops / seconds / 1e9)


def machine_facts() -> dict[str, object]:
    """Returns what the figures depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "isa": kernels.isa(),
        "torch": torch.__version__,
        "peft": peft.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def geomean(values: list[float]) -> float:
    """Returns the geometric mean."""
    return math.exp(statistics.fmean(math.log(value) for value in values))


SUMMARY = {  # what its rows are -> a field of the JSON
    "layer": "geomean_vs_peft",
    "onednn": "vs_onednn",
    "half": "half_vs_dense",
    "bfloat16": "bfloat16_vs_float32",
    "int8": "int8_vs_float32",
}


def summary(rows: list[Ratio], peaks: dict[int, float]) -> dict[str, dict[str, float]]:
    """Returns the ratios of wall time that the targets are about, by threads and tokens."""
    found: dict[str, dict[str, float]] = {name: {} for name in (*SUMMARY.values(), "min_vs_peft", "peak_fraction")}
    for threads, tokens in sorted({(row.threads, row.tokens) for row in rows if row.what == "layer"}):
        alike = [row for row in rows if (row.threads, row.tokens) == (threads, tokens)]
        key = f"threads={threads} tokens={tokens}"
        for what, name in SUMMARY.items():
            found[name][key] = geomean([row.wall for row in alike if row.what == what])
        layers = [row for row in alike if row.what == "layer"]
        found["min_vs_peft"][key] = min(row.wall for row in layers)
        found["peak_fraction"][key] = geomean([row.gflops for row in layers]) / peaks[threads]
    return found


def print_summary(rows: list[Ratio]) -> None:
    """Prints the geometric mean and the extremes for each number of threads and tokens."""
    for what, threads, tokens in sorted({(row.what, row.threads, row.tokens) for row in rows}):
        chosen = [row for row in rows if (row.what, row.threads, row.tokens) == (what, threads, tokens)]
        walls, cpus = [row.wall for row in chosen], [row.cpu for row in chosen]
        print(
            f"{what:10} threads={threads} T={tokens:<5} wall {geomean(walls):.2f}x (min {min(walls):.2f}, max "
            f"{max(walls):.2f})  cpu {geomean(cpus):.2f}x  {geomean([row.gflops for row in chosen]):.0f} GF/s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows and the machine facts here")
    parser.add_argument("--quick", action="store_true", help="rank 16, fewer turns")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    facts, rows = machine_facts(), []
    ranks = (16,) if options.quick else RANKS
    peaks = {threads: peak_gflops(threads) for threads in options.threads}
    for threads in options.threads:
        for found in measure(threads, options.turns, tuple(options.tokens), ranks):
            rows.append(found)
            print(
                f"{found.what:10} {found.in_features:>4} -> {found.out_features:<4} T={found.tokens:<4} "
                f"r={found.rank:<2} threads={found.threads}  wall {found.wall:.2f}x "
                f"[{found.wall_low:.2f}, {found.wall_high:.2f}]  cpu {found.cpu:.2f}x  "
                f"{found.milliseconds:7.3f} ms  {found.gflops:5.1f} GF/s",
                flush=True,
            )
    print_summary(rows)
    peaks = {threads: max(peak, peak_gflops(threads)) for threads, peak in peaks.items()}
    ratios = summary(rows, peaks)
    for key, fraction in ratios["peak_fraction"].items():
        print(f"{key:24} {fraction:.2f} of the peak of {peaks[int(key.split()[0][8:])]:.0f} GF/s")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        document = {**ratios, "peak_gflops": peaks, "machine": facts, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
