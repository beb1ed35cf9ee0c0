"""A pruned model's config and tensors -> what transformers' own loaders take.

Comes in: the unpruned model's config, what is kept of each group and the shrunk tensors. Goes out: a config and the
biases it implies. With the same widths in every layer a decoder becomes an ordinary model that carries the pruned
widths, loaded by stock transformers. With different widths, for encoders that lost heads (their configs have no head
width) and where no stock class has the biases, the config names the class in `modeling_pruned.py`, which travels along.

Source: transformers' model directory, `auto_map` for custom models.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from fedspine_edge.structure import family_of

MODELING_FILE = "modeling_pruned.py"
PRUNED_CLASSES = {
    "llama": "PrunedLlamaForCausalLM",
    "mistral": "PrunedMistralForCausalLM",
    "qwen2": "PrunedQwen2ForCausalLM",
    "bert": "PrunedBertForSequenceClassification",
    "roberta": "PrunedRobertaForSequenceClassification",
    "distilbert": "PrunedDistilBertForSequenceClassification",
    "mpnet": "PrunedMPNetForSequenceClassification",
}
"""Family -> the class of `modeling_pruned.py` for it."""

STOCK_DECODERS = {
    "llama": (LlamaConfig, "LlamaForCausalLM"),
    "mistral": (MistralConfig, "MistralForCausalLM"),
    "qwen2": (Qwen2Config, "Qwen2ForCausalLM"),
}
_STOCK_BIASES = {"mistral": (), "qwen2": ("q_proj", "k_proj", "v_proj")}
_OWN_SETTINGS = ("auto_map", "architectures", "pruned_linears", "position_bias_heads")
_FAMILY_SETTINGS = (
    *("model_type", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
    *("attention_bias", "mlp_bias", "pretraining_tp"),
)


def unpruned_widths(config: Any) -> dict[str, Any]:
    """Returns the family and the widths of an unpruned model, by their names in a Llama config."""
    family = family_of(config)
    num_heads = int(getattr(config, family.num_heads))
    return {
        "model_type": config.model_type,
        "num_attention_heads": num_heads,
        "num_key_value_heads": int(getattr(config, family.num_kv_heads, None) or num_heads),
        "head_dim": int(getattr(config, "head_dim", None) or getattr(config, family.hidden_size) // num_heads),
        "intermediate_size": int(getattr(config, family.ffn_size)),
    }


def write_config(
    folder: Path, config: Any, keep: Mapping[str, np.ndarray], tensors: Mapping[str, Tensor], linears: Iterable[str]
) -> dict[str, Tensor]:
    """Writes `config.json`, and the model class where stock transformers has none that fits.

    Args:
        folder: The directory, there already.
        config: The unpruned model's transformers config.
        keep: Members that stay in each group, in the numbering of the model before any pruning.
        tensors: The pruned model's, by name; matrices [O kept, I kept].
        linears: Names of the prunable matrices.

    Returns:
        Biases of zero that the config implies beyond `tensors`, float32 [O kept].
    """
    linears = list(linears)
    stock = _stock_config(config, keep, tensors, linears)
    if stock is not None:
        stock.save_pretrained(folder)
        return _implied_biases(stock, tensors, linears)
    own = copy.deepcopy(config)
    auto_class = "AutoModelForCausalLM" if family_of(config).task == "decoder" else "AutoModelForSequenceClassification"
    own.auto_map = {auto_class: f"{Path(MODELING_FILE).stem}.{PRUNED_CLASSES[config.model_type]}"}
    own.architectures = [PRUNED_CLASSES[config.model_type]]
    own.dtype = torch.float32
    own.pruned_linears = {name: [*tensors[f"{name}.weight"].shape, f"{name}.bias" in tensors] for name in linears}
    if family_of(config).position_bias:
        own.position_bias_heads = [keep[name].tolist() for name in keep if name.endswith(".heads")]
    own.save_pretrained(folder)
    shutil.copyfile(Path(__file__).with_name(MODELING_FILE), folder / MODELING_FILE)
    return {}


def _stock_config(
    config: Any, keep: Mapping[str, np.ndarray], tensors: Mapping[str, Tensor], linears: list[str]
) -> Any | None:
    """Returns a config with which a class of transformers is this model, None when there is none."""
    family, whole = family_of(config), unpruned_widths(config)
    kept_heads = {len(members) for name, members in keep.items() if name.endswith(".heads")}
    kept_ffn = {len(members) for name, members in keep.items() if name.endswith(".ffn")}
    if len(kept_heads) > 1 or len(kept_ffn) > 1:
        return None
    num_kv_heads, widths = kept_heads.pop(), {family.ffn_size: kept_ffn.pop(), "dtype": torch.float32}
    if family.task != "decoder":
        if num_kv_heads != whole["num_key_value_heads"]:
            return None
        return type(config).from_dict(_without(config.to_dict(), _OWN_SETTINGS) | widths)
    widths["head_dim"] = whole["head_dim"]
    widths["num_key_value_heads"] = num_kv_heads
    widths["num_attention_heads"] = num_kv_heads * (whole["num_attention_heads"] // whole["num_key_value_heads"])
    return _stock_decoder(config, widths, {name for name in linears if f"{name}.bias" in tensors})


def _stock_decoder(config: Any, widths: dict[str, Any], biased: set[str]) -> Any | None:
    """Returns a decoder's config of these widths whose class has these biases (and perhaps more), None without one.

    Llama alone has switches for biases everywhere, but takes only head counts that divide the hidden size. Mistral and
    Qwen2 are its mathematics but for a sliding window, so one may go out as another.
    """
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    windowed = bool(window) and window < config.max_position_embeddings
    biased_leaves = {name.rpartition(".")[2] for name in biased}
    choices: dict[str, bool] = {
        model_type: biased_leaves <= set(leaves) for model_type, leaves in _STOCK_BIASES.items()
    }
    choices["llama"] = config.hidden_size % widths["num_attention_heads"] == 0
    for model_type in (config.model_type, "llama", "mistral"):
        if choices[model_type] and (model_type == config.model_type or not windowed):
            break
    else:
        return None
    facts = _without(config.to_dict(), _OWN_SETTINGS) | widths
    if model_type != config.model_type:
        facts = _without(facts, _FAMILY_SETTINGS) | {"sliding_window": None}
    if model_type == "llama":
        facts.pop("sliding_window", None)
        facts["attention_bias"] = any(".self_attn." in name for name in biased)
        facts["mlp_bias"] = any(".mlp." in name for name in biased)
    facts["architectures"] = [STOCK_DECODERS[model_type][1]]
    return STOCK_DECODERS[model_type][0].from_dict(facts)


def _without(facts: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key not in names}


def _implied_biases(config: Any, tensors: Mapping[str, Tensor], linears: list[str]) -> dict[str, Tensor]:
    if config.model_type != "llama":
        return {}
    implied = {}
    for name in linears:
        wanted = config.attention_bias if ".self_attn." in name else config.mlp_bias
        if wanted and f"{name}.bias" not in tensors:
            implied[f"{name}.bias"] = torch.zeros(tensors[f"{name}.weight"].shape[0])
    return implied
