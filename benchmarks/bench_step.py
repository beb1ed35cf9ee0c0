"""Times a whole training step, tokens in and LoRA updated: ours, ours pruned, and peft on torch.

    python benchmarks/bench_step.py [--case NAME...] [--threads 1 2] [--turns 9] [--json FILE] [--plot FILE]

Cases: `trec` trains on TREC-6 as it is (8 rows of some 20 tokens; of a decoder, the answer is learnt); `full` on rows
of 128 random tokens, 8 for SmolLM2, which learns each of them, and 16 for MiniLM.

All train on the same batches, with LoRA on the same matrices, no dropout and the same AdamW, in one process and in
turns; each turn gives one ratio, so drift of the machine cancels. Before anything is timed, ours and peft, given the
same factors, are asserted to agree on the loss and on what a step does to it. What the forward leaves allocated for the
backward is read from the allocator; peak resident memory is of a process of its own for each. `importance_share` is
what measuring the importance adds to a step, as often as a round does it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SPARSITY = {"quarter": 0.25, "half": 0.5, "most": 0.75}
VARIANTS = ("peft", "ours", *SPARSITY)
NARROW = {"half_bfloat16": ("half", "bfloat16"), "half_int8": ("half", "int8")}  # measured for memory alone
CASES = {
    "smollm2-135m trec": ("smollm2-135m", 8, None),
    "smollm2-135m full": ("smollm2-135m", 8, 128),
    "minilm-l6 trec": ("minilm-l6", 8, None),
    "minilm-l6 full": ("minilm-l6", 16, 128),
}
RANK, SCALING, NUM_BATCHES = 16, 2.0, 4
MEMORY_STEPS = 3
PROMPT = "Question: {text}\nType:"
Quartiles = dict[str, float]


@dataclasses.dataclass
class Trainee:
    """A model in training.

    Attributes:
        model: The transformers model.
        optimizer: Over what is trained of it.
        shrunk: Ours, with what it keeps.
    """

    model: Any
    optimizer: Any
    shrunk: Any = None

    def loss(self, batch: Any) -> Any:
        """Returns the mean loss of a batch: ours as a local round computes it, peft's from all its logits."""
        from torch.nn import functional

        from fedspine_edge.tuning import loss_of

        if self.shrunk is not None or not len(batch.answer_ids):
            return loss_of(self.model, batch)
        hidden = self.model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        logits = self.model.get_output_embeddings()(hidden[batch.answer_rows, batch.answer_columns])
        return functional.cross_entropy(logits, batch.answer_ids)

    def step(self, batch: Any) -> float:
        """Returns the loss before the step."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def full_batches(num_rows: int, width: int, *, vocabulary: int, decoder: bool) -> list[Any]:
    """Returns batches of random tokens without padding; of a decoder's rows every token is learnt."""
    import torch

    from fedspine_edge.batches import Batch

    generator, none = torch.Generator().manual_seed(0), torch.zeros(0, dtype=torch.int64)
    batches = []
    for _ in range(NUM_BATCHES):
        ids = torch.randint(0, vocabulary, (num_rows, width + 1), generator=generator)
        rows, columns = torch.arange(num_rows).repeat_interleave(width), torch.arange(width).repeat(num_rows)
        answers = (rows, columns, ids[:, 1:].reshape(-1)) if decoder else (none, none, none)
        labels = torch.arange(num_rows) % 6
        batches.append(Batch(ids[:, :width], torch.ones(num_rows, width, dtype=torch.bool), labels, *answers))
    return batches


