"""Whether LoRA factors fit the matrices of a base.

In: factors at the kept rows and columns, and the base's shapes. Out: nothing, or IncompatibleError.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedspine_edge.errors import IncompatibleError
from fedspine_edge.shrink import Factors


def check_factors(factors: Factors, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Checks factors against a base.

    Args:
        factors: Matrix name -> (lora_a [R, I kept], lora_b [O kept, R]).
        shapes: Shape of each of the base's tensors; matrices [O kept, I kept].

    Raises:
        IncompatibleError: There are none, a matrix is unknown, a shape is another, or a number is not finite.
    """
    if not factors:
        raise IncompatibleError("expected LoRA factors, found none")
    for name, (lora_a, lora_b) in factors.items():
        shape = shapes.get(f"{name}.weight")
        if shape is None:
            raise IncompatibleError(f"expected factors of the base's matrices, found {name}")
        rank, found = len(lora_a), [tuple(lora_a.shape), tuple(lora_b.shape)]
        if found != [(rank, shape[1]), (shape[0], rank)] or rank == 0:
            raise IncompatibleError(
                f"expected factors of shapes [R, {shape[1]}] and [{shape[0]}, R] for {name}, "
                f"found {list(found[0])} and {list(found[1])}",
                hint="the adapter belongs to another mask: slice it to what the base keeps",
            )
        if not (torch.isfinite(lora_a).all() and torch.isfinite(lora_b).all()):
            raise IncompatibleError(f"expected finite factors, found NaN or infinity for {name}")
