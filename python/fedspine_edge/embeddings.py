"""Token embedding and language head on one packed, frozen weight in bfloat16 or int8.

Comes in: a model and where its base weights come from. Goes out: the same model, whose embedding looks rows up in the
panels that its head multiplies by; of float32 weights, the modules that transformers made.

Source: csrc/packed_weight.h for the panels; Press and Wolf (arXiv 1608.05859) for tying the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fedspine_edge import kernels
from fedspine_edge.lora import replace_module
from fedspine_edge.reference import PANEL_WIDTH


class PackedEmbedding(nn.Module):
    """Rows of a packed weight [V, I], in the place of an `nn.Embedding`."""

    def __init__(self, packed: kernels.PackedWeight) -> None:
        super().__init__()
        self.packed = packed

    def forward(self, token_ids: Tensor) -> Tensor:
        """Returns float32 [..., I] for int64 [...]."""
        panel, lane = token_ids // PANEL_WIDTH, token_ids % PANEL_WIDTH
        rows = self.packed.panels[panel, :, lane].float()
        return rows if self.packed.scales is None else rows * self.packed.scales[panel, lane, None]


class PackedHead(nn.Module):
    """Logits from a packed weight [V, I], in the place of a language model's `nn.Linear`."""

    def __init__(self, packed: kernels.PackedWeight) -> None:
        super().__init__()
        self.packed = packed

    @property
    def weight(self) -> kernels.PackedWeight:
        """The weight, as `cross_entropy` takes it."""
        return self.packed

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns float32 [..., V] for float32 [..., I]."""
        return kernels.lora_linear(hidden, self.packed, bias=None, lora_a=None, lora_b=None, scaling=1.0)


def hold_embeddings(model: Any, read: Callable[[str], Tensor], dtype: str) -> None:
    """Holds a model's token embedding, and a decoder's head, in one of `kernels.BASE_DTYPES`.

    Args:
        model: The transformers model; what is held so already is left alone.
        read: Module path -> its base weight, float32.
        dtype: How.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if _dtype_of(embedding) == dtype:
        return
    paths = {module: path for path, module in model.named_modules()}
    where, head_at = paths[embedding], None if head is None else paths[head]
    del embedding, head, paths
    replace_module(model, where, nn.Identity())  # no two of them in memory at once
    if head_at is not None:
        replace_module(model, head_at, nn.Identity())
    weight = _held(read(where), dtype)
    replace_module(model, where, _embedding(weight))
    if head_at is not None:
        tied = bool(getattr(model.config, "tie_word_embeddings", False))
        replace_module(model, head_at, _head(weight if tied else _held(read(head_at), dtype)))


def _dtype_of(embedding: nn.Module) -> str | None:
    """None when an earlier reading failed and left nothing in its place."""
    if isinstance(embedding, PackedEmbedding):
        return embedding.packed.dtype
    return "float32" if isinstance(embedding, nn.Embedding) else None


def _held(weight: Tensor, dtype: str) -> Tensor | kernels.PackedWeight:
    return nn.Parameter(weight, requires_grad=False) if dtype == "float32" else kernels.pack(weight, dtype=dtype)


def _embedding(weight: Tensor | kernels.PackedWeight) -> nn.Module:
    if isinstance(weight, kernels.PackedWeight):
        return PackedEmbedding(weight)
    embedding = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
    embedding.weight = weight
    return embedding


def _head(weight: Tensor | kernels.PackedWeight) -> nn.Module:
    if isinstance(weight, kernels.PackedWeight):
        return PackedHead(weight)
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    head.weight = weight
    return head
