"""What can be pruned in a model: the groups, and the rows and columns each member couples.

Comes in: a transformers config. Goes out: a `Layout` (groups, LoRA'd matrices, densely trained parameters), the same on
every device. A member of a `heads` group is a query head, or with grouped-query attention a KV head with all its query
heads; a member of an `ffn` group is one channel. Embeddings, norms, the model's head and the residual width are never
pruned.

To add a family, add one entry to `FAMILIES`: where its layers are, the names of its matrices relative to a layer, and
the names its config uses for heads, KV heads and FFN width.

Source: FedSpine (arXiv 2501.02438), structured pruning of heads and FFN channels; LLM-Pruner's coupled structures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedspine_edge.errors import IncompatibleError
from fedspine_edge.protocol import Group, Layout, Matrix

DECODER_FFN_BLOCK = 32  # quantised GGUF rows come in blocks of 32; anything else falls back to F16 and is slower
ENCODER_FFN_BLOCK = 8


@dataclass(frozen=True)
class Family:
    """The names one model family gives to the parts that are pruned together.

    Attributes:
        task: `classifier` (an encoder with a classification head) or `decoder` (a causal language model).
        layers: Path of a layer, `{}` standing for its index.
        attention_in: Matrices whose rows belong to heads: query, key, value.
        attention_out: The matrix whose columns belong to heads.
        ffn_in: Matrices whose rows are FFN channels.
        ffn_out: The matrix whose columns are FFN channels.
        unpruned: Further matrices that carry LoRA and lose nothing.
        task_head: Path prefixes of the densely trained parameters.
        position_bias: The attention module that takes one position bias a head, relative to a layer, if any.
        num_layers: The config's name for the number of layers; the next ones likewise.
    """

    task: str
    layers: str
    attention_in: tuple[str, str, str]
    attention_out: str
    ffn_in: tuple[str, ...]
    ffn_out: str
    unpruned: tuple[str, ...] = ()
    task_head: tuple[str, ...] = ()
    position_bias: str | None = None
    num_layers: str = "num_hidden_layers"
    num_heads: str = "num_attention_heads"
    num_kv_heads: str = "num_attention_heads"
    ffn_size: str = "intermediate_size"
    hidden_size: str = "hidden_size"


_LLAMA = Family(
    task="decoder",
    layers="model.layers.{}",
    attention_in=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_out="self_attn.o_proj",
    ffn_in=("mlp.gate_proj", "mlp.up_proj"),
    ffn_out="mlp.down_proj",
    num_kv_heads="num_key_value_heads",
)


def _bert_like(prefix: str, unpruned: tuple[str, ...]) -> Family:
    return Family(
        task="classifier",
        layers=prefix + ".encoder.layer.{}",
        attention_in=("attention.self.query", "attention.self.key", "attention.self.value"),
        attention_out="attention.output.dense",
        ffn_in=("intermediate.dense",),
        ffn_out="output.dense",
        unpruned=unpruned,
        task_head=("classifier",),
    )


FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "bert": _bert_like("bert", unpruned=("bert.pooler.dense",)),
    "roberta": _bert_like("roberta", unpruned=()),
    "distilbert": Family(
        task="classifier",
        layers="distilbert.transformer.layer.{}",
        attention_in=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        attention_out="attention.out_lin",
        ffn_in=("ffn.lin1",),
        ffn_out="ffn.lin2",
        task_head=("pre_classifier", "classifier"),
        num_layers="n_layers",
        num_heads="n_heads",
        num_kv_heads="n_heads",
        ffn_size="hidden_dim",
        hidden_size="dim",
    ),
    "mpnet": Family(
        task="classifier",
        layers="mpnet.encoder.layer.{}",
        attention_in=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        attention_out="attention.attn.o",
        ffn_in=("intermediate.dense",),
        ffn_out="output.dense",
        task_head=("classifier",),
        position_bias="attention.attn",
    ),
}


def family_of(config: Any) -> Family:
    """Returns the family of a transformers config.

    Raises:
        IncompatibleError: The config's `model_type` is not in `FAMILIES`.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise IncompatibleError(
            f"expected a model of a known family, found model_type {model_type!r}",
            hint=f"known families: {', '.join(sorted(FAMILIES))}",
        )
    return FAMILIES[model_type]


