"""Times a whole training step, tokens in and LoRA updated: ours, ours at 50 % sparsity, and peft on torch.

    python benchmarks/bench_step.py [--model smollm2-135m minilm-l6] [--threads 1 2] [--turns 9] [--json FILE]

All three train on the same batches of TREC-6, with LoRA on the same matrices, no dropout and the same AdamW, in one
process and in turns; each turn gives one ratio, so drift of the machine cancels. Before anything is timed, ours and
peft, given the same factors, are asserted to agree on the loss and on what a step does to it. What the forward leaves
allocated for the backward is read from the allocator; peak resident memory is of a process of its own for each.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIANTS = ("peft", "ours", "half")
PACKAGED = ("smollm2-135m", "minilm-l6")
RANK, SCALING, BATCH, NUM_BATCHES = 16, 2.0, 8, 4
MEMORY_STEPS = 3
PROMPT = "Question: {text}\nType:"
Quartiles = dict[str, float]


@dataclasses.dataclass
class Trainee:
    """A model in training.

    Attributes:
        model: The transformers model.
        optimizer: Over what is trained of it.
    """

    model: Any
    optimizer: Any

    def loss(self, batch: Any) -> Any:
        """Returns the mean loss of a batch, as a local round computes it."""
        from fedspine_edge.tuning import loss_of

        return loss_of(self.model, batch)

    def step(self, batch: Any) -> float:
        """Returns the loss before the step."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def build(model: str) -> tuple[list[Any], Callable[[str], Trainee]]:
    """Returns the batches, and what makes a trainee of a variant; all start from the same factors."""
    import numpy as np
    import torch
    from transformers import AutoTokenizer

    from fedspine_edge.batches import Encoding, training_batches
    from fedspine_edge.config import cache_directory
    from fedspine_edge.data import load_examples
    from fedspine_edge.lora import trainable_parameters
    from fedspine_edge.masks import choose, keep_all
    from fedspine_edge.shrink import slice_factors
    from fedspine_edge.sources import model_directory
    from fedspine_edge.workbench import open_workbench

    path = model_directory(model, cache_directory())
    decoder = model.startswith("smollm")
    examples = load_examples("trec6")[:256]
    classes = tuple(sorted({example.label for example in examples}))
    encoding = Encoding(AutoTokenizer.from_pretrained(path), classes, PROMPT if decoder else None)
    tokens = encoding.encode(examples)
    batches = list(training_batches(tokens, batch_size=BATCH, num_batches=NUM_BATCHES, seed=0))

    def trainee(variant: str) -> Trainee:
        bench = open_workbench(path, sha256="0" * 64, num_labels=len(classes), choices=None)
        layout, keep = bench.layout, keep_all(bench.layout)
        generator = torch.Generator().manual_seed(0)
        factors = {
            m.name: (
                torch.randn(RANK, m.in_features, generator=generator) * m.in_features**-0.5,
                torch.randn(m.out_features, RANK, generator=generator) * 0.01,
            )
            for m in layout.matrices
        }
        if variant == "peft":
            tuned = with_peft(path, layout, factors, bench.model, len(classes), decoder=decoder)
        else:
            if variant == "half":
                scores = {g.name: np.random.default_rng(0).random(g.num_members) for g in layout.groups}
                keep = choose(layout, scores, pruning_ratio=0.5, mode="per-layer")
            narrow = slice_factors(layout, factors, keep_all(layout), keep)
            tuned = bench.fit(keep, narrow, scaling=SCALING, mean_inputs={}).model
        optimizer = torch.optim.AdamW(trainable_parameters(tuned), lr=1e-4, weight_decay=0.0, fused=True)
        return Trainee(tuned, optimizer)

    return batches, trainee


