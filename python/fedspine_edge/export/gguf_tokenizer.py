"""The tokenizer's keys of a GGUF file: copied from another GGUF file, or converted from `tokenizer.json`.

In: a model directory. Out: GGUF keys with their types. Only byte-level BPE is converted, and only with a
pre-tokenizer that llama.cpp has under a name: it hard-codes their regular expressions, and a wrong one splits numbers
or contractions differently without a word. transformers' reading of a GGUF tokenizer loses the digit splitting, so a
base that came as GGUF names its file for copying.

Source: GGUF specification, tokenizer keys; llama.cpp src/llama-vocab.cpp (regular expressions and defaults).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFValueType, TokenType
from tokenizers import Tokenizer

from fedspine_edge.errors import CheckpointError, IncompatibleError
from fedspine_edge.export.model_directory import ModelDirectory, read_json

TokenizerFields = dict[str, tuple[Any, GGUFValueType, GGUFValueType | None]]
"""Key -> (value, type, type of an array's items)."""

_GPT2_SPLIT = ("ByteLevel", True)
_PLAIN_BYTES = ("ByteLevel", False)
_LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_REGEX = _LLAMA3_REGEX.replace(r"\p{N}{1,3}", r"\p{N}")
PRE_TOKENIZERS: Mapping[tuple[tuple[str, Any], ...], str] = {
    (("Digits", True), _GPT2_SPLIT): "smollm",
    (_GPT2_SPLIT,): "gpt-2",
    (("Split", _LLAMA3_REGEX), _PLAIN_BYTES): "llama-bpe",
    (("Split", _QWEN2_REGEX), _PLAIN_BYTES): "qwen2",
}
"""Structure of the pre-tokenizer -> llama.cpp's name of it."""

_ADVICE = "name a GGUF file of the same base model to copy the tokenizer from"
_SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def read_tokenizer(model: ModelDirectory, tokenizer_gguf: Path | None) -> TokenizerFields:
    """Returns the tokenizer of a model directory as GGUF keys.

    Args:
        model: The directory.
        tokenizer_gguf: GGUF file to copy from; None takes the file the base names, else converts `tokenizer.json`.

    Raises:
        CheckpointError: A file is missing or damaged.
        IncompatibleError: The tokenizer is of a kind that is not converted, or has not the model's vocabulary.
    """
    named = model.base.get("tokenizer_gguf")
    if tokenizer_gguf is None and named and Path(named).is_file():
        tokenizer_gguf = Path(named)
    fields = _copy(tokenizer_gguf) if tokenizer_gguf is not None else _convert(model)
    count, expected = len(fields["tokenizer.ggml.tokens"][0]), model.config["vocab_size"]
    if count != expected:
        raise IncompatibleError(f"expected a tokenizer of {expected} tokens, found {count}", hint=_ADVICE)
    return fields


def _copy(path: Path) -> TokenizerFields:
    try:
        reader = GGUFReader(path)
    except (OSError, ValueError, IndexError) as error:
        raise CheckpointError(f"expected a whole GGUF file at {path}: {error}") from error
    fields: TokenizerFields = {}
    for key, value in reader.fields.items():
        if key.startswith("tokenizer."):
            fields[key] = (value.contents(), value.types[0], value.types[-1] if len(value.types) > 1 else None)
    if "tokenizer.ggml.tokens" not in fields:
        raise IncompatibleError(f"expected a tokenizer in {path.name}, found none")
    return fields


def _convert(model: ModelDirectory) -> TokenizerFields:
    path = model.path / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"expected a readable tokenizer.json in {model.path}, found none", hint=_ADVICE)
    document = read_json(path)
    bpe = document.get("model") or {}
    if bpe.get("type") != "BPE" or bpe.get("byte_fallback"):
        raise IncompatibleError(
            f"expected a byte-level BPE tokenizer, found {bpe.get('type')!r} in tokenizer.json", hint=_ADVICE
        )
    pre = pre_tokenizer_name(document)
    if bool(bpe.get("ignore_merges")) != (pre == "llama-bpe"):
        raise IncompatibleError(
            f"expected ignore_merges as llama.cpp's {pre} has it, found {bpe.get('ignore_merges')}", hint=_ADVICE
        )
    tokens, types = _tokens(document, model.config["vocab_size"])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    string, array = GGUFValueType.STRING, GGUFValueType.ARRAY
    fields: TokenizerFields = {
        "tokenizer.ggml.model": ("gpt2", string, None),
        "tokenizer.ggml.pre": (pre, string, None),
        "tokenizer.ggml.tokens": (tokens, array, string),
        "tokenizer.ggml.token_type": (types, array, GGUFValueType.INT32),
        "tokenizer.ggml.merges": (merges, array, string),
        "tokenizer.ggml.add_space_prefix": (False, GGUFValueType.BOOL, None),
    }
    settings = _settings(model.path)
    ids = _special_ids(settings, model.config, {token: index for index, token in enumerate(tokens)})
    for key, index in ids.items():
        fields[f"tokenizer.ggml.{_SPECIAL_TOKENS[key]}_token_id"] = (index, GGUFValueType.UINT32, None)
    for key, added in _adds_ends(path, ids).items():
        fields[f"tokenizer.ggml.add_{key}_token"] = (added, GGUFValueType.BOOL, None)
    template = _chat_template(model.path, settings)
    if template:
        fields["tokenizer.chat_template"] = (template, string, None)
    return fields


