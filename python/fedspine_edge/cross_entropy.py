"""Cross-entropy of a language model's head, which never holds a logit for every token and word.

Comes in: hidden states, the head's frozen weight, and the token each is to predict. Goes out: the mean loss. The tokens
go through in blocks whose logits fit `BLOCK_BYTES`, whatever their number: a block's logits become its loss and, at
once, its gradient, so nothing is saved but one gradient of the size of the hidden states. Blocks of the vocabulary
instead would need every logit twice: a token's softmax is not known before its last block.

Source: Wijmans et al., Cut Your Losses (arXiv 2411.09009), for the aim; csrc/README.md for accumulators.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedspine_edge import reference
from fedspine_edge.backends import BACKENDS, backend
from fedspine_edge.gather import PackedWeight, unpack
from fedspine_edge.tensor_checks import check_tensor

if "native" in BACKENDS:
    from fedspine_edge import _native

__all__ = ["cross_entropy"]

BLOCK_BYTES = 32 << 20  # of logits at a time


def cross_entropy(hidden: Tensor, weight: Tensor | PackedWeight, targets: Tensor) -> Tensor:
    """Returns the mean cross-entropy of softmax(hidden W^T) at the targets, differentiable in `hidden`.

    A weight that takes a gradient is left to plain torch: here it is frozen.

    Args:
        hidden: [T, I], float32, at least one token.
        weight: [V, I], float32 or packed.
        targets: int64 [T], in [0, V).

    Raises:
        ValueError: A tensor is not as described.
    """
    if isinstance(weight, Tensor):
        check_tensor("weight", weight, (None, None))
    classes, width = _sizes(weight)
    check_tensor("hidden", hidden, (None, width))
    _check_targets(targets, len(hidden), classes)
    trained = isinstance(weight, Tensor) and torch.is_grad_enabled() and weight.requires_grad
    if backend() == "reference" or trained:
        return reference.cross_entropy(hidden, weight if isinstance(weight, Tensor) else unpack(weight), targets)
    return cast(Tensor, _CrossEntropy.apply(hidden, weight, targets))  # type: ignore[no-untyped-call]


class _CrossEntropy(torch.autograd.Function):
    """Saves the gradient, which is there once the loss is."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor | PackedWeight, targets: Tensor) -> Tensor:
        needs_gradient, tokens = ctx.needs_input_grad[0], len(hidden)
        gradient = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs_gradient else None
        losses, hidden, targets = torch.empty(tokens), hidden.contiguous(), targets.contiguous()
        classes, _ = _sizes(weight)
        block = max(1, min(tokens, BLOCK_BYTES // (4 * classes)))
        logits = torch.empty(block, classes)
        for begin in range(0, tokens, block):
            rows = slice(begin, min(begin + block, tokens))
            part = logits[: rows.stop - begin]
            _fill_logits(hidden[rows], weight, part)
            addresses = (part.data_ptr(), targets[rows].data_ptr(), 1 / tokens, losses[rows].data_ptr())
            _native.cross_entropy(len(part), classes, *addresses, torch.get_num_threads())
            if gradient is not None:
                _fill_gradient(part, weight, gradient[rows])
        ctx.save_for_backward(gradient)
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * dloss, None, None


def _sizes(weight: Tensor | PackedWeight) -> tuple[int, int]:
    """Classes and width."""
    return (len(weight), weight.shape[1]) if isinstance(weight, Tensor) else (weight.out_features, weight.in_features)


def _fill_logits(hidden: Tensor, weight: Tensor | PackedWeight, logits: Tensor) -> None:
    if isinstance(weight, Tensor):
        torch.mm(hidden, weight.T, out=logits)
        return
    sizes = (len(hidden), weight.in_features, weight.out_features, 0)
    out, threads = logits.data_ptr(), torch.get_num_threads()
    _native.lora_linear_forward(*sizes, hidden.data_ptr(), weight.native(), 0, 0, 0, 1.0, out, 0, 0, 0, threads)


def _fill_gradient(dlogits: Tensor, weight: Tensor | PackedWeight, dhidden: Tensor) -> None:
    if isinstance(weight, Tensor):
        torch.mm(dlogits, weight, out=dhidden)
        return
    sizes = (len(dlogits), weight.in_features, weight.out_features, 0)
    out, threads = dhidden.data_ptr(), torch.get_num_threads()
    _native.lora_linear_backward(*sizes, dlogits.data_ptr(), 0, weight.native(), 0, 0, 0, 1.0, out, 0, 0, 0, 0, threads)


def _check_targets(targets: Tensor, tokens: int, classes: int) -> None:
    if targets.dtype != torch.int64 or targets.device.type != "cpu" or targets.shape != (tokens,):
        found = f"{str(targets.dtype).removeprefix('torch.')} of shape {list(targets.shape)}"
        raise ValueError(f"expected targets as int64 on cpu of shape [{tokens}], found {found}")
    if tokens == 0 or classes == 0:
        raise ValueError(f"expected at least one token and one class, found {tokens} and {classes}")
    low, high = (int(end) for end in targets.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(f"expected targets within [0, {classes}), found {low}..{high}")
