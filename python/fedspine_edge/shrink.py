"""Keep indices -> a physically smaller model, LoRA factors and optimiser state included.

Comes in: a model whose prunable linears may be empty shells, a way to read the base weights, and what to keep. Goes
out: the same model with a `LoRALinear` of the kept rows and columns in each prunable place. What the removed members
would have contributed on average is added to the bias of the matrix that lost their columns.

Source: FedSpine (arXiv 2501.02438), physical removal of heads and channels; FLAP (arXiv 2312.11983), mean compensation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedspine_edge import kernels
from fedspine_edge.compensation import compensation
from fedspine_edge.embeddings import hold_embeddings
from fedspine_edge.lora import LoRALinear, replace_module
from fedspine_edge.masks import Keep
from fedspine_edge.protocol import Layout, Matrix, expand_members
from fedspine_edge.structure import family_of

Factors = dict[str, tuple[Tensor, Tensor]]
ReadTensor = Callable[[str], Tensor]


@dataclass(frozen=True)
class BaseReader:
    """Where the base weights come from.

    Attributes:
        weight: Matrix name -> its base weight [O, I], float32.
        bias: Matrix name -> its base bias [O], float32, or None.
        dtype: How the weights are held once they are read: a name of `kernels.BASE_DTYPES`.
    """

    weight: ReadTensor
    bias: Callable[[str], Tensor | None]
    dtype: str = "float32"


def kept_features(
    layout: Layout, matrix: Matrix, keep: Mapping[str, np.ndarray]
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the kept rows and columns of a matrix as int64 indices; None where all stay."""
    return (
        _features(layout, matrix.out_group, matrix.out_features, keep),
        _features(layout, matrix.in_group, matrix.in_features, keep),
    )


def _features(layout: Layout, group: str | None, features: int, keep: Mapping[str, np.ndarray]) -> Tensor | None:
    if group is None:
        return None
    num_members = layout.group(group).num_members
    if len(keep[group]) == num_members:
        return None
    return torch.from_numpy(expand_members(keep[group], num_members, features))


def shrunk_parts(
    layout: Layout, matrix: Matrix, keep: Mapping[str, np.ndarray], *, base: BaseReader, mean_input: np.ndarray | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Returns the whole base weight of a matrix, its kept rows, its kept columns and its kept, compensated bias."""
    rows, columns = kept_features(layout, matrix, keep)
    weight, bias = base.weight(matrix.name), base.bias(matrix.name)
    extra = compensation(weight, columns, mean_input)
    if extra is not None:
        bias = extra if bias is None else bias + extra
    if bias is not None and rows is not None:
        bias = bias[rows]
    return weight, rows, columns, bias


def install(
    model: nn.Module,
    layout: Layout,
    keep: Keep,
    factors: Factors,
    *,
    base: BaseReader,
    scaling: float,
    mean_inputs: Mapping[str, np.ndarray],
) -> dict[str, LoRALinear]:
    """Puts a shrunk `LoRALinear` in the place of each matrix of the layout; embeddings are held in the same dtype.

    Args:
        model: The model; its other parameters are loaded, its prunable linears may be empty.
        layout: The unpruned model's layout.
        keep: Members that stay.
        factors: Matrix name -> (lora_a [R, I kept], lora_b [O kept, R]), float32.
        base: Where the base weights come from.
        scaling: alpha / rank.
        mean_inputs: Matrix name -> mean input [I] for the compensation; may lack matrices.

    Returns:
        Matrix name -> the layer now in the model.
    """
    linears: dict[str, LoRALinear] = {}
    for matrix in layout.matrices:
        weight, rows, columns, bias = shrunk_parts(
            layout, matrix, keep, base=base, mean_input=mean_inputs.get(matrix.name)
        )
        packed = kernels.pack(weight, keep_out=rows, keep_in=columns, dtype=base.dtype)
        lora_a, lora_b = factors[matrix.name]
        linear = LoRALinear(packed, bias=bias, lora_a=lora_a, lora_b=lora_b, scaling=scaling)
        replace_module(model, matrix.name, linear)
        linears[matrix.name] = linear
    fit_attention(model, layout, keep)
    hold_embeddings(model, base.weight, base.dtype)
    return linears


def slice_factors(layout: Layout, factors: Factors, keep: Keep, narrower: Keep) -> Factors:
    """Returns the factors at the rows and columns of `narrower`, a subset of `keep`, at which they are now."""
    return {
        matrix.name: _slice_pair(factors[matrix.name], *positions_of(layout, matrix, keep, narrower))
        for matrix in layout.matrices
    }


def _slice_pair(pair: tuple[Tensor, Tensor], rows: Tensor | None, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    lora_a, lora_b = pair
    return (
        lora_a if columns is None else lora_a.index_select(1, columns),
        lora_b if rows is None else lora_b.index_select(0, rows),
    )


def positions_of(layout: Layout, matrix: Matrix, keep: Keep, narrower: Keep) -> tuple[Tensor | None, Tensor | None]:
    """Returns where the rows and columns of `narrower` stand among those of `keep`; None without a group."""

    def positions(group: str | None, features: int) -> Tensor | None:
        if group is None:
            return None
        num_members = layout.group(group).num_members
        wide = expand_members(keep[group], num_members, features)
        return torch.from_numpy(np.searchsorted(wide, expand_members(narrower[group], num_members, features)))

    return positions(matrix.out_group, matrix.out_features), positions(matrix.in_group, matrix.in_features)


def fit_attention(model: nn.Module, layout: Layout, keep: Mapping[str, np.ndarray]) -> None:
    """Tells attention modules that carry a position bias a head (MPNet) which heads they still have."""
    config: Any = model.config
    family = family_of(config)
    if family.position_bias is None:
        return
    earlier = getattr(config, "position_bias_heads", None)  # of a model that was pruned before
    for layer in range(int(getattr(config, family.num_layers))):
        attention: Any = model.get_submodule(f"{family.layers.format(layer)}.{family.position_bias}")
        heads = torch.from_numpy(keep[f"layers.{layer}.heads"].astype(np.int64))
        heads = heads if earlier is None else torch.tensor(earlier[layer])[heads]
        attention.all_head_size = len(heads) * attention.attention_head_size
        attention.kept_heads = heads  # read by a fused layer; a stock one is handed its heads' bias
        _select_position_bias(attention, heads)


def _select_position_bias(attention: Any, heads: Tensor) -> None:
    if hasattr(attention, "position_bias_hook"):
        attention.position_bias_hook.remove()

    def select(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_states, attention_mask, position_bias, *rest = arguments
        return (hidden_states, attention_mask, position_bias.index_select(1, heads), *rest)

    attention.position_bias_hook = attention.register_forward_pre_hook(select)