def build(case: str) -> tuple[list[Any], Callable[[str], Trainee]]:
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

    model, num_rows, width = CASES[case]
    path = model_directory(model, cache_directory())
    decoder = model.startswith("smollm")
    examples = load_examples("trec6")[:256]
    classes, tokenizer = tuple(sorted({one.label for one in examples})), AutoTokenizer.from_pretrained(path)
    if width is None:
        tokens = Encoding(tokenizer, classes, PROMPT if decoder else None).encode(examples)
        batches = list(training_batches(tokens, batch_size=num_rows, num_batches=NUM_BATCHES, seed=0))
    else:
        batches = full_batches(num_rows, width, vocabulary=tokenizer.vocab_size, decoder=decoder)

    def trainee(variant: str) -> Trainee:
        variant, dtype = NARROW.get(variant, (variant, "float32"))
        opened = open_workbench(path, sha256="0" * 64, num_labels=len(classes), choices=None)
        bench = dataclasses.replace(opened, base_dtype=dtype)
        layout, keep = bench.layout, keep_all(bench.layout)
        generator = torch.Generator().manual_seed(0)
        factors = {
            m.name: (
                torch.randn(RANK, m.in_features, generator=generator) * m.in_features**-0.5,
                torch.randn(m.out_features, RANK, generator=generator) * 0.01,
            )
            for m in layout.matrices
        }
        shrunk = None
        if variant == "peft":
            tuned = with_peft(path, layout, factors, bench.model, len(classes), decoder=decoder)
        else:
            if variant in SPARSITY:
                scores = {g.name: np.random.default_rng(0).random(g.num_members) for g in layout.groups}
                keep = choose(layout, scores, pruning_ratio=SPARSITY[variant], mode="per-layer")
            narrow = slice_factors(layout, factors, keep_all(layout), keep)
            shrunk = bench.fit(keep, narrow, scaling=SCALING, mean_inputs={})
            tuned = shrunk.model
        optimizer = torch.optim.AdamW(trainable_parameters(tuned), lr=1e-4, weight_decay=0.0, fused=True)
        return Trainee(tuned, optimizer, shrunk)

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


def saved_bytes(trainee: Trainee, batch: Any) -> int:
    """Returns what a forward leaves allocated until the backward."""
    from fedspine_edge.commands.plan import held_bytes

    trainee.step(batch)
    before = held_bytes()
    loss = trainee.loss(batch)
    held = held_bytes() - before
    loss.backward()
    return held


def peak_bytes(case: str, variant: str) -> int:
    """Returns the peak resident memory of some steps, in this process."""
    import torch

    from fedspine_edge.hardware import peak_memory_bytes, reset_peak_memory

    torch.set_num_threads(1)
    batches, trainee_of = build(case)
    trainee = trainee_of(variant)
    reset_peak_memory()
    for batch in batches[:MEMORY_STEPS]:
        trainee.step(batch)
    return peak_memory_bytes()


def peak_in_own_process(case: str, variant: str) -> int:
    """The same, in a fresh process."""
    command = [sys.executable, __file__, "--case", case, "--variant", variant]
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
        for variant in order[turn % len(order) :] + order[: turn % len(order)]:
            start = time.perf_counter()
            trainees[variant].step(batches[turn % len(batches)])
            seconds[variant].append(time.perf_counter() - start)
    return seconds


def importance_seconds(trainee: Trainee) -> float:
    """Returns the median wall seconds that measuring the importance takes a step of a round."""
    from fedspine_edge.importance import ImportanceMeter
    from fedspine_edge.tuning import IMPORTANCE_EVERY

    meter, shrunk, seconds = ImportanceMeter(), trainee.shrunk, []
    for _ in range(5):
        start = time.perf_counter()
        meter.measure(shrunk.layout, shrunk.linears, shrunk.keep)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) / IMPORTANCE_EVERY


def measure(case: str, threads: list[int], turns: int, report: dict[str, Any]) -> None:
    """Adds one case's figures to the report and prints them."""
    import torch

    torch.set_num_threads(1)
    batches, trainee_of = build(case)
    trainees = {variant: trainee_of(variant) for variant in VARIANTS}
    assert_agreement(trainees["ours"], trainees["peft"], batches[0])
    saved = {variant: saved_bytes(trainee, batches[0]) for variant, trainee in trainees.items()}
    report["saved_bytes"][case] = saved
    report["saved_bytes_ratio"][case] = saved["ours"] / saved["peft"]
    for count in threads:
        torch.set_num_threads(count)
        for trainee in trainees.values():
            trainee.step(batches[0])
        seconds = time_in_turns(trainees, batches, turns)
        key = f"{case} threads={count}"
        pairs = [("vs_peft", "peft", "ours")]
        pairs += [(f"{name}_vs_dense", "ours", name) for name in SPARSITY]
        pairs += [(f"{name}_vs_peft", "peft", name) for name in SPARSITY]
        ratios = {
            name: quartiles([a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)])
            for name, slow, fast in pairs
        }
        for name, found in ratios.items():
            report[name][key] = found
        share = importance_seconds(trainees["ours"]) / statistics.median(seconds["ours"])
        report["importance_share"][key] = share
        report["step_seconds"][key] = {variant: quartiles(values) for variant, values in seconds.items()}
        texts = [f"{name} {r['median']:.2f}x [{r['low']:.2f}, {r['high']:.2f}]" for name, r in ratios.items()]
        medians = [f"{variant} {statistics.median(values) * 1e3:.0f} ms" for variant, values in seconds.items()]
        print(f"{key:28} {'  '.join(texts)}  importance {share:.1%}   {', '.join(medians)}", flush=True)
    texts = [f"{variant} {held / 2**20:.0f} MiB" for variant, held in saved.items()]
    print(f"{case:28} saved_bytes_ratio {saved['ours'] / saved['peft']:.2f}   {', '.join(texts)}", flush=True)


