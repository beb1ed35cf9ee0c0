"""Tensors that a backward needs and that are computed again for it rather than held.

Comes in: the output of a norm or an activation, and how to get it once more. Goes out: the same tensor, which carries
that, and a context for whoever reads it, in which autograd saves nothing in its place.

Source: recomputation, Chen et al. (arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def recomputable(tensor: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """Returns the tensor, which from now on carries how to get its values again.

    A view or a copy of it does not, and neither does it once it has been written to.

    Args:
        tensor: Contiguous.
        compute: Gives the values again, up to the rounding of what was kept for it; must not hold the tensor.
    """
    carrier: Any = tensor
    carrier.computed_again = (tensor._version, compute)
    return tensor


def not_held(tensor: Tensor) -> AbstractContextManager[Any]:
    """Returns a context in which a recomputable tensor, where autograd would save it, is computed again when needed.

    Any other tensor is saved as always.
    """
    version, compute = getattr(tensor, "computed_again", (None, None))
    if compute is None or version != tensor._version:
        return nullcontext()
    address, size = tensor.data_ptr(), tensor.numel()  # not the tensor: the hooks would hold it

    def pack(saved: Tensor) -> Tensor | torch.Size:
        whole = saved.data_ptr() == address and saved.numel() == size and saved.is_contiguous()
        return saved.shape if whole else saved

    def unpack(held: Tensor | torch.Size) -> Tensor:
        return held if isinstance(held, Tensor) else compute().view(held)

    return saved_tensors_hooks(pack, unpack)