def with_peft(path: Path, layout: Any, factors: Any, ours: Any, num_labels: int, *, decoder: bool) -> Any:
    """Returns the model with peft's LoRA of the same factors on the same matrices, and the same task head."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if decoder:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32, num_labels=num_labels)
    names = [matrix.name for matrix in layout.matrices]
    get_peft_model(model, LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules=names, lora_dropout=0.0))
    head = {name: value for name, value in ours.named_parameters() if name in dict(layout.task_head)}
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, (lora_a, lora_b) in factors.items():
            layer = model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(lora_a)
            layer.lora_B["default"].weight.copy_(lora_b)
        for name, value in head.items():
            parameters[name].copy_(value)
            parameters[name].requires_grad_(True)
    return model.eval()


def assert_agreement(ours: Trainee, peft: Trainee, batch: Any) -> None:
    """Refuses to time two things that are not the same: the loss before a step and after it."""
    for when in ("before", "after"):
        found, expected = ours.step(batch), peft.step(batch)
        assert abs(found - expected) <= 1e-4 * abs(expected), f"{when} a step: ours {found}, peft {expected}"


def held_bytes() -> int:
    """Returns what the C allocator has given out and not got back."""
    counts = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")

    class Mallinfo2(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in counts]

    function = ctypes.CDLL(None).mallinfo2
    function.restype = Mallinfo2
    found = function()
    return int(found.uordblks + found.hblkhd)


def saved_bytes(trainee: Trainee, batch: Any) -> int:
    """Returns what a forward leaves allocated until the backward."""
    trainee.step(batch)
    before = held_bytes()
    loss = trainee.loss(batch)
    held = held_bytes() - before
    loss.backward()
    return held


def peak_bytes(model: str, variant: str) -> int:
    """Returns the peak resident memory of some steps, in this process."""
    import torch

    from fedspine_edge.hardware import peak_memory_bytes, reset_peak_memory

    torch.set_num_threads(1)
    batches, trainee_of = build(model)
    trainee = trainee_of(variant)
    reset_peak_memory()
    for batch in batches[:MEMORY_STEPS]:
        trainee.step(batch)
    return peak_memory_bytes()


def peak_in_own_process(model: str, variant: str) -> int:
    """The same, in a fresh process."""
    command = [sys.executable, __file__, "--model", model, "--variant", variant]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def quartiles(values: list[float]) -> Quartiles:
    """Returns the median with the quartiles on both sides."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def time_in_turns(trainees: dict[str, Trainee], batches: list[Any], turns: int) -> dict[str, list[float]]:
    """Returns each variant's wall seconds of a step, turn by turn; the order rotates."""
    seconds: dict[str, list[float]] = {variant: [] for variant in trainees}
    order = list(trainees)
    for turn in range(turns):
        for variant in order[turn % 3 :] + order[: turn % 3]:
            start = time.perf_counter()
            trainees[variant].step(batches[turn % len(batches)])
            seconds[variant].append(time.perf_counter() - start)
    return seconds


def measure(model: str, threads: list[int], turns: int, report: dict[str, Any]) -> None:
    """Adds one model's figures to the report and prints them."""
    import torch

    torch.set_num_threads(1)
    batches, trainee_of = build(model)
    trainees = {variant: trainee_of(variant) for variant in VARIANTS}
    assert_agreement(trainees["ours"], trainees["peft"], batches[0])
    saved = {variant: saved_bytes(trainee, batches[0]) for variant, trainee in trainees.items()}
    report["saved_bytes_ratio"][model] = saved["ours"] / saved["peft"]
    for count in threads:
        torch.set_num_threads(count)
        for trainee in trainees.values():
            trainee.step(batches[0])
        seconds = time_in_turns(trainees, batches, turns)
        key = f"{model} threads={count}"
        ratios = {
            name: quartiles([a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)])
            for name, slow, fast in (("vs_peft", "peft", "ours"), ("half_vs_dense", "ours", "half"))
        }
        for name, found in ratios.items():
            report[name][key] = found
        report["step_seconds"][key] = {variant: quartiles(values) for variant, values in seconds.items()}
        texts = [f"{name} {r['median']:.2f}x [{r['low']:.2f}, {r['high']:.2f}]" for name, r in ratios.items()]
        medians = [f"{variant} {statistics.median(values) * 1e3:.0f} ms" for variant, values in seconds.items()]
        print(f"{key:26} {'  '.join(texts)}   {', '.join(medians)}", flush=True)
    texts = [f"{variant} {held / 2**20:.0f} MiB" for variant, held in saved.items()]
    print(f"{model:26} saved_bytes_ratio {saved['ours'] / saved['peft']:.2f}   {', '.join(texts)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=list(PACKAGED))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write all figures and the machine's facts here")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        print(peak_bytes(options.model[0], options.variant))
        return
    keys = ("vs_peft", "half_vs_dense", "saved_bytes_ratio", "rss_ratio", "step_seconds", "peak_bytes")
    report: dict[str, Any] = {key: {} for key in keys}
    for model in options.model:
        peaks = {variant: peak_in_own_process(model, variant) for variant in VARIANTS}
        report["peak_bytes"][model] = peaks
        report["rss_ratio"][model] = peaks["ours"] / peaks["peft"]
        texts = [f"{variant} {peak / 2**20:.0f} MiB" for variant, peak in peaks.items()]
        print(f"{model:26} rss_ratio {report['rss_ratio'][model]:.2f}   {', '.join(texts)}", flush=True)
        measure(model, options.threads, options.turns, report)
    if options.json:
        from fedspine_edge.hardware import this_machine

        document = {"machine": dataclasses.asdict(this_machine()), **report}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
