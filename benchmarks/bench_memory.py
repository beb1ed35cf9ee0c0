"""Peak memory of one local round: pruned to 50 %, unpruned, and peft + torch, each in a fresh process, in turn.

    python benchmarks/bench_memory.py [--model minilm-l6] [--json FILE]

The unpruned round is HetLoRA's (LoRA of the device's rank on every prunable matrix, nothing removed). All three train
on the same batches of TREC-6. What counts is the peak resident memory of the process, libraries included.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path

VARIANTS = ("pruned", "unpruned", "peft")
RANK, BATCH, STEPS = 8, 16, 12


def one_round(model: str, variant: str) -> int:
    """Trains one round in this process and returns its peak resident memory in bytes."""
    import numpy as np
    import torch

    from fedspine_edge.batches import Encoding, training_batches
    from fedspine_edge.config import cache_directory
    from fedspine_edge.data import load_examples
    from fedspine_edge.hardware import peak_memory_bytes, reset_peak_memory
    from fedspine_edge.lora import fresh_factors
    from fedspine_edge.masks import choose
    from fedspine_edge.shrink import slice_factors
    from fedspine_edge.sources import model_directory
    from fedspine_edge.tuning import loss_of, tune
    from fedspine_edge.workbench import keep_all, open_workbench

    torch.set_num_threads(1)
    path = model_directory(model, cache_directory())
    examples = load_examples("trec6")[:512]
    classes = tuple(sorted({example.label for example in examples}))
    bench = open_workbench(path, sha256="0" * 64, num_labels=len(classes), choices=None) if variant != "peft" else None
    from transformers import AutoTokenizer

    decoder = model.startswith("smollm")
    encoding = Encoding(AutoTokenizer.from_pretrained(path), classes, "Question: {text}\nType:" if decoder else None)
    tokens = encoding.encode(examples)
    batches = list(training_batches(tokens, batch_size=BATCH, num_batches=STEPS, seed=0))
    if bench is None:
        peft_round(path, batches, len(classes), decoder, loss_of)
        return peak_memory_bytes()
    layout = bench.layout
    generator = torch.Generator().manual_seed(0)
    factors = {m.name: fresh_factors(m.out_features, m.in_features, RANK, generator) for m in layout.matrices}
    keep = keep_all(layout)
    if variant == "pruned":
        scores = {g.name: np.random.default_rng(0).random(g.num_members) for g in layout.groups}
        keep = choose(layout, scores, pruning_ratio=0.5, mode="per-layer")
    reset_peak_memory()
    shrunk = bench.fit(keep, slice_factors(layout, factors, keep_all(layout), keep), scaling=2.0, mean_inputs={})
    tune(shrunk, batches, learning_rate=1e-3, prune_interval=STEPS, narrower=lambda done, meter: None)
    return peak_memory_bytes()


def peft_round(path: Path, batches: list, num_labels: int, decoder: bool, loss_of) -> None:
    """The same steps with peft on the same matrices."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if decoder:
        model = AutoModelForCausalLM.from_pretrained(path)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    else:
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=num_labels)
        targets = ["query", "key", "value", "dense"]
    tuned = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, lora_dropout=0.0))
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-3, fused=True)
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        print(one_round(arguments.model, arguments.variant))
        return
    samples: dict[str, list[int]] = {variant: [] for variant in VARIANTS}
    for _ in range(arguments.turns):
        for variant in VARIANTS:
            command = [sys.executable, __file__, "--model", arguments.model, "--variant", variant]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            samples[variant].append(int(done.stdout.split()[-1]))
    medians = {variant: statistics.median(values) for variant, values in samples.items()}
    print(f"{arguments.model}, rank {RANK}, batch {BATCH}, {STEPS} steps, 1 thread, median of {arguments.turns}")
    for variant, median in medians.items():
        spread = (max(samples[variant]) - min(samples[variant])) / median
        share = median / medians["unpruned"]
        print(f"{variant:9} {median / 2**20:7.0f} MiB  {share:.2f} of unpruned  spread {spread:.1%}")
    if arguments.json:
        from fedspine_edge.hardware import this_machine

        document = {"model": arguments.model, "machine": dataclasses.asdict(this_machine()), "peak_bytes": samples}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