def pre_tokenizer_name(document: Mapping[str, Any]) -> str:
    """Returns llama.cpp's name for the pre-tokenizer of a `tokenizer.json`.

    Raises:
        IncompatibleError: Its structure is none of `PRE_TOKENIZERS`.
    """
    node = document.get("pre_tokenizer") or {}
    steps = node.get("pretokenizers", [node])
    structure = tuple(_step(step) for step in steps)
    if structure not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS.values())
        found = "+".join(kind for kind, _ in structure)
        raise IncompatibleError(f"expected a pre-tokenizer of kind {known}, found another: {found}", hint=_ADVICE)
    return PRE_TOKENIZERS[structure]


def _step(step: Mapping[str, Any]) -> tuple[str, Any]:
    kind = str(step.get("type"))
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return kind, bool(step.get("use_regex", True))
    if kind == "Digits":
        return kind, bool(step.get("individual_digits"))
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return kind, (step.get("pattern") or {}).get("Regex")
    return kind, None


def _tokens(document: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [int(TokenType.UNUSED)] * vocab_size
    added = {token["content"]: token for token in document.get("added_tokens", [])}
    entries = {**document["model"]["vocab"], **{content: token["id"] for content, token in added.items()}}
    for content, index in entries.items():
        if not 0 <= index < vocab_size:
            raise IncompatibleError(f"expected token ids below {vocab_size}, found {index} for {content!r}")
        tokens[index], types[index] = content, int(TokenType.NORMAL)
        if content in added:
            types[index] = int(TokenType.CONTROL if added[content].get("special") else TokenType.USER_DEFINED)
    return tokens, types


def _settings(directory: Path) -> dict[str, Any]:
    path = directory / "tokenizer_config.json"
    return read_json(path) if path.exists() else {}


def _special_ids(settings: Mapping[str, Any], config: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, int]:
    """Returns the ids of bos, eos, unk and pad: by name from tokenizer_config.json, else by id from config.json."""
    found: dict[str, int] = {}
    for key in _SPECIAL_TOKENS:
        token = settings.get(f"{key}_token")
        content = token.get("content") if isinstance(token, dict) else token
        index = ids.get(content) if isinstance(content, str) else config.get(f"{key}_token_id")
        if isinstance(index, list):
            index = index[0] if index else None
        if index is not None:
            found[key] = int(index)
    return found


def _adds_ends(path: Path, ids: Mapping[str, int]) -> dict[str, bool]:
    """Returns whether the tokenizer puts bos before a text and eos after it, found by trying."""
    encoded = Tokenizer.from_file(str(path)).encode("a").ids
    return {
        "bos": bool(encoded) and encoded[0] == ids.get("bos"),
        "eos": bool(encoded) and encoded[-1] == ids.get("eos"),
    }


def _chat_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None
