"""The one door to the native kernels: checks shapes, dtypes and devices, then calls `_native` or `reference`.

Tensors are float32 on the CPU. A frozen base weight is packed once (`pack`) and then serves the forward and the
backward of `lora_linear` and the `importance` of its members. Without the extension everything works in plain torch,
slower; `backend()` says which it is. The number of threads is torch's.

Source: FedSpine (arXiv 2501.02438); csrc/README.md for layout and accumulators.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedspine_edge import reference
from fedspine_edge.backends import BACKENDS, available_isas, backend, isa, use_backend, use_isa
from fedspine_edge.tensor_checks import KeptMatrix, check_kept, check_linear, check_tensor

if "native" in BACKENDS:
    from fedspine_edge import _native

__all__ = ["PackedWeight", "gather_columns", "gather_rows", "importance", "lora_linear", "pack", "unpack"]
__all__ += ["available_isas", "backend", "isa", "use_backend", "use_isa"]


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A frozen base weight in the kernels' layout, unneeded rows and columns left out.

    Attributes:
        out_features: Outputs after the gather (O).
        in_features: Inputs after the gather (I).
        panels: Panels of 32 outputs, float32 [ceil(O / 32), I, 32]; never written after packing.
    """

    out_features: int
    in_features: int
    panels: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes the panels take."""
        return self.panels.nbytes

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        """Returns itself: frozen, so the copies of a model share it."""
        return self


def pack(base_weight: Tensor, *, keep_out: Tensor | None = None, keep_in: Tensor | None = None) -> PackedWeight:
    """Returns a frozen weight in the kernels' layout, only what is kept of it.

    Args:
        base_weight: [out, in], float32; a memory-mapped tensor or a slice of rows is read in place.
        keep_out: Kept outputs, sorted unique int64 [O], at least one; None for all.
        keep_in: Kept inputs, sorted unique int64 [I], at least one; None for all.

    Raises:
        ValueError: The weight is not such a matrix, or a list of kept features is not as described or is empty.
    """
    kept = check_kept("base_weight", base_weight, ("keep_out", keep_out), ("keep_in", keep_in))
    out_features, in_features = kept.shape
    if out_features == 0 or in_features == 0:
        raise ValueError(f"expected at least one kept output and input, found {out_features} and {in_features}")
    if backend() == "reference":
        return PackedWeight(out_features, in_features, reference.pack(_gather_plainly(kept)))
    panels = torch.empty(-(-out_features // _native.PANEL_WIDTH), in_features, _native.PANEL_WIDTH)
    _call_on_kept(_native.pack_weight, kept, panels)
    return PackedWeight(out_features, in_features, panels)


def unpack(packed: PackedWeight) -> Tensor:
    """Returns the weight a packed weight holds, [O, I]."""
    if backend() == "reference":
        return reference.unpack(packed.panels, packed.out_features)
    weight = torch.empty(packed.out_features, packed.in_features)
    _native.unpack_weight(
        packed.panels.data_ptr(), packed.out_features, packed.in_features, weight.data_ptr(), torch.get_num_threads()
    )
    return weight


def gather_rows(m: Tensor, keep: Tensor) -> Tensor:
    """Returns the kept rows of a matrix, compact; not differentiable.

    Args:
        m: [rows, columns], float32.
        keep: Sorted unique row indices, int64 [K]; may be empty.

    Returns:
        [K, columns].

    Raises:
        ValueError: `m` or `keep` is not as described.
    """
    return _gather(check_kept("m", m, ("keep", keep), ("keep", None)))


def gather_columns(m: Tensor, keep: Tensor) -> Tensor:
    """Returns the kept columns of a matrix, compact; not differentiable.

    Args:
        m: [rows, columns], float32.
        keep: Sorted unique column indices, int64 [K]; may be empty.

    Returns:
        [rows, K].

    Raises:
        ValueError: `m` or `keep` is not as described.
    """
    return _gather(check_kept("m", m, ("keep", None), ("keep", keep)))


def lora_linear(
    x: Tensor,
    packed: PackedWeight,
    *,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
) -> Tensor:
    """Returns x W^T + bias + scaling (x A^T) B^T, differentiable in x, bias and the LoRA factors.

    Args:
        x: [..., I], float32, at least one token.
        packed: The frozen weight, [O, I].
        bias: [O], or None.
        lora_a: [R, I], or None for no LoRA.
        lora_b: [O, R], None exactly when `lora_a` is.
        scaling: alpha / rank.

    Returns:
        [..., O].

    Raises:
        ValueError: A tensor is not float32 on the CPU or not of these shapes, or there is no token.
    """
    check_linear(x, (packed.out_features, packed.in_features), bias, lora_a, lora_b)
    if backend() == "reference":
        weight = unpack(packed)
        return reference.lora_linear(x, weight, bias=bias, lora_a=lora_a, lora_b=lora_b, scaling=scaling)
    layer = _Layer(packed, scaling)
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

    Returns:
        [O] or [I], float32.

    Raises:
        ValueError: A tensor is not float32 on the CPU or not of these shapes, or the axis is neither.
    """
    if axis not in ("out", "in"):
        raise ValueError(f"expected axis out or in, found {axis}")
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
        return reference.importance(unpack(packed), scaling=scaling, axis=axis, **named)
    scores = torch.empty(packed.out_features if axis == "out" else packed.in_features)
    a, b, da, db = (factor.data_ptr() for factor in factors)
    sizes = (packed.in_features, packed.out_features, rank)
    address, threads = scores.data_ptr(), torch.get_num_threads()
    _native.importance(*sizes, packed.panels.data_ptr(), a, b, da, db, scaling, axis == "out", address, threads)
    return scores