def plot(report: dict[str, Any]) -> str:
    """Returns an SVG of how much faster a step is than peft's, against the sparsity."""
    colours = ("#0b6e4f", "#c1440e", "#2b59c3", "#8a5a00")
    points = [(0.0, "vs_peft"), *((ratio, f"{name}_vs_peft") for name, ratio in SPARSITY.items())]
    lines = {key: [(ratio, report[name][key]["median"]) for ratio, name in points] for key in report["vs_peft"]}
    top = max(2.0, *(speed for line in lines.values() for _, speed in line)) * 1.1

    def place(ratio: float, speed: float) -> tuple[float, float]:
        return 60 + 420 * ratio / 0.8, 320 - 280 * speed / top

    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 370" font-family="sans-serif" font-size="12">']
    for step in range(int(top) + 1):
        x, y = place(0.0, step)
        parts.append(f'<path d="M{x} {y:.1f}H480" stroke="#ddd"/><text x="40" y="{y + 4:.1f}">{step}</text>')
    for ratio, _ in points:
        parts.append(f'<text x="{place(ratio, 0)[0] - 10:.1f}" y="338">{ratio:.2f}</text>')
    for index, (key, line) in enumerate(lines.items()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        colour, dash = colours[index // 2 % 4], "" if index % 2 == 0 else ' stroke-dasharray="5 3"'
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        parts.append(f'<text x="488" y="{40 + 18 * index}" fill="{colour}" font-size="10">{key}</text>')
    parts.append('<text x="60" y="20">speed of a step; peft + torch, dense = 1 (dashed: every other key)</text>')
    parts.append('<text x="170" y="360">sparsity of the prunable weights</text></svg>')
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--json", type=Path, help="add the cases' figures and the machine's facts to this file")
    parser.add_argument("--plot", type=Path, help="draw the ratio against the sparsity into this SVG")
    parser.add_argument("--variant", choices=(*VARIANTS, *NARROW), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        print(peak_bytes(options.case[0], options.variant))
        return
    report = json.loads(options.json.read_text()) if options.json and options.json.is_file() else {}
    ratios = ("vs_peft", *(f"{name}_vs_{whom}" for whom in ("dense", "peft") for name in SPARSITY))
    thinner = ("half", *NARROW)
    keys = (*ratios, "saved_bytes_ratio", "rss_ratio", *(f"{variant}_rss_ratio" for variant in thinner))
    for key in (*keys, "importance_share", "step_seconds", "saved_bytes", "peak_bytes"):
        report.setdefault(key, {})
    for case in options.case:
        peaks = {variant: peak_in_own_process(case, variant) for variant in ("peft", "ours", *thinner)}
        report["peak_bytes"][case] = peaks
        report["rss_ratio"][case] = peaks["ours"] / peaks["peft"]
        for variant in thinner:
            report[f"{variant}_rss_ratio"][case] = peaks[variant] / peaks["peft"]
        texts = [f"{variant} {peak / 2**20:.0f} MiB" for variant, peak in peaks.items()]
        print(f"{case:28} rss_ratio {report['rss_ratio'][case]:.2f}   {', '.join(texts)}", flush=True)
        measure(case, options.threads, options.turns, report)
    if options.json:
        from fedspine_edge.hardware import this_machine

        document = {**report, "machine": dataclasses.asdict(this_machine())}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    if options.plot:
        options.plot.write_text(plot(report))


if __name__ == "__main__":
    main()
