"""A transformers model on our own kernels.

Comes in: a model as transformers builds it. Goes out: the same model, in place: a decoder's norms, MLPs and attention,
or an encoder's layers, are those of `fused_layers`; parameters keep their names and are not copied, and the linears
stay at their paths.

To add a family, add the names of its classes to `DECODERS`, or of its layer's parts to `ENCODERS`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from fedspine_edge.fused_layers import EncoderNames, FusedAttention, FusedEncoderLayer, FusedMLP, FusedRMSNorm
from fedspine_edge.lora import replace_module


@dataclass(frozen=True)
class DecoderParts:
    """The classes of a decoder family that are replaced.

    Attributes:
        module: The module of transformers that defines them.
        norm: RMSNorm: a `weight`, and a `variance_epsilon`.
        mlp: down_proj(act(gate_proj(x)) * up_proj(x)).
        attention: Causal, with rotary positions.
    """

    module: str
    norm: str
    mlp: str
    attention: str


@dataclass(frozen=True)
class EncoderParts:
    """The layer class of an encoder family and what it is made of.

    Attributes:
        module: The module of transformers that defines it.
        layer: The class: post-norm, with a residual around the attention and around the feed-forward block.
        names: Where its parts are.
        activation: The config's name for the activation; the next one likewise.
        num_heads: Heads of an unpruned layer.
        hidden_size: Residual width.
    """

    module: str
    layer: str
    names: EncoderNames
    activation: str = "hidden_act"
    num_heads: str = "num_attention_heads"
    hidden_size: str = "hidden_size"


def _decoder(name: str) -> DecoderParts:
    module = f"transformers.models.{name.lower()}.modeling_{name.lower()}"
    return DecoderParts(module, f"{name}RMSNorm", f"{name}MLP", f"{name}Attention")


def _names(attention: tuple[str, str, str], out: str, norm: str, position_bias: str | None = None) -> EncoderNames:
    return EncoderNames(attention, out, norm, "intermediate.dense", "output.dense", "output.LayerNorm", position_bias)


_BERT = _names(
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output.dense",
    "attention.output.LayerNorm",
)
_MPNET = _names(
    ("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    "attention.attn.o",
    "attention.LayerNorm",
    position_bias="attention.attn",
)
_DISTILBERT = EncoderNames(
    ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    "attention.out_lin",
    "sa_layer_norm",
    "ffn.lin1",
    "ffn.lin2",
    "output_layer_norm",
)

DECODERS = {"llama": _decoder("Llama"), "mistral": _decoder("Mistral"), "qwen2": _decoder("Qwen2")}
ENCODERS = {
    "bert": EncoderParts("transformers.models.bert.modeling_bert", "BertLayer", _BERT),
    "roberta": EncoderParts("transformers.models.roberta.modeling_roberta", "RobertaLayer", _BERT),
    "mpnet": EncoderParts("transformers.models.mpnet.modeling_mpnet", "MPNetLayer", _MPNET),
    "distilbert": EncoderParts(
        "transformers.models.distilbert.modeling_distilbert",
        "TransformerBlock",
        _DISTILBERT,
        activation="activation",
        num_heads="n_heads",
        hidden_size="dim",
    ),
}
SILU = ("silu", "swish")  # transformers' two names of one activation


def fuse(model: Any) -> None:
    """Replaces the parts of a model that have a fused counterpart, in place; any other model stays as it is.

    The parameters, their names and their order do not change. An MLP of another activation than SiLU stays, and so
    does an encoder of another activation than GELU, or one that is used as a decoder.

    Args:
        model: A transformers model.
    """
    if model.config.model_type in DECODERS:
        _fuse_decoder(model, DECODERS[model.config.model_type])
    elif model.config.model_type in ENCODERS:
        _fuse_encoder(model, ENCODERS[model.config.model_type])


def _fuse_decoder(model: Any, parts: DecoderParts) -> None:
    module = importlib.import_module(parts.module)
    norm, mlp, attention = (getattr(module, name) for name in (parts.norm, parts.mlp, parts.attention))
    gated_by_silu = model.config.hidden_act in SILU
    for path, old in list(model.named_modules()):
        if type(old) is norm:
            replace_module(model, path, FusedRMSNorm(old.weight, epsilon=old.variance_epsilon))
        elif type(old) is mlp and gated_by_silu:
            replace_module(model, path, FusedMLP(old.gate_proj, old.up_proj, old.down_proj))
        elif type(old) is attention:
            replace_module(model, path, FusedAttention(old))


def _fuse_encoder(model: Any, parts: EncoderParts) -> None:
    config = model.config
    if getattr(config, parts.activation) != "gelu" or getattr(config, "is_decoder", False):
        return
    layer = getattr(importlib.import_module(parts.module), parts.layer)
    head_dim = getattr(config, parts.hidden_size) // getattr(config, parts.num_heads)
    for path, old in list(model.named_modules()):
        if type(old) is layer:
            replace_module(model, path, FusedEncoderLayer(old, parts.names, head_dim=head_dim))
