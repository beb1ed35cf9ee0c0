"""Parts of transformers' models on our own kernels: norms, feed-forward blocks, attention, an encoder's layer.

Comes in: the linears and weights of a stock module. Goes out: a module that takes the same call; parameters keep their
names and are not copied, and the linears stay at their paths, where LoRA layers take their places later. There is no
dropout: a local round has none.

Source: RMSNorm (arXiv 1910.07467); SwiGLU (arXiv 2002.05202); FlashAttention (arXiv 2205.14135); BERT (arXiv
1810.04805) for the encoder's layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedspine_edge import elementwise
from fedspine_edge.attention import Pattern, attention
from fedspine_edge.reference import rotate


class FusedRMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + epsilon) * weight.

    Args:
        weight: [I], float32; used as it is, not copied.
        epsilon: What keeps the root above zero.
    """

    def __init__(self, weight: nn.Parameter, *, epsilon: float) -> None:
        super().__init__()
        self.weight = weight
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Returns y [..., I] for x [..., I]."""
        return elementwise.rms_norm(x, self.weight, epsilon=self.epsilon)


class FusedMLP(nn.Module):
    """y = down_proj(silu(gate_proj(x)) * up_proj(x)).

    Args:
        gate_proj: Residual width to channels.
        up_proj: The same.
        down_proj: Channels to residual width.
    """

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_proj = gate_proj
        self.up_proj = up_proj
        self.down_proj = down_proj

    def forward(self, x: Tensor) -> Tensor:
        """Returns y [..., I] for x [..., I]."""
        y: Tensor = self.down_proj(elementwise.swiglu(self.gate_proj(x), self.up_proj(x)))
        return y


class FusedAttention(nn.Module):
    """Causal attention of a decoder with rotary positions; as many heads as the projections have outputs for.

    With a key-value cache or a mask of its own (padding on the left, a sliding window) torch's attention is used.

    Args:
        stock: An attention module of the Llama family.
    """

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = stock.q_proj, stock.k_proj, stock.v_proj
        self.o_proj = stock.o_proj
        self.head_dim: int = stock.head_dim
        self.layer_idx: int = stock.layer_idx

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Returns the output [B, T, I] for hidden states [B, T, I], and no probabilities."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(hidden_states).unflatten(-1, (-1, self.head_dim)) for project in projections)
        if attention_mask is None and past_key_values is None:
            out = attention(q, k, v, Pattern(causal=True, rotation=position_embeddings))
        else:
            q, k = rotate(q, position_embeddings), rotate(k, position_embeddings)
            out = self._with_torch(q, k, v, attention_mask, past_key_values)
        return self.o_proj(out.flatten(2)), None

    def _with_torch(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        causal = mask is None and q.shape[2] > 1
        out = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)
        return out.transpose(1, 2)


@dataclass(frozen=True)
class EncoderNames:
    """Where an encoder's layer has its parts, relative to the layer.

    Attributes:
        attention_in: The query, key and value projections.
        attention_out: What follows the attention.
        attention_norm: The norm after it.
        ffn_in: Residual width to channels.
        ffn_out: Channels to residual width.
        ffn_norm: The norm after it.
        position_bias: The attention module that knows which heads of a position bias it kept, if any.
    """

    attention_in: tuple[str, str, str]
    attention_out: str
    attention_norm: str
    ffn_in: str
    ffn_out: str
    ffn_norm: str
    position_bias: str | None = None


class FusedEncoderLayer(nn.Module):
    """A post-norm encoder layer: x = norm(x + attention(x)), then norm(x + ffn_out(gelu(ffn_in(x)))).

    Args:
        stock: The layer it takes the parts of, under their names.
        names: Where they are.
        head_dim: Size of a head.
    """

    def __init__(self, stock: nn.Module, names: EncoderNames, *, head_dim: int) -> None:
        super().__init__()
        for name, child in stock.named_children():
            self.add_module(name, child)
        self.names = names
        self.head_dim = head_dim

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, position_bias: Tensor | None = None, **_: Any
    ) -> Any:
        """Returns the output [B, T, I]; where there is a position bias, in a tuple, as MPNet's encoder expects it.

        Args:
            hidden_states: [B, T, I].
            attention_mask: [B, T], or what transformers makes of it: [B, 1, 1 or T, T], bool or added to the scores.
            position_bias: [B, heads before pruning, T, T], the same in each row.
        """
        part, names = self.get_submodule, self.names
        q, k, v = (part(name)(hidden_states).unflatten(-1, (-1, self.head_dim)) for name in names.attention_in)
        pattern = Pattern(valid=valid_keys(attention_mask), bias=self._kept_bias(position_bias))
        attended = part(names.attention_out)(attention(q, k, v, pattern).flatten(2))
        middle = _normalised(attended, hidden_states, part(names.attention_norm))
        channels = elementwise.gelu(part(names.ffn_in)(middle))
        out = _normalised(part(names.ffn_out)(channels), middle, part(names.ffn_norm))
        return out if names.position_bias is None else (out,)

    def _kept_bias(self, position_bias: Tensor | None) -> Tensor | None:
        if position_bias is None or self.names.position_bias is None:
            return None
        heads = getattr(self.get_submodule(self.names.position_bias), "kept_heads", None)
        return position_bias[0] if heads is None else position_bias[0].index_select(0, heads)


def _normalised(x: Tensor, residual: Tensor, norm: Any) -> Tensor:
    return elementwise.layer_norm(x, residual, norm.weight, norm.bias, epsilon=norm.eps)


def valid_keys(mask: Tensor | None) -> Tensor | None:
    """Returns which keys an encoder's mask leaves, bool [B, T]; None when all.

    Args:
        mask: [B, T] or [B, 1, 1 or T, T]; bool or integer, true where a key is there, or float, zero where it is.
    """
    if mask is None:
        return None
    if mask.dim() == 4:
        mask = mask[:, 0, -1]
    return mask == 0 if torch.is_floating_point(mask) else mask != 0
