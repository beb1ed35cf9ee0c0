"""Tokenizers in GGUF files: llama.cpp cuts a text as the tokenizers library does, and strangers are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from export_models import TEXT, save_decoder
from gguf import GGUFReader
from tokenizers import Tokenizer

from fedspine_edge.errors import CheckpointError, IncompatibleError
from fedspine_edge.export.gguf import write_gguf
from fedspine_edge.export.llama_session import open_session

pytest.importorskip("llama_cpp", reason="needs the extra fedspine-edge[llama]")


def export(folder: Path, **options: Any) -> Path:
    return write_gguf(
        folder, folder.parent / "out.gguf", quantization="F32", name="Tiny", overwrite=True, **options
    ).path


def facts_of(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in GGUFReader(path).fields.items() if key.startswith("tokenizer")}


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_llama_cpp_cuts_a_text_as_the_tokenizer_does(tmp_path: Path, pre: str) -> None:
    folder = save_decoder(tmp_path / "model", "llama", pre=pre)
    path = export(folder)
    expected = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids
    with open_session(path, num_context=32) as session:
        assert session.tokenize(TEXT) == expected
    assert facts_of(path)["tokenizer.ggml.pre"] == pre


def test_special_tokens_types_and_template_are_carried(tmp_path: Path) -> None:
    facts = facts_of(export(save_decoder(tmp_path / "model", "llama", pre="llama-bpe")))
    assert facts["tokenizer.ggml.tokens"][:2] == ["<|eos|>", "<|bos|>"]
    assert facts["tokenizer.ggml.token_type"][:3] == [3, 3, 1]
    tool = facts["tokenizer.ggml.tokens"].index("<tool>")
    assert facts["tokenizer.ggml.token_type"][tool] == 4
    assert facts["tokenizer.ggml.tokens"][-1] == "[PAD319]"
    assert facts["tokenizer.ggml.token_type"][-1] == 5
    assert (facts["tokenizer.ggml.eos_token_id"], facts["tokenizer.ggml.bos_token_id"]) == (0, 1)
    assert (facts["tokenizer.ggml.add_bos_token"], facts["tokenizer.ggml.add_eos_token"]) == (True, False)
    assert facts["tokenizer.chat_template"].startswith("{% for m in messages %}")


def test_a_tokenizer_is_copied_word_for_word(tmp_path: Path) -> None:
    donor = export(save_decoder(tmp_path / "donor", "llama", pre="qwen2"))
    wanted = facts_of(donor)
    folder = save_decoder(tmp_path / "model", "mistral", pre="gpt-2")
    assert facts_of(export(folder, tokenizer_gguf=donor.rename(tmp_path / "donor.gguf"))) == wanted


def test_the_file_a_base_names_is_copied(tmp_path: Path) -> None:
    donor = export(save_decoder(tmp_path / "donor", "llama", pre="qwen2")).rename(tmp_path / "donor.gguf")
    folder = save_decoder(tmp_path / "model", "llama", pre="gpt-2")
    (folder / "fedspine_base.json").write_text(json.dumps({"name": "Tiny", "tokenizer_gguf": str(donor)}))
    assert facts_of(export(folder))["tokenizer.ggml.pre"] == "qwen2"
    donor.unlink()
    assert facts_of(export(folder))["tokenizer.ggml.pre"] == "gpt-2"


def test_an_older_tokenizer_config_is_understood(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path / "model", "llama")
    (folder / "chat_template.jinja").unlink()
    settings = {
        "bos_token": None,
        "eos_token": {"content": "<|bos|>"},
        "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    facts = facts_of(export(folder))
    assert facts["tokenizer.chat_template"] == "yes"
    assert facts["tokenizer.ggml.eos_token_id"] == 1
    assert facts["tokenizer.ggml.bos_token_id"] == 1  # none by name: the one of config.json


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"type": "Unigram", "vocab": []}}, "expected a byte-level BPE tokenizer, found 'Unigram'"),
        ({"pre_tokenizer": None}, "expected a pre-tokenizer of kind smollm, gpt-2, llama-bpe, qwen2, found another"),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
            "expected a pre-tokenizer of kind .*, found another: ByteLevel",
        ),
        (
            {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": False}},
            "expected a pre-tokenizer of kind .*, found another: Split",
        ),
        ({"added_tokens": [{"content": "<far>", "id": 400}]}, "expected token ids below 320, found 400 for '<far>'"),
    ],
)
def test_a_tokenizer_llama_cpp_has_no_name_for_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = save_decoder(tmp_path / "model", "llama")
    edit(folder, **changes)
    with pytest.raises(IncompatibleError, match=message):
        export(folder)


def test_merges_that_llama_cpp_would_ignore_are_refused(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path / "model", "llama")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    edit(folder, model={**model, "ignore_merges": True})
    with pytest.raises(IncompatibleError, match=r"expected ignore_merges as llama\.cpp's smollm has it, found True"):
        export(folder)


def test_a_donor_of_another_size_or_none_is_refused(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path / "model", "llama")
    donor = export(save_decoder(tmp_path / "donor", "llama")).rename(tmp_path / "donor.gguf")
    other = save_decoder(tmp_path / "other", "llama", vocab_size=352)
    with pytest.raises(IncompatibleError, match="expected a tokenizer of 352 tokens, found 320"):
        export(other, tokenizer_gguf=donor)
    donor.write_bytes(donor.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"expected a whole GGUF file at .*donor.gguf"):
        export(folder, tokenizer_gguf=donor)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"expected a readable tokenizer\.json"):
        export(folder)
