"""The one door to the native kernels: checks shapes, dtypes and devices, then calls `_native` or `reference`.

Tensors are float32 on the CPU. A frozen base weight is packed once (`pack`, in `gather`), in float32 or fewer bits, and
then serves the forward and the backward of `lora_linear` and the `importance` of its members. Without the extension
everything works in plain torch, slower; `backend()` says which it is. The number of threads is torch's.

Source: FedSpine (arXiv 2501.02438); csrc/README.md for layout and accumulators.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedspine_edge import reference
from fedspine_edge.backends import BACKENDS, available_isas, backend, isa, use_backend, use_isa
from fedspine_edge.dropout import Dropout
from fedspine_edge.dtypes import BASE_DTYPES
from fedspine_edge.gather import PackedWeight, address, gather_columns, gather_rows, pack, unpack
from fedspine_edge.tensor_checks import check_linear, check_tensor

if "native" in BACKENDS:
    from fedspine_edge import _native

__all__ = ["BASE_DTYPES", "PackedWeight", "gather_columns", "gather_rows", "pack", "unpack"]
__all__ += ["importance", "lora_linear"]
__all__ += ["available_isas", "backend", "isa", "use_backend", "use_isa"]


def lora_linear(
    x: Tensor,
    packed: PackedWeight,
    *,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    dropout: Dropout | None = None,
) -> Tensor:
    """Returns x W^T + bias + scaling D(x A^T) B^T, differentiable in x, bias and the LoRA factors.

    Args:
        x: [..., I], float32, at least one token.
        packed: The frozen weight, [O, I].
        bias: [O], or None.
        lora_a: [R, I], or None for no LoRA.
        lora_b: [O, R], None exactly when `lora_a` is.
        scaling: alpha / rank.
        dropout: D, of the low-rank values; None for none. Its mask is drawn again in the backward, not kept.

    Returns:
        [..., O].

    Raises:
        ValueError: A tensor is not float32 on the CPU or not of these shapes, or there is no token.
    """
    check_linear(x, (packed.out_features, packed.in_features), bias, lora_a, lora_b)
    if backend() == "reference":
        weight = unpack(packed)
        named = {"bias": bias, "lora_a": lora_a, "lora_b": lora_b}
        return reference.lora_linear(x, weight, **named, scaling=scaling, dropout=dropout)
    layer = _Layer(packed, scaling) if dropout is None else _Layer(packed, scaling, dropout.threshold, dropout.key)
    if torch.is_grad_enabled():
        return cast(Tensor, _LoraLinear.apply(layer, x, bias, lora_a, lora_b))  # type: ignore[no-untyped-call]
    return _forward(layer, x.contiguous(), bias, (_compact(lora_a), _compact(lora_b)), None)


def importance(
    packed: PackedWeight,
    *,
    lora_a: Tensor,
    lora_b: Tensor,
    grad_a: Tensor,
    grad_b: Tensor,
    scaling: float,
    axis: Literal["out", "in"],
    sample: tuple[int, int] = (1, 0),
) -> Tensor:
    """Returns how much the loss leans on each output or input: sums of |G * (W + scaling B A)|.

    G = grad_b A + B grad_a - grad_b grad_a estimates the weight's gradient from the factors' (LoRAPrune).

    Args:
        packed: The frozen weight W, [O, I].
        lora_a: [R, I], R >= 1.
        lora_b: [O, R].
        grad_a: Gradient of `lora_a`.
        grad_b: Gradient of `lora_b`.
        scaling: alpha / rank.
        axis: `out` for a score of each output (row sums), `in` of each input (column sums).
        sample: (n, phase): of the features summed over, in blocks of 32, every n-th from `phase` modulo n on; n counts
            as the number of blocks where these are fewer.

    Returns:
        [O] or [I], float32.

    Raises:
        ValueError: A tensor is not float32 on the CPU or not of these shapes, or the axis is neither.
    """
    if axis not in ("out", "in"):
        raise ValueError(f"expected axis out or in, found {axis}")
    if sample[0] < 1 or sample[1] < 0:
        raise ValueError(f"expected a sample of every 1st block or fewer, from phase 0 on, found {sample}")
    check_tensor("lora_a", lora_a, (None, packed.in_features))
    rank = lora_a.shape[0]
    if rank == 0:
        raise ValueError("expected lora_a of rank 1 or more, found 0")
    check_tensor("lora_b", lora_b, (packed.out_features, rank))
    check_tensor("grad_a", grad_a, lora_a.shape)
    check_tensor("grad_b", grad_b, lora_b.shape)
    factors = [tensor.detach().contiguous() for tensor in (lora_a, lora_b, grad_a, grad_b)]
    if backend() == "reference":
        named = dict(zip(("lora_a", "lora_b", "grad_a", "grad_b"), factors, strict=True))
        return reference.importance(unpack(packed), scaling=scaling, axis=axis, sample=sample, **named)
    scores = torch.empty(packed.out_features if axis == "out" else packed.in_features)
    a, b, da, db = (factor.data_ptr() for factor in factors)
    sizes = (packed.in_features, packed.out_features, rank)
    out, threads = scores.data_ptr(), torch.get_num_threads()
    _native.importance(*sizes, packed.native(), a, b, da, db, scaling, axis == "out", *sample, out, threads)
    return scores


class _LoraLinear(torch.autograd.Function):
    """Saves x only for A's gradient, and scaling * D(x A^T) (R floats a token) only for B's."""

    @staticmethod
    def forward(ctx: Any, layer: _Layer, x: Tensor, bias: Tensor | None, *pair: Tensor | None) -> Tensor:
        x, lora_a, lora_b = x.contiguous(), *map(_compact, pair)
        needs_a, needs_b = ctx.needs_input_grad[3:]
        hidden = x.new_empty(x.shape[:-1] + lora_b.shape[1:]) if needs_b and lora_b is not None else None
        ctx.layer = layer
        ctx.save_for_backward(x if needs_a else None, lora_a, lora_b, hidden)
        return _forward(layer, x, bias, (lora_a, lora_b), hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_a, lora_b, hidden = ctx.saved_tensors
        _, needs_x, needs_bias, needs_a, needs_b = ctx.needs_input_grad
        packed, dy = ctx.layer.packed, dy.contiguous()
        dx = dy.new_empty((*dy.shape[:-1], packed.in_features)) if needs_x else None
        da = torch.empty_like(lora_a) if needs_a else None
        db = torch.empty_like(lora_b) if needs_b else None
        _native.lora_linear_backward(
            *_sizes(packed, dy.numel() // packed.out_features, lora_a),
            dy.data_ptr(),
            address(x),
            packed.native(),
            address(lora_a),
            address(lora_b),
            address(hidden),
            ctx.layer.scaling,
            address(dx),
            address(da),
            address(db),
            ctx.layer.dropout_threshold,
            ctx.layer.dropout_key,
            torch.get_num_threads(),
        )
        dbias = dy.reshape(-1, packed.out_features).sum(0) if needs_bias else None
        return None, dx, dbias, da, db


@dataclass(frozen=True, eq=False)
class _Layer:
    """What a layer's call takes that is neither trained nor differentiated."""

    packed: PackedWeight
    scaling: float
    dropout_threshold: int = 0
    dropout_key: int = 0


def _forward(
    layer: _Layer, x: Tensor, bias: Tensor | None, pair: tuple[Tensor | None, Tensor | None], hidden: Tensor | None
) -> Tensor:
    packed, (lora_a, lora_b) = layer.packed, pair
    bias = _compact(bias)
    y = x.new_empty((*x.shape[:-1], packed.out_features))
    _native.lora_linear_forward(
        *_sizes(packed, x.numel() // packed.in_features, lora_a),
        x.data_ptr(),
        packed.native(),
        address(bias),
        address(lora_a),
        address(lora_b),
        layer.scaling,
        y.data_ptr(),
        address(hidden),
        layer.dropout_threshold,
        layer.dropout_key,
        torch.get_num_threads(),
    )
    return y


def _sizes(packed: PackedWeight, tokens: int, lora_a: Tensor | None) -> tuple[int, int, int, int]:
    return tokens, packed.in_features, packed.out_features, 0 if lora_a is None else lora_a.shape[0]


def _compact(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
