"""Tiny random decoders with byte-level BPE tokenizers, shrunk by hand and saved as model directories."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from fedspine_edge.export.gguf_tokenizer import PRE_TOKENIZERS

VOCAB_SIZE = 320
TEXT = (
    "How far is it from Denver to Aspen? They'll say 12345 miles, WE'D say 2.\n\n  Où est-ce -- naïve coöperation?! "
    "def f(x):\n\treturn x**2 + 7   # 42\r\n<|eos|>End.   "
)
DENSE = ((2, 96), (2, 96), (2, 96))
UNIFORM = ((1, 64), (1, 64), (1, 64))
PER_LAYER = ((2, 32), (1, 96), (2, 64))

_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
# Wider than hidden_size / num_attention_heads, so that a head width which llama.cpp infers is wrong.
CONFIGS = {
    "llama": lambda **more: LlamaConfig(**{**_SIZES, "head_dim": 32, "tie_word_embeddings": True, **more}),
    "mistral": lambda **more: MistralConfig(**{**_SIZES, "head_dim": 32, **more}),
    "qwen2": lambda **more: Qwen2Config(**{**_SIZES, "tie_word_embeddings": True, **more}),
}


def save_decoder(
    folder: Path,
    family: str,
    widths: Sequence[tuple[int, int]] = DENSE,
    *,
    biased: bool = False,
    pre: str = "smollm",
    **config: Any,
) -> Path:
    """Writes a random decoder that keeps the last (KV heads, FFN channels) of each layer, and returns the folder.

    With `DENSE` nothing is dropped, whatever sizes `config` asks for.
    """
    torch.manual_seed(0)
    settings = CONFIGS[family](**config)
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Large enough for sharp attention: a wrong order of q rows must show.
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1 if parameter.ndim == 1 else 0.25)
    tensors = dict(model.state_dict())
    if settings.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for layer, (heads, channels) in enumerate(() if widths is DENSE else widths):
        _shrink_layer(tensors, f"model.layers.{layer}", settings, heads, channels)
    if biased:
        for layer in range(settings.num_hidden_layers):
            for matrix in ("self_attn.o_proj", "mlp.down_proj"):
                tensors[f"model.layers.{layer}.{matrix}.bias"] = torch.randn(settings.hidden_size) * 0.3
    folder.mkdir(parents=True)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    settings.save_pretrained(folder)
    save_tokenizer(folder, pre)
    if widths != DENSE:
        (folder / "fedspine_prune.json").write_text(json.dumps(prune_record(widths)))
    return folder


def prune_record(widths: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Returns the `fedspine_prune.json` of `save_decoder`'s widths."""
    groups: dict[str, Any] = {}
    for layer, (heads, channels) in enumerate(widths):
        groups[f"layers.{layer}.heads"] = {"num_members": 2, "kept": list(range(2 - heads, 2))}
        groups[f"layers.{layer}.ffn"] = {"num_members": 96, "kept": list(range(96 - channels, 96))}
    return {
        "format": 1,
        "parent_sha256": "ab" * 32,
        "criterion": "lora",
        "mode": "uniform" if len(set(widths)) == 1 else "per-layer",
        "groups": groups,
        "sparsity": 0.305,
        "base": {"name": "Tiny", "license": "apache-2.0", "organization": "nobody"},
    }


def load_decoder(folder: Path) -> nn.Module:
    """Returns the torch model of a directory, its linears as narrow as their tensors."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    tensors = load_file(folder / "model.safetensors")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight" in tensors:
            module.weight = nn.Parameter(tensors[f"{name}.weight"])
            bias = tensors.get(f"{name}.bias")
            module.bias = None if bias is None else nn.Parameter(bias)
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def torch_logits(folder: Path, token_ids: Sequence[int]) -> Any:
    """Returns what the torch model says after each token, float32 [T, V]."""
    return load_decoder(folder)(torch.tensor([list(token_ids)])).logits[0].numpy()


def some_tokens(count: int, *, seed: int = 0) -> list[int]:
    """Returns random token ids of the tiny vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB_SIZE, (count,), generator=generator).tolist()


def save_tokenizer(folder: Path, pre: str) -> None:
    """Writes a byte-level BPE tokenizer with the pre-tokenizer that llama.cpp calls `pre`."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 4,
        special_tokens=["<|eos|>", "<|bos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    if pre == "llama-bpe":
        tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|eos|>", bos_token="<|bos|>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(folder)


def _pre_tokenizer(pre: str) -> Any:
    structure = next(steps for steps, name in PRE_TOKENIZERS.items() if name == pre)
    steps = []
    for kind, setting in structure:
        if kind == "Digits":
            steps.append(pre_tokenizers.Digits(individual_digits=setting))
        elif kind == "Split":
            steps.append(pre_tokenizers.Split(Regex(setting), "isolated"))
        else:
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=setting))
    return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


def _shrink_layer(tensors: dict[str, Tensor], prefix: str, config: Any, heads: int, channels: int) -> None:
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_group = config.num_attention_heads // config.num_key_value_heads
    keep = {
        "self_attn.q_proj": (0, heads * per_group * dim),
        "self_attn.k_proj": (0, heads * dim),
        "self_attn.v_proj": (0, heads * dim),
        "self_attn.o_proj": (1, heads * per_group * dim),
        "mlp.gate_proj": (0, channels),
        "mlp.up_proj": (0, channels),
        "mlp.down_proj": (1, channels),
    }
    for matrix, (axis, count) in keep.items():
        weight = f"{prefix}.{matrix}.weight"
        tensors[weight] = tensors[weight].narrow(axis, tensors[weight].shape[axis] - count, count)
        bias = f"{prefix}.{matrix}.bias"
        if axis == 0 and bias in tensors:
            tensors[bias] = tensors[bias][-count:]
