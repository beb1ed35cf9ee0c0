"""Kept rows and columns of a matrix, and a frozen base weight in the kernels' layout.

Comes in: a float32 matrix and what to keep of it. Goes out: a compact copy, or panels in one of `BASE_DTYPES`. Whatever
the format, a kernel computes with the float32 numbers that the panels stand for (`unpack`): bfloat16 is exact for a
model published in it; int8 has a scale for each output, rounded to what is kept of its row. `kernels` offers all of
this to everyone else.

Source: csrc/packed_weight.h for the formats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedspine_edge import reference
from fedspine_edge.backends import BACKENDS, backend
from fedspine_edge.dtypes import BASE_DTYPES
from fedspine_edge.tensor_checks import KeptMatrix, check_kept

if "native" in BACKENDS:
    from fedspine_edge import _native


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A frozen base weight in the kernels' layout, unneeded rows and columns left out.

    Attributes:
        out_features: Outputs after the gather (O).
        in_features: Inputs after the gather (I).
        panels: Panels of 32 outputs, float32, bfloat16 or int8 [ceil(O / 32), I, 32]; never written after packing.
        scales: Of int8 what a code of each output stands for, float32 [ceil(O / 32), 32]; None otherwise.
    """

    out_features: int
    in_features: int
    panels: Tensor
    scales: Tensor | None = None

    @property
    def dtype(self) -> str:
        """A name of `BASE_DTYPES`."""
        return str(self.panels.dtype).removeprefix("torch.")

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held."""
        return (self.panels,) if self.scales is None else (self.panels, self.scales)

    @property
    def nbytes(self) -> int:
        """Bytes of them."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def native(self) -> Any:
        """Returns the addresses, as the extension takes them; they are good while this object lives."""
        return _native.PackedWeight(self.panels.data_ptr(), address(self.scales), self.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        """Returns itself: frozen, so the copies of a model share it."""
        return self


def pack(
    base_weight: Tensor, *, keep_out: Tensor | None = None, keep_in: Tensor | None = None, dtype: str = "float32"
) -> PackedWeight:
    """Returns a frozen weight in the kernels' layout, only what is kept of it.

    Args:
        base_weight: [out, in], float32; a memory-mapped tensor or a slice of rows is read in place.
        keep_out: Kept outputs, sorted unique int64 [O], at least one; None for all.
        keep_in: Kept inputs, sorted unique int64 [I], at least one; None for all.
        dtype: How it is held: a name of `BASE_DTYPES`.

    Raises:
        ValueError: The weight is not such a matrix, a list of kept features is not as described or is empty, or there
            is no such dtype.
    """
    kept = check_kept("base_weight", base_weight, ("keep_out", keep_out), ("keep_in", keep_in))
    out_features, in_features = kept.shape
    if out_features == 0 or in_features == 0:
        raise ValueError(f"expected at least one kept output and input, found {out_features} and {in_features}")
    if dtype not in BASE_DTYPES:
        raise ValueError(f"expected a dtype of {', '.join(BASE_DTYPES)}, found {dtype}")
    if backend() == "reference":
        return PackedWeight(out_features, in_features, *reference.pack(_gather_plainly(kept), dtype))
    num_panels = -(-out_features // _native.PANEL_WIDTH)
    panels = torch.empty(num_panels, in_features, _native.PANEL_WIDTH, dtype=getattr(torch, dtype))
    scales = torch.empty(num_panels, _native.PANEL_WIDTH) if dtype == "int8" else None
    packed = PackedWeight(out_features, in_features, panels, scales)
    _call_on_kept(_native.pack_weight, kept, packed.native())
    return packed


def unpack(packed: PackedWeight) -> Tensor:
    """Returns the weight a packed weight stands for, float32 [O, I]."""
    if backend() == "reference":
        return reference.unpack(packed.panels, packed.scales, packed.out_features)
    weight = torch.empty(packed.out_features, packed.in_features)
    sizes = (packed.out_features, packed.in_features)
    _native.unpack_weight(packed.native(), *sizes, weight.data_ptr(), torch.get_num_threads())
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


def address(tensor: Tensor | None) -> int:
    """Returns where a tensor's first element is; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def _gather(kept: KeptMatrix) -> Tensor:
    if backend() == "reference":
        return _gather_plainly(kept)
    out = torch.empty(kept.shape)
    _call_on_kept(_native.gather, kept, out.data_ptr())
    return out


def _gather_plainly(kept: KeptMatrix) -> Tensor:
    rows = kept.matrix if kept.keep_rows is None else reference.gather_rows(kept.matrix, kept.keep_rows)
    return rows if kept.keep_columns is None else reference.gather_columns(rows, kept.keep_columns)


def _call_on_kept(function: Callable[..., None], kept: KeptMatrix, out: Any) -> None:
    matrix, keeps = kept.matrix, (address(kept.keep_rows), address(kept.keep_columns))
    function(matrix.data_ptr(), matrix.stride(0), *keeps, *kept.shape, out, torch.get_num_threads())
