"""What a tensor must be before its address goes to a kernel: float32, on the CPU, of the expected shape.

Tensors in, a `ValueError` out that says what was expected and what was found; stands between `reference` and `kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def check_tensor(name: str, tensor: Tensor, shape: Sequence[int | None]) -> None:
    """Refuses a tensor that is not float32 on the CPU or not of the shape.

    Args:
        name: What the message calls it.
        tensor: The tensor.
        shape: Expected sizes, None where any is taken.

    Raises:
        ValueError: It is not.
    """
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise ValueError(f"expected {name} as float32 on cpu, found {_kind(tensor)}")
    found = tensor.shape
    if len(found) != len(shape) or any(size not in (None, got) for size, got in zip(shape, found, strict=True)):
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"expected {name} of shape [{expected}], found {list(found)}")


def check_keep(name: str, keep: Tensor, size: int) -> Tensor:
    """Returns a list of kept indices, contiguous, after checking that it is one.

    Args:
        name: What the message calls it.
        keep: Indices, int64 [K].
        size: What they index.

    Raises:
        ValueError: It is not sorted unique int64 within `[0, size)` on the CPU.
    """
    if keep.dtype != torch.int64 or keep.device.type != "cpu" or keep.dim() != 1:
        raise ValueError(f"expected {name} as a list of int64 on cpu, found {_kind(keep)} of shape {list(keep.shape)}")
    if keep.numel() == 0:
        return keep
    if bool((keep[1:] <= keep[:-1]).any()):
        raise ValueError(f"expected {name} sorted and unique, found an index that is not above the one before")
    if int(keep[0]) < 0 or int(keep[-1]) >= size:
        raise ValueError(f"expected {name} within [0, {size}), found {int(keep[0])}..{int(keep[-1])}")
    return keep.contiguous()


def check_linear(
    x: Tensor, shape: tuple[int, int], bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None
) -> None:
    """Refuses what a linear layer with a LoRA pair cannot be called with.

    Args:
        x: [..., I], at least one token.
        shape: (O, I).
        bias: [O], or None.
        lora_a: [R, I], or None.
        lora_b: [O, R], None exactly when `lora_a` is.

    Raises:
        ValueError: A tensor is not as described.
    """
    out_features, in_features = shape
    check_tensor("x", x, (*x.shape[:-1], in_features))
    if x.numel() == 0:
        raise ValueError(f"expected at least one token in x, found shape {list(x.shape)}")
    if bias is not None:
        check_tensor("bias", bias, (out_features,))
    if lora_a is None and lora_b is None:
        return
    if lora_a is None or lora_b is None:
        raise ValueError("expected both lora_a and lora_b or neither, found one of them")
    check_tensor("lora_a", lora_a, (None, in_features))
    check_tensor("lora_b", lora_b, (out_features, lora_a.shape[0]))


@dataclass(frozen=True, eq=False)
class KeptMatrix:
    """A checked matrix and what is kept of it.

    Attributes:
        matrix: float32, rows of consecutive elements.
        keep_rows: Sorted unique int64, None for all.
        keep_columns: Sorted unique int64, None for all.
    """

    matrix: Tensor
    keep_rows: Tensor | None
    keep_columns: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """Kept rows and columns."""
        rows, columns = self.matrix.shape
        return (
            rows if self.keep_rows is None else len(self.keep_rows),
            columns if self.keep_columns is None else len(self.keep_columns),
        )


def check_kept(name: str, matrix: Tensor, *keeps: tuple[str, Tensor | None]) -> KeptMatrix:
    """Returns a matrix with its kept rows and columns after checking all three.

    Args:
        name: What a message calls the matrix.
        matrix: [rows, columns].
        keeps: For rows, then columns: what a message calls the list, and the list.

    Raises:
        ValueError: One of them is not as described.
    """
    check_tensor(name, matrix, (None, None))
    rows, columns = (
        None if keep is None else check_keep(keep_name, keep, size)
        for (keep_name, keep), size in zip(keeps, matrix.shape, strict=True)
    )
    matrix = matrix.detach()
    return KeptMatrix(matrix if matrix.stride(1) == 1 else matrix.contiguous(), rows, columns)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device.type}"
