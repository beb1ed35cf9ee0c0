"""Tiny random models with word-level tokenizers, saved as real model directories; one a family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    LlamaConfig,
    MistralConfig,
    MPNetConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    RobertaConfig,
)

WORDS = [
    *("how", "far", "who", "is", "he", "many", "number", "human"),
    *("Label", ":", "?", "they", "that", "place", "where"),
]
SPECIAL = ["<pad>", "<unk>", "<eos>", "<cls>"]
VOCABULARY = {word: index for index, word in enumerate(SPECIAL + WORDS)}

_DECODER = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 160,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
}
_ENCODER = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,
    "pad_token_id": 0,
}

CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_DECODER, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**_DECODER),
    "qwen2": lambda: Qwen2Config(**{k: v for k, v in _DECODER.items() if k != "head_dim"}),
    "bert": lambda: BertConfig(**_ENCODER),
    "roberta": lambda: RobertaConfig(**_ENCODER),
    "mpnet": lambda: MPNetConfig(**_ENCODER),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=len(VOCABULARY),
        dim=32,
        hidden_dim=48,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=160,
        pad_token_id=0,
    ),
}
DECODERS = ("llama", "mistral", "qwen2")


def save_tiny_model(folder: Path, family: str, *, seed: int = 0) -> Path:
    """Writes a random model of a family with its tokenizer and returns the folder."""
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    if family in DECODERS:
        model = AutoModelForCausalLM.from_config(config)
    else:
        config.num_labels = 2
        model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-0.1, 0.1)
    model.save_pretrained(folder)
    tiny_tokenizer(decoder=family in DECODERS).save_pretrained(folder)
    return folder


def tiny_tokenizer(*, decoder: bool) -> PreTrainedTokenizerFast:
    """Returns a tokenizer that splits at white space and knows `WORDS`."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if not decoder:
        tokenizer.post_processor = processors.TemplateProcessing(single="<cls> $A", special_tokens=[("<cls>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", cls_token="<cls>"
    )


def questions(count: int = 24) -> list[tuple[str, str]]:
    """Returns (text, label) pairs of two classes that a model can tell apart by their first word."""
    number = [f"how {a} is {b} ?" for a in ("far", "many") for b in ("he", "they", "that", "place", "where", "who")]
    human = [f"who is {b} {a} ?" for a in ("far", "many") for b in ("he", "they", "that", "place", "where", "how")]
    pairs = [(text, "number") for text in number] + [(text, "human") for text in human]
    return pairs[: count // 2] + pairs[len(number) : len(number) + count // 2]
