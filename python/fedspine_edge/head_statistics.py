"""What a task head can be solved from without a gradient: sums over the inputs of its last linear layer.

Comes in: the base model and a device's own examples. Goes out: how many examples of each class there are, the sums of
their inputs and the mean outer product, from one forward pass of the base without its adapter. A few hundred kB,
whatever the data; of a class with one example the sum is that example's features.

Source: Fed3R (Fani et al., ICML 2024, arXiv 2406.01116) and FedNCM (Legate et al., NeurIPS 2023) sum features over
clients in one round; the bound on the examples of a device is ours.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedspine_edge.batches import TokenSet, collate
from fedspine_edge.errors import IncompatibleError
from fedspine_edge.masks import keep_all
from fedspine_edge.protocol import MAX_HEAD_EXAMPLES, Assignment, Layout, head_linear
from fedspine_edge.update import load_task_head
from fedspine_edge.workbench import Workbench

LOWEST_FLOAT16, HIGHEST_FLOAT16 = -65504.0, 65504.0


@torch.no_grad()
def head_statistics(
    bench: Workbench, assignment: Assignment, examples: TokenSet
) -> tuple[dict[str, np.ndarray], float, int]:
    """Returns a device's sums, the mean loss with the assigned task head, and how many batches that took.

    Args:
        bench: The base model, opened; its prunable layers are set anew, without an adapter.
        assignment: Its seed draws the examples where there are more than `MAX_HEAD_EXAMPLES`.
        examples: The device's own examples, at least one.

    Raises:
        IncompatibleError: The base model has no task head.

    Returns:
        `head_statistics/counts` int32 [C]; `head_statistics/sums` float16 [C, d], a class's inputs summed and divided
        by the number of examples; `head_statistics/products` float16 [d (d + 1) / 2], the lower triangle of the mean
        outer product. Mean loss. Number of batches.
    """
    layout, head = bench.layout, head_linear(bench.layout)
    if head is None:
        raise IncompatibleError("expected a base model with a task head, found a decoder")
    bench.fit(keep_all(layout), no_factors(layout), scaling=1.0, mean_inputs={})
    load_task_head(bench.model, assignment)
    chosen = np.random.default_rng(assignment.seed).permutation(len(examples))[:MAX_HEAD_EXAMPLES]
    counts, sums = torch.zeros(head.num_classes), torch.zeros(head.num_classes, head.width)
    products = torch.zeros(head.width, head.width)
    seen: list[Tensor] = []
    watch = bench.model.get_submodule(head.name).register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    total, num_batches = 0.0, 0
    try:
        for start in range(0, len(chosen), assignment.batch_size):
            batch = collate(examples, chosen[start : start + assignment.batch_size])
            logits = bench.model(input_ids=batch.input_ids, attention_mask=batch.valid).logits
            total += float(functional.cross_entropy(logits, batch.labels, reduction="sum"))
            inputs, one_hot = seen.pop(), functional.one_hot(batch.labels, head.num_classes).float()
            counts += one_hot.sum(0)
            sums += one_hot.T @ inputs
            products += inputs.T @ inputs
            num_batches += 1
    finally:
        watch.remove()
    lower = torch.tril_indices(head.width, head.width)
    arrays = {
        "head_statistics/counts": counts.numpy().astype(np.int32),
        "head_statistics/sums": _half(sums / len(chosen)),
        "head_statistics/products": _half(products[lower[0], lower[1]] / len(chosen)),
    }
    return arrays, total / len(chosen), num_batches


def no_factors(layout: Layout) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns LoRA factors of rank 1 that change nothing."""
    return {m.name: (torch.zeros(1, m.in_features), torch.zeros(m.out_features, 1)) for m in layout.matrices}


def _half(values: Tensor) -> np.ndarray:
    return values.clamp(LOWEST_FLOAT16, HIGHEST_FLOAT16).numpy().astype(np.float16)
