"""What a layer's forward leaves in memory until its backward, operation by operation.

Comes in: a layer's widths. Goes out: float32 numbers a token. This table is the only place that knows what our
operations save: whoever changes what one saves (in `fused`, `kernels`, `elementwise`) changes its row, and
tests/edge/test_memory_plan.py compares the sum with what the allocator gave out.

Source: the `save_for_backward` of each operation; arXiv 2205.05198 for the way of counting.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerWidths:
    """The widths of one layer, as they are after pruning.

    Attributes:
        hidden: Residual width.
        query: Features of all query heads.
        key: Features of all key heads, and of all value heads.
        heads: Query heads.
        channels: FFN channels.
        rank: LoRA rank.
        tokens: Tokens of one text, for what is kept for each pair of them.
    """

    hidden: int
    query: int
    key: int
    heads: int
    channels: int
    rank: int
    tokens: int


Floats = Callable[[LayerWidths], float]

_ATTENTION: dict[str, Floats] = {
    "q, k, v: x A^T of each": lambda w: 3 * w.rank,
    "attention: q, k, v, its output, a log-sum a head": lambda w: 2 * w.query + 2 * w.key + w.heads,
    "o: x A^T": lambda w: w.rank,
}
DECODER: dict[str, Floats] = {
    "two RMSNorms: the residual stream they read, 1 / rms": lambda w: 2 * (w.hidden + 1),
    **_ATTENTION,
    "gate, up: x A^T of each": lambda w: 2 * w.rank,
    "SwiGLU: gate, up as bfloat16": lambda w: w.channels,
    "down: x A^T": lambda w: w.rank,
}
ENCODER: dict[str, Floats] = {
    **_ATTENTION,
    "two LayerNorms: input as bfloat16, 1 / deviation": lambda w: 2 * (w.hidden / 2 + 1),
    "FFN in: x A^T": lambda w: w.rank,
    "GELU: its input as bfloat16": lambda w: w.channels / 2,
    "FFN out: x A^T": lambda w: w.rank,
}
NODES_BYTES = {"decoder": 56 << 10, "classifier": 24 << 10}
"""What does not grow with the tokens, a layer: autograd's nodes, C++ and Python; measured on tiny models."""


def saved_floats(widths: LayerWidths, table: dict[str, Floats]) -> float:
    """Returns the float32 numbers that a layer saves for each token."""
    return sum(floats(widths) for floats in table.values())
