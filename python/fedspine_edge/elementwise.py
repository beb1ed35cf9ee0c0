"""The door to the native elementwise kernels: checks tensors, then calls `_native` or `reference`.

Tensors are float32 on the CPU. What torch does in five operations, each of which saves its input for the backward, is
one pass here that saves what it was given and recomputes the rest. The number of threads is torch's.

Source: RMSNorm (arXiv 1910.07467); SwiGLU (arXiv 2002.05202); csrc/README.md for accumulators.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedspine_edge import reference
from fedspine_edge.backends import BACKENDS, backend
from fedspine_edge.tensor_checks import check_tensor

if "native" in BACKENDS:
    from fedspine_edge import _native

__all__ = ["rms_norm", "swiglu"]


def rms_norm(x: Tensor, weight: Tensor, *, epsilon: float) -> Tensor:
    """Returns x / sqrt(mean(x^2) + epsilon) * weight, the mean over the last dimension; differentiable.

    A weight that takes a gradient is left to plain torch: here it is frozen.

    Args:
        x: [..., I], float32, at least one token.
        weight: [I], float32.
        epsilon: What keeps the root above zero, at least 0.

    Returns:
        [..., I].

    Raises:
        ValueError: A tensor is not float32 on the CPU or not of these shapes, there is no token, or `epsilon` is
            negative.
    """
    check_tensor("weight", weight, (None,))
    check_tensor("x", x, (*x.shape[:-1], len(weight)))
    _check_not_empty("x", x)
    if not epsilon >= 0:
        raise ValueError(f"expected epsilon of at least 0, found {epsilon}")
    with_graph = torch.is_grad_enabled()
    if backend() == "reference" or (with_graph and weight.requires_grad):
        return reference.rms_norm(x, weight, epsilon=epsilon)
    if with_graph and x.requires_grad:
        return cast(Tensor, _RmsNorm.apply(x, weight, epsilon))  # type: ignore[no-untyped-call]
    return _rms_norm(x.contiguous(), weight.contiguous(), epsilon, None)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Returns silu(gate) * up, differentiable in both; only these two are saved for the backward.

    Args:
        gate: float32, at least one element.
        up: float32, of the same shape.

    Returns:
        A tensor of that shape.

    Raises:
        ValueError: A tensor is not float32 on the CPU, the shapes differ, or there is no element.
    """
    check_tensor("gate", gate, gate.shape)
    check_tensor("up", up, gate.shape)
    _check_not_empty("gate", gate)
    if backend() == "reference":
        return reference.swiglu(gate, up)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return cast(Tensor, _Swiglu.apply(gate, up))  # type: ignore[no-untyped-call]
    return _swiglu(gate.contiguous(), up.contiguous())


class _RmsNorm(torch.autograd.Function):
    """Saves x and one float a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        rstd = x.new_empty(x.shape[:-1])
        ctx.save_for_backward(x, weight, rstd)
        return _rms_norm(x, weight, epsilon, rstd)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        dy, dx = dy.contiguous(), torch.empty_like(x)
        _native.rms_norm_backward(
            rstd.numel(),
            len(weight),
            dy.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            rstd.data_ptr(),
            dx.data_ptr(),
            torch.get_num_threads(),
        )
        return dx, None, None


class _Swiglu(torch.autograd.Function):
    """Saves gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return _swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dy, dgate, dup = dy.contiguous(), torch.empty_like(gate), torch.empty_like(up)
        _native.swiglu_backward(
            gate.numel(),
            dy.data_ptr(),
            gate.data_ptr(),
            up.data_ptr(),
            dgate.data_ptr(),
            dup.data_ptr(),
            torch.get_num_threads(),
        )
        return dgate, dup


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float, rstd: Tensor | None) -> Tensor:
    y, tokens = torch.empty_like(x), x.numel() // len(weight)
    rstd_address = 0 if rstd is None else rstd.data_ptr()
    threads = torch.get_num_threads()
    _native.rms_norm_forward(
        tokens, len(weight), x.data_ptr(), weight.data_ptr(), epsilon, y.data_ptr(), rstd_address, threads
    )
    return y


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty_like(gate)
    _native.swiglu_forward(gate.numel(), gate.data_ptr(), up.data_ptr(), y.data_ptr(), torch.get_num_threads())
    return y


def _check_not_empty(name: str, tensor: Tensor) -> None:
    if tensor.numel() == 0:
        raise ValueError(f"expected at least one element in {name}, found shape {list(tensor.shape)}")
