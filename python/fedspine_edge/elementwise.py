"""The door to the native norms and activations: checks tensors, then calls `_native` or `reference`.

Tensors are float32 on the CPU. What torch does in several operations, each of which saves its input for the backward,
is one pass here; what that pass must keep for the backward it keeps in bfloat16 (the forward itself is not rounded).
What they return is `recomputable`: a linear that reads it does not hold it. The number of threads is torch's.

Source: RMSNorm (arXiv 1910.07467); LayerNorm (arXiv 1607.06450); SwiGLU (arXiv 2002.05202); GELU (arXiv 1606.08415);
csrc/README.md for accumulators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedspine_edge import reference
from fedspine_edge.backends import BACKENDS, backend
from fedspine_edge.recomputed import recomputable
from fedspine_edge.tensor_checks import check_tensor

if "native" in BACKENDS:
    from fedspine_edge import _native

__all__ = ["gelu", "layer_norm", "rms_norm", "swiglu"]


def rms_norm(x: Tensor, weight: Tensor, *, epsilon: float) -> Tensor:
    """Returns x / sqrt(mean(x^2) + epsilon) * weight, the mean over the last dimension; differentiable in x.

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
    _check_rows(x, epsilon)
    if backend() == "reference" or (torch.is_grad_enabled() and weight.requires_grad):
        return _plainly(lambda x: reference.rms_norm(x, weight, epsilon=epsilon), x)
    x, weight = x.contiguous(), weight.contiguous()
    if not _needs_graph(x):
        return _rms_norm(x, weight, epsilon, None)
    frozen = x.detach()
    y = cast(Tensor, _RmsNorm.apply(x, weight, epsilon))  # type: ignore[no-untyped-call]
    return recomputable(y, lambda: _rms_norm(frozen, weight, epsilon, None))


def layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, *, epsilon: float) -> Tensor:
    """Returns x + residual, normalised over the last dimension, times weight, plus bias; differentiable in both.

    A weight or a bias that takes a gradient is left to plain torch: here they are frozen.

    Args:
        x: [..., I], float32, at least one token.
        residual: float32, of the same shape; None for zero.
        weight: [I], float32.
        bias: [I], float32.
        epsilon: What keeps the root above zero, at least 0.

    Returns:
        [..., I].

    Raises:
        ValueError: A tensor is not float32 on the CPU or not of these shapes, there is no token, or `epsilon` is
            negative.
    """
    check_tensor("weight", weight, (None,))
    check_tensor("bias", bias, weight.shape)
    check_tensor("x", x, (*x.shape[:-1], len(weight)))
    if residual is not None:
        check_tensor("residual", residual, x.shape)
    _check_rows(x, epsilon)
    if backend() == "reference" or (torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad)):
        inputs = (x,) if residual is None else (x, residual)
        return _plainly(
            lambda x, residual=None: reference.layer_norm(x, residual, weight, bias, epsilon=epsilon), *inputs
        )
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    weight, bias = weight.contiguous(), bias.contiguous()
    if not _needs_graph(x, residual):
        return _layer_norm((x, residual, weight, bias), epsilon, None, None)
    kept = torch.empty_like(x, dtype=torch.bfloat16)

    def again() -> Tensor:
        y = torch.empty(kept.shape)
        sizes = (kept.numel() // len(weight), len(weight))
        addresses = (kept.data_ptr(), weight.data_ptr(), bias.data_ptr(), y.data_ptr())
        _native.layer_norm_again(*sizes, *addresses, torch.get_num_threads())
        return y

    y = cast(Tensor, _LayerNorm.apply(kept, epsilon, x, residual, weight, bias))  # type: ignore[no-untyped-call]
    return recomputable(y, again)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Returns silu(gate) * up, differentiable in both; only these two are kept for the backward.

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
        return _plainly(reference.swiglu, gate, up)
    return _activation(_Swiglu, _native.swiglu_again, gate.contiguous(), up.contiguous())


def gelu(x: Tensor) -> Tensor:
    """Returns x (1 + erf(x / sqrt(2))) / 2, differentiable; only x is kept for the backward.

    Args:
        x: float32, at least one element.

    Returns:
        A tensor of that shape.

    Raises:
        ValueError: The tensor is not float32 on the CPU or has no element.
    """
    check_tensor("x", x, x.shape)
    _check_not_empty("x", x)
    if backend() == "reference":
        return _plainly(reference.gelu, x)
    return _activation(_Gelu, _native.gelu_again, x.contiguous())


class _RmsNorm(torch.autograd.Function):
    """Saves x, which the residual stream holds anyway, and one float a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        rstd = x.new_empty(x.shape[:-1])
        ctx.save_for_backward(x, weight, rstd)
        return _rms_norm(x, weight, epsilon, rstd)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        dy, dx = dy.contiguous(), torch.empty_like(x)
        addresses = (dy.data_ptr(), x.data_ptr(), weight.data_ptr(), rstd.data_ptr(), dx.data_ptr())
        _native.rms_norm_backward(rstd.numel(), len(weight), *addresses, torch.get_num_threads())
        return dx, None, None


class _LayerNorm(torch.autograd.Function):
    """Fills `kept` with the normalised rows, and saves it and one float a token."""

    @staticmethod
    def forward(ctx: Any, kept: Tensor, epsilon: float, *inputs: Tensor | None) -> Tensor:
        rstd = torch.empty(kept.shape[:-1])
        ctx.save_for_backward(kept, inputs[2], rstd)
        return _layer_norm(inputs, epsilon, kept, rstd)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, rstd = ctx.saved_tensors
        dy, dz = dy.contiguous(), torch.empty(kept.shape)
        addresses = (dy.data_ptr(), kept.data_ptr(), weight.data_ptr(), rstd.data_ptr(), dz.data_ptr())
        _native.layer_norm_backward(rstd.numel(), len(weight), *addresses, torch.get_num_threads())
        return None, None, dz, dz if ctx.needs_input_grad[3] else None, None, None


class _Swiglu(torch.autograd.Function):
    """Fills what is kept with gate and up, and saves it."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, *kept: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        y = torch.empty_like(gate)
        addresses = (gate.data_ptr(), up.data_ptr(), y.data_ptr(), *_addresses_of_two(kept))
        _native.swiglu_forward(gate.numel(), *addresses, torch.get_num_threads())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dy, dgate, dup = dy.contiguous(), torch.empty(gate.shape), torch.empty(up.shape)
        addresses = (dy.data_ptr(), gate.data_ptr(), up.data_ptr(), dgate.data_ptr(), dup.data_ptr())
        _native.swiglu_backward(gate.numel(), *addresses, torch.get_num_threads())
        return dgate, dup, None, None


class _Gelu(torch.autograd.Function):
    """Fills what is kept with x, and saves it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *kept: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        y = torch.empty_like(x)
        address = kept[0].data_ptr() if kept else 0
        _native.gelu_forward(x.numel(), x.data_ptr(), y.data_ptr(), address, torch.get_num_threads())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        dy, dx = dy.contiguous(), torch.empty(x.shape)
        _native.gelu_backward(x.numel(), dy.data_ptr(), x.data_ptr(), dx.data_ptr(), torch.get_num_threads())
        return dx, None


def _activation(function: Any, compute: Callable[..., None], *inputs: Tensor) -> Tensor:
    if not _needs_graph(*inputs):
        return cast(Tensor, function.apply(*inputs))
    kept = [torch.empty_like(tensor, dtype=torch.bfloat16) for tensor in inputs]

    def again() -> Tensor:
        y = torch.empty(kept[0].shape)
        addresses = (tensor.data_ptr() for tensor in (*kept, y))
        compute(y.numel(), *addresses, torch.get_num_threads())
        return y

    return recomputable(cast(Tensor, function.apply(*inputs, *kept)), again)


def _plainly(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    y = function(*inputs).contiguous()
    if not _needs_graph(*inputs):
        return y
    frozen = [tensor.detach() for tensor in inputs]
    return recomputable(y, lambda: function(*frozen).contiguous())


def _needs_graph(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float, rstd: Tensor | None) -> Tensor:
    y, tokens = torch.empty_like(x), x.numel() // len(weight)
    addresses = (y.data_ptr(), _address(rstd))
    threads = torch.get_num_threads()
    _native.rms_norm_forward(tokens, len(weight), x.data_ptr(), weight.data_ptr(), epsilon, *addresses, threads)
    return y


def _layer_norm(inputs: tuple[Tensor | None, ...], epsilon: float, kept: Tensor | None, rstd: Tensor | None) -> Tensor:
    x, residual, weight, bias = inputs
    assert x is not None
    assert weight is not None
    y = torch.empty_like(x)
    _native.layer_norm_forward(
        x.numel() // len(weight),
        len(weight),
        x.data_ptr(),
        _address(residual),
        weight.data_ptr(),
        _address(bias),
        epsilon,
        y.data_ptr(),
        _address(kept),
        _address(rstd),
        torch.get_num_threads(),
    )
    return y


def _check_rows(x: Tensor, epsilon: float) -> None:
    _check_not_empty("x", x)
    if not epsilon >= 0:
        raise ValueError(f"expected epsilon of at least 0, found {epsilon}")


def _check_not_empty(name: str, tensor: Tensor) -> None:
    if tensor.numel() == 0:
        raise ValueError(f"expected at least one element in {name}, found shape {list(tensor.shape)}")


def _addresses_of_two(kept: tuple[Tensor, ...]) -> tuple[int, int]:
    return (kept[0].data_ptr(), kept[1].data_ptr()) if kept else (0, 0)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