class _LoraLinear(torch.autograd.Function):
    """Saves x only for A's gradient, and scaling * x A^T (R floats a token) only for B's."""

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
            _address(x),
            packed.panels.data_ptr(),
            _address(lora_a),
            _address(lora_b),
            _address(hidden),
            ctx.layer.scaling,
            _address(dx),
            _address(da),
            _address(db),
            torch.get_num_threads(),
        )
        dbias = dy.reshape(-1, packed.out_features).sum(0) if needs_bias else None
        return None, dx, dbias, da, db


@dataclass(frozen=True, eq=False)
class _Layer:
    """What a layer's call takes that is neither trained nor differentiated."""

    packed: PackedWeight
    scaling: float


def _forward(
    layer: _Layer, x: Tensor, bias: Tensor | None, pair: tuple[Tensor | None, Tensor | None], hidden: Tensor | None
) -> Tensor:
    packed, (lora_a, lora_b) = layer.packed, pair
    bias = _compact(bias)
    y = x.new_empty((*x.shape[:-1], packed.out_features))
    _native.lora_linear_forward(
        *_sizes(packed, x.numel() // packed.in_features, lora_a),
        x.data_ptr(),
        packed.panels.data_ptr(),
        _address(bias),
        _address(lora_a),
        _address(lora_b),
        layer.scaling,
        y.data_ptr(),
        _address(hidden),
        torch.get_num_threads(),
    )
    return y


def _sizes(packed: PackedWeight, tokens: int, lora_a: Tensor | None) -> tuple[int, int, int, int]:
    return tokens, packed.in_features, packed.out_features, 0 if lora_a is None else lora_a.shape[0]


def _compact(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _gather(kept: KeptMatrix) -> Tensor:
    if backend() == "reference":
        return _gather_plainly(kept)
    out = torch.empty(kept.shape)
    _call_on_kept(_native.gather, kept, out)
    return out


def _gather_plainly(kept: KeptMatrix) -> Tensor:
    rows = kept.matrix if kept.keep_rows is None else reference.gather_rows(kept.matrix, kept.keep_rows)
    return rows if kept.keep_columns is None else reference.gather_columns(rows, kept.keep_columns)


def _call_on_kept(function: Callable[..., None], kept: KeptMatrix, out: Tensor) -> None:
    matrix, keeps = kept.matrix, (_address(kept.keep_rows), _address(kept.keep_columns))
    function(matrix.data_ptr(), matrix.stride(0), *keeps, *kept.shape, out.data_ptr(), torch.get_num_threads())


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
