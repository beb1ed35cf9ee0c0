"""The door to the native attention: checks tensors, then calls `_native` or `reference`.

Tensors are float32 on the CPU. No probabilities are stored: the backward computes them again from queries, keys and one
float a query. The rotary embedding is applied on the way in and out, so that rotated copies are not stored either. Keys
that are padding cost nothing. The number of threads is torch's, and the result does not depend on it.

Source: FlashAttention (arXiv 2205.14135) for the recomputation; csrc/README.md for accumulators.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedspine_edge import reference
from fedspine_edge.backends import BACKENDS, backend
from fedspine_edge.reference import Pattern
from fedspine_edge.tensor_checks import check_tensor

if "native" in BACKENDS:
    from fedspine_edge import _native

__all__ = ["Pattern", "attention"]


def attention(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
    """Returns softmax(q k^T / sqrt(D) + bias) v over the keys each query sees, differentiable in q, k and v.

    A query that sees no key gets zeros.

    Args:
        q: [B, T, H, D], float32, not empty.
        k: [B, T, G, D], float32; H is a multiple of G, and query head h reads head h // (H / G).
        v: As k.
        pattern: What is seen. Its bias takes no gradient; its rotation needs an even D.

    Returns:
        [B, T, H, D].

    Raises:
        ValueError: A tensor is not of that type or shape, or heads or sizes do not fit each other.
    """
    _check_heads(q, k, v)
    _check_pattern(q, pattern)
    if backend() == "reference":
        return reference.attention(q, k, v, pattern)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return cast(Tensor, _Attention.apply(q, k, v, pattern))  # type: ignore[no-untyped-call]
    return _forward((q.contiguous(), k.contiguous(), v.contiguous()), _compact(pattern), None)


class _Attention(torch.autograd.Function):
    """Saves q, k, v and the output, which its neighbours hold anyway, and one float a query and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        inputs = (q.contiguous(), k.contiguous(), v.contiguous())
        lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1])
        ctx.pattern = _compact(pattern)
        out = _forward(inputs, ctx.pattern, lse)
        ctx.save_for_backward(*inputs, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, out, lse = ctx.saved_tensors
        dout, gradients = dout.contiguous(), [torch.empty_like(tensor) for tensor in inputs]
        dq, dk, dv = gradients
        addresses = (out.data_ptr(), lse.data_ptr(), dout.data_ptr(), dq.data_ptr(), dk.data_ptr(), dv.data_ptr())
        _native.attention_backward(*_call(tuple(inputs), ctx.pattern), *addresses)
        return dq, dk, dv, None


def _forward(inputs: tuple[Tensor, Tensor, Tensor], pattern: Pattern, lse: Tensor | None) -> Tensor:
    out = torch.empty_like(inputs[0])
    _native.attention_forward(*_call(inputs, pattern), out.data_ptr(), _address(lse))
    return out


def _call(inputs: tuple[Tensor, ...], pattern: Pattern) -> tuple[_native.AttentionShape, _native.AttentionCall]:
    q, k, v = inputs
    batch, tokens, heads, head_dim = q.shape
    cos, sin = pattern.rotation or (None, None)
    rotation_stride = tokens * head_dim if cos is not None and len(cos) > 1 else 0
    call = _native.AttentionCall(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        _address(cos),
        _address(sin),
        rotation_stride,
        _address(pattern.bias),
        _address(pattern.valid),
        head_dim**-0.5,
        pattern.causal,
        torch.get_num_threads(),
    )
    return _native.AttentionShape(batch, tokens, heads, k.shape[2], head_dim), call


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_tensor("q", q, (None, None, None, None))
    batch, tokens, heads, head_dim = q.shape
    check_tensor("k", k, (batch, tokens, None, head_dim))
    check_tensor("v", v, k.shape)
    if q.numel() == 0 or k.numel() == 0:
        raise ValueError(f"expected at least one element in q and k, found {list(q.shape)} and {list(k.shape)}")
    if heads % k.shape[2]:
        raise ValueError(f"expected query heads in equal groups of KV heads, found {heads} over {k.shape[2]}")


def _check_pattern(q: Tensor, pattern: Pattern) -> None:
    batch, tokens, heads, head_dim = q.shape
    valid, bias, rotation = pattern.valid, pattern.bias, pattern.rotation
    if valid is not None and (valid.dtype != torch.bool or valid.device.type != "cpu" or valid.shape != q.shape[:2]):
        found = f"{str(valid.dtype).removeprefix('torch.')} on {valid.device.type} of shape {list(valid.shape)}"
        raise ValueError(f"expected valid as bool on cpu of shape [{batch}, {tokens}], found {found}")
    if bias is not None:
        check_tensor("bias", bias, (heads, tokens, tokens))
        if bias.requires_grad and torch.is_grad_enabled():
            raise ValueError("expected bias without a gradient, found one that takes it: detach it")
    if rotation is None:
        return
    cos, sin = rotation
    check_tensor("cos", cos, (None, tokens, head_dim))
    check_tensor("sin", sin, cos.shape)
    if len(cos) not in (1, batch):
        raise ValueError(f"expected cos for 1 or {batch} rows, found {len(cos)}")
    if head_dim % 2:
        raise ValueError(f"expected an even head size to rotate, found {head_dim}")


def _compact(pattern: Pattern) -> Pattern:
    rotation = pattern.rotation
    return Pattern(
        causal=pattern.causal,
        valid=None if pattern.valid is None else pattern.valid.contiguous(),
        bias=None if pattern.bias is None else pattern.bias.contiguous(),
        rotation=None if rotation is None else (rotation[0].contiguous(), rotation[1].contiguous()),
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