def layout_of(config: Any, *, base_sha256: str, task_head: tuple[tuple[str, tuple[int, ...]], ...] = ()) -> Layout:
    """Returns the layout of a model; of one that was pruned before, the layout of what it has left.

    Args:
        config: A transformers config of a known family; with `pruned_linears` where its layers differ in width.
        base_sha256: Hash of the base model's weights.
        task_head: Name and shape of each densely trained parameter.

    Raises:
        IncompatibleError: Unknown family, or head counts that do not divide.
    """
    family = family_of(config)
    num_layers = int(getattr(config, family.num_layers))
    groups: list[Group] = []
    matrices: list[Matrix] = []
    for layer in range(num_layers):
        layer_groups, layer_matrices = _layer(config, family, layer)
        groups += layer_groups
        matrices += layer_matrices
    hidden = int(getattr(config, family.hidden_size))
    matrices += [Matrix(name, hidden, hidden, None, None) for name in family.unpruned]
    return Layout(base_sha256, tuple(groups), tuple(matrices), task_head)


def _layer(config: Any, family: Family, layer: int) -> tuple[list[Group], list[Matrix]]:
    hidden, path = int(getattr(config, family.hidden_size)), family.layers.format(layer)
    widths = _widths(config, family, path)
    query, kv = widths.num_heads * widths.head_dim, widths.num_kv_heads * widths.head_dim
    heads, ffn = f"layers.{layer}.heads", f"layers.{layer}.ffn"
    per_channel = hidden * (len(family.ffn_in) + 1)
    groups = [
        Group(heads, "heads", widths.num_kv_heads, 1, hidden * (2 * query + 2 * kv) // widths.num_kv_heads),
        Group(ffn, "ffn", widths.ffn_size, _ffn_block(family, widths.ffn_size), per_channel),
    ]
    q, k, v = family.attention_in
    matrices = [
        Matrix(f"{path}.{q}", query, hidden, heads, None),
        Matrix(f"{path}.{k}", kv, hidden, heads, None),
        Matrix(f"{path}.{v}", kv, hidden, heads, None),
        Matrix(f"{path}.{family.attention_out}", hidden, query, None, heads),
        *(Matrix(f"{path}.{name}", widths.ffn_size, hidden, ffn, None) for name in family.ffn_in),
        Matrix(f"{path}.{family.ffn_out}", hidden, widths.ffn_size, None, ffn),
    ]
    return groups, matrices


@dataclass(frozen=True)
class _Widths:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int


def _widths(config: Any, family: Family, path: str) -> _Widths:
    """A layer's own widths: the config's, unless the config lists the shape of each linear."""
    num_heads = int(getattr(config, family.num_heads))
    num_kv_heads = int(getattr(config, family.num_kv_heads, None) or num_heads)
    head_dim = int(getattr(config, "head_dim", None) or int(getattr(config, family.hidden_size)) // num_heads)
    if num_heads % num_kv_heads:
        raise IncompatibleError(f"expected query heads in equal KV groups, found {num_heads} over {num_kv_heads}")
    shapes = getattr(config, "pruned_linears", None)
    if shapes is None:
        return _Widths(num_heads, num_kv_heads, head_dim, int(getattr(config, family.ffn_size)))
    q, k, _ = (shapes[f"{path}.{name}"][0] for name in family.attention_in)
    return _Widths(q // head_dim, k // head_dim, head_dim, shapes[f"{path}.{family.ffn_in[0]}"][0])


def _ffn_block(family: Family, ffn_size: int) -> int:
    block = DECODER_FFN_BLOCK if family.task == "decoder" else ENCODER_FFN_BLOCK
    while ffn_size % block:
        block //= 2
    return block


def matrices_of(layout: Layout, group_name: str) -> tuple[Matrix, ...]:
    """Returns the matrices that lose rows or columns when a member of the group goes."""
    return tuple(m for m in layout.matrices if group_name in (m.out_group, m.in_group))


def prunable_parameters(layout: Layout, kept_counts: dict[str, int] | None = None) -> int:
    """Returns the base weights in all groups, or in what is kept of them."""
    return sum(
        g.parameters_per_member * (g.num_members if kept_counts is None else kept_counts[g.name]) for g in layout.groups
    )


def measured_sparsity(layout: Layout, kept_counts: dict[str, int]) -> float:
    """Returns the share of the prunable base weights that is gone, 0..1."""
    return 1.0 - prunable_parameters(layout, kept_counts) / prunable_parameters(layout)
