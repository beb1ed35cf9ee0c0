"""The meaning of every kernel in plain torch, no tricks: what `kernels` must compute, in any floating dtype.

Tensors in, tensors out; differentiable by autograd; nothing is checked here. Shape letters: T tokens, I in, O out,
R rank, K kept, B batch, H heads, G KV heads, D head size, V vocabulary.

Source: LoRA (arXiv 2106.09685) for the layer; LoRAPrune (arXiv 2305.18403) for the importance; RMSNorm
(arXiv 1910.07467); LayerNorm (arXiv 1607.06450); SwiGLU (arXiv 2002.05202); GELU (arXiv 1606.08415); attention (arXiv
1706.03762) with rotary positions (arXiv 2104.09864).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fedspine_edge.dropout import Dropout

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


def pack(weight: Tensor, dtype: str = "float32") -> tuple[Tensor, Tensor | None]:
    """Returns a weight [O, I] as panels of 32 outputs, [ceil(O / 32), I, 32], zeros beyond the last output.

    Args:
        weight: [O, I], float32.
        dtype: `float32`, `bfloat16` (the nearest, ties to even), or `int8`: codes of -127 to 127 times the output's
            scale, its largest |w| / 127; NaN when one is not finite.

    Returns:
        The panels, and of int8 the scales [ceil(O / 32), 32].
    """
    out_features, in_features = weight.shape
    num_panels = -(-out_features // PANEL_WIDTH)
    padded = weight.new_zeros(num_panels * PANEL_WIDTH, in_features)
    padded[:out_features] = weight
    scales = None
    if dtype == "int8":
        finite = padded.isfinite().all(dim=1)
        scales = torch.where(finite, padded.abs().amax(dim=1) / 127, torch.nan)
        codes = (padded / scales[:, None]).round().clamp(-127, 127)
        padded, scales = torch.where(scales[:, None] > 0, codes, 0.0), scales.view(num_panels, PANEL_WIDTH)
    panels = padded.reshape(num_panels, PANEL_WIDTH, in_features).transpose(1, 2).contiguous()
    return panels.to(getattr(torch, dtype)), scales


def unpack(panels: Tensor, scales: Tensor | None, out_features: int) -> Tensor:
    """Returns the weight [O, I] that panels stand for."""
    num_panels, in_features, _ = panels.shape
    values = panels.float() if scales is None else panels.float() * scales[:, None]
    return values.transpose(1, 2).reshape(num_panels * PANEL_WIDTH, in_features)[:out_features].contiguous()


def lora_linear(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    dropout: Dropout | None = None,
) -> Tensor:
    """Returns x W^T + bias + scaling D(x A^T) B^T, D the dropout.

    Args:
        x: [..., I].
        weight: [O, I].
        bias: [O], or None.
        lora_a: [R, I], or None for no low-rank pair.
        lora_b: [O, R], None exactly when `lora_a` is.
        scaling: alpha / rank.
        dropout: Of the low-rank values, or None.

    Returns:
        [..., O].
    """
    y = x @ weight.T
    if bias is not None:
        y = y + bias
    if lora_a is not None and lora_b is not None:
        hidden = x @ lora_a.T
        if dropout is not None:
            tokens, rank = x.shape[:-1].numel(), len(lora_a)
            hidden = hidden * dropout_factors(tokens, rank, dropout).to(hidden.dtype).view_as(hidden)
        y = y + scaling * hidden @ lora_b.T
    return y


def dropout_factors(tokens: int, rank: int, dropout: Dropout) -> Tensor:
    """Returns what dropout multiplies low-rank values by, 0 or 1 / (1 - rate), float32 [tokens, rank].

    Value r of token t looks at word r % 4 of Philox4x32-10 at counter (t, r / 4, 0, 0).
    """
    groups = -(-rank // 4)
    words = [torch.arange(tokens)[:, None].expand(tokens, groups), torch.arange(groups).expand(tokens, groups)]
    words += [torch.zeros(tokens, groups, dtype=torch.int64)] * 2
    low, key = 2**32 - 1, [dropout.key % 2**32, dropout.key >> 32]
    for _ in range(10):
        even, odd = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57  # their upper halves survive the wrap into the sign
        words = [odd >> 32 & low ^ words[1] ^ key[0], odd & low, even >> 32 & low ^ words[3] ^ key[1], even & low]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    kept = torch.stack(words, dim=-1).view(tokens, -1)[:, :rank] >= dropout.threshold
    return kept / (1 - dropout.rate)


def importance(
    weight: Tensor,
    *,
    lora_a: Tensor,
    lora_b: Tensor,
    grad_a: Tensor,
    grad_b: Tensor,
    scaling: float,
    axis: str,
    sample: tuple[int, int] = (1, 0),
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
        sample: (n, phase): of the features summed over, in blocks of 32, every n-th from `phase` modulo n on; n counts
            as the number of blocks where these are fewer.

    Returns:
        [O] or [I].
    """
    gradient = torch.cat([grad_b, lora_b], dim=1) @ torch.cat([lora_a - grad_a, grad_a], dim=0)
    scores = (gradient * (weight + scaling * lora_b @ lora_a)).abs()
    dim = 1 if axis == "out" else 0
    blocks = torch.arange(scores.shape[dim]) // PANEL_WIDTH
    step = min(sample[0], int(blocks[-1]) + 1)
    return scores.index_select(dim, (blocks % step == sample[1] % step).nonzero().flatten()).sum(dim)


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


def layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, *, epsilon: float) -> Tensor:
    """Returns (z - mean(z)) / sqrt(var(z) + epsilon) * weight + bias, z = x + residual, over the last dimension.

    Args:
        x: [..., I].
        residual: [..., I], or None for zero.
        weight: [I].
        bias: [I].
        epsilon: What keeps the root above zero.

    Returns:
        [..., I].
    """
    z = x if residual is None else x + residual
    return functional.layer_norm(z, weight.shape, weight, bias, epsilon)


def gelu(x: Tensor) -> Tensor:
    """Returns x (1 + erf(x / sqrt(2))) / 2, of any shape."""
    return functional.gelu(x)


@dataclass(frozen=True, eq=False)
class Pattern:
    """What the queries of an attention see, and how.

    Attributes:
        causal: Whether a query sees no key after itself.
        valid: Keys that are there, bool [B, T]; None when all are.
        bias: Added to the scores, [H, T, T]; takes no gradient.
        rotation: cos and sin of the rotary embedding of queries and keys, each [1 or B, T, D].
    """

    causal: bool = False
    valid: Tensor | None = None
    bias: Tensor | None = None
    rotation: tuple[Tensor, Tensor] | None = None


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Returns the rotary embedding of heads: x cos + (-second half, first half) sin.

    Args:
        x: [B, T, H, D].
        rotation: cos and sin, each [1 or B, T, D].

    Returns:
        [B, T, H, D].
    """
    cos, sin = (part.unsqueeze(2) for part in rotation)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def attention(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
    """Returns softmax(q k^T / sqrt(D) + bias) v over the keys each query sees; zeros for one that sees none.

    Args:
        q: [B, T, H, D].
        k: [B, T, G, D]; query head h reads head h // (H / G).
        v: [B, T, G, D].
        pattern: What is seen.

    Returns:
        [B, T, H, D].
    """
    if pattern.rotation is not None:
        q, k = rotate(q, pattern.rotation), rotate(k, pattern.rotation)
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
    seen = (seen.tril() if pattern.causal else seen).expand(q.shape[0], 1, -1, -1)
    if pattern.valid is not None:
        seen = seen & pattern.valid[:, None, None, :]
        v = torch.where(pattern.valid[:, None, :, None], v, 0)
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    if pattern.bias is not None:
        scores = scores + pattern.bias
    blind = ~seen.any(-1, keepdim=True)
    probabilities = torch.where(blind, 0, torch.where(seen | blind, scores, -torch.inf).softmax(-1))
    return (probabilities @ v).transpose(1, 2).contiguous()


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean of log sum exp(hidden W^T) - hidden W[target]^T over the tokens.

    Args:
        hidden: [T, I].
        weight: [V, I].
        targets: int64 [T], in [0, V).
    """
    return functional.cross_entropy(hidden @ weight.T, targets)
