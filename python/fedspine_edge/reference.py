"""The meaning of every kernel in plain torch, no tricks: what `kernels` must compute, in any floating dtype.

Tensors in, tensors out; differentiable by autograd; nothing is checked here. Shape letters: T tokens, I in, O out,
R rank, K kept.

Source: LoRA (arXiv 2106.09685) for the layer; LoRAPrune (arXiv 2305.18403) for the importance; RMSNorm
(arXiv 1910.07467); SwiGLU (arXiv 2002.05202).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

PANEL_WIDTH = 32


def gather_rows(matrix: Tensor, keep: Tensor) -> Tensor:
    """Returns the kept rows, compact.

    Args:
        matrix: [rows, columns].
        keep: Row indices, int64 [K].

    Returns:
        [K, columns].
    """
    return matrix[keep]


def gather_columns(matrix: Tensor, keep: Tensor) -> Tensor:
    """Returns the kept columns, compact.

    Args:
        matrix: [rows, columns].
        keep: Column indices, int64 [K].

    Returns:
        [rows, K].
    """
    return matrix[:, keep].contiguous()


def pack(weight: Tensor) -> Tensor:
    """Returns a weight [O, I] as panels of 32 outputs, [ceil(O / 32), I, 32], zeros beyond the last output."""
    out_features, in_features = weight.shape
    num_panels = -(-out_features // PANEL_WIDTH)
    padded = weight.new_zeros(num_panels * PANEL_WIDTH, in_features)
    padded[:out_features] = weight
    return padded.reshape(num_panels, PANEL_WIDTH, in_features).transpose(1, 2).contiguous()


def unpack(panels: Tensor, out_features: int) -> Tensor:
    """Returns the weight [O, I] that `pack` made the panels from."""
    num_panels, in_features, _ = panels.shape
    return panels.transpose(1, 2).reshape(num_panels * PANEL_WIDTH, in_features)[:out_features].contiguous()


def lora_linear(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
) -> Tensor:
    """Returns x W^T + bias + scaling (x A^T) B^T.

    Args:
        x: [..., I].
        weight: [O, I].
        bias: [O], or None.
        lora_a: [R, I], or None for no low-rank pair.
        lora_b: [O, R], None exactly when `lora_a` is.
        scaling: alpha / rank.

    Returns:
        [..., O].
    """
    y = x @ weight.T
    if bias is not None:
        y = y + bias
    if lora_a is not None and lora_b is not None:
        y = y + scaling * (x @ lora_a.T) @ lora_b.T
    return y


def importance(
    weight: Tensor,
    *,
    lora_a: Tensor,
    lora_b: Tensor,
    grad_a: Tensor,
    grad_b: Tensor,
    scaling: float,
    axis: str,
) -> Tensor:
    """Returns the row sums or column sums of |G * (W + scaling B A)|, G = dB A + B dA - dB dA.

    Args:
        weight: [O, I].
        lora_a: [R, I].
        lora_b: [O, R].
        grad_a: Gradient of `lora_a`.
        grad_b: Gradient of `lora_b`.
        scaling: alpha / rank.
        axis: `out` for a score of each output, `in` of each input.

    Returns:
        [O] or [I].
    """
    gradient = torch.cat([grad_b, lora_b], dim=1) @ torch.cat([lora_a - grad_a, grad_a], dim=0)
    scores = (gradient * (weight + scaling * lora_b @ lora_a)).abs()
    return scores.sum(dim=1 if axis == "out" else 0)


def rms_norm(x: Tensor, weight: Tensor, *, epsilon: float) -> Tensor:
    """Returns x / sqrt(mean(x^2) + epsilon) * weight, the mean over the last dimension.

    Args:
        x: [..., I].
        weight: [I].
        epsilon: What keeps the root above zero.

    Returns:
        [..., I].
    """
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Returns silu(gate) * up = gate / (1 + exp(-gate)) * up, of any one shape."""
    return functional.silu(gate) * up
