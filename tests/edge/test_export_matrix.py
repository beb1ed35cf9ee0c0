"""The law of the exporter: any legal model at any legal mask is the same model in llama.cpp."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_models import save_decoder, some_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from pruned_models import save_world

from fedspine_edge.export.checks import reference_logits
from fedspine_edge.export.gguf import write_gguf
from fedspine_edge.export.verify import check_parity, compare_logits, llama_logits
from fedspine_edge.masks import Keep
from fedspine_edge.protocol import Group, Layout

pytest.importorskip("llama_cpp", reason="needs the extra fedspine-edge[llama]")

TOKENS = some_tokens(33)
FAMILIES = ("llama", "mistral", "qwen2")


@st.composite
def sizes(draw: st.DrawFn, family: str) -> dict[str, Any]:
    """Widths of a small decoder, few of them powers of two."""
    num_kv_heads, per_group = draw(st.integers(1, 4)), draw(st.sampled_from([1, 3, 4]))
    head_dim = draw(st.sampled_from([6, 10, 16, 20]))
    num_heads = num_kv_heads * per_group
    found = {
        "num_key_value_heads": num_kv_heads,
        "num_attention_heads": num_heads,
        "intermediate_size": draw(st.integers(20, 160)),
        "num_hidden_layers": draw(st.integers(1, 4)),
        "tie_word_embeddings": draw(st.booleans()),
        "hidden_size": num_heads * head_dim,
    }
    if family == "qwen2":  # whose config knows no head width of its own
        return found
    hidden = draw(st.sampled_from([20, 30, 54, 84]))  # llama's must be a multiple of the heads
    return {**found, "hidden_size": -(-hidden // num_heads) * num_heads, "head_dim": head_dim}


@st.composite
def masks(draw: st.DrawFn, layout: Layout, *, uniform: bool) -> Keep:
    """Any members of each group in whole blocks; the same counts in every layer when uniform."""
    counts: dict[str, int] = {}

    def count(group: Group) -> int:
        drawn = group.block * draw(st.integers(1, group.num_members // group.block))
        return counts.setdefault(group.kind, drawn) if uniform else drawn

    seed = draw(st.integers(0, 2**16))
    generator = np.random.default_rng(seed)
    return {
        group.name: np.sort(generator.permutation(group.num_members)[: count(group)]).astype(np.int32)
        for group in layout.groups
    }


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "per-layer"])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_mask_of_any_decoder_is_the_same_in_llama_cpp(family: str, uniform: bool, data: st.DataObject) -> None:
    shape = data.draw(sizes(family))
    compensated = data.draw(st.booleans())
    with tempfile.TemporaryDirectory() as folder:
        source = save_decoder(Path(folder) / "source", family, biased=data.draw(st.booleans()), **shape)
        kept: list[Keep] = []

        def choose(layout: Layout) -> Keep:
            kept.append(data.draw(masks(layout, uniform=uniform)))
            return kept[0]

        model = save_world(Path(folder) / "model", source, choose, compensated=compensated)
        file = write_gguf(model, Path(folder) / "out.gguf", quantization="F32", name="Tiny")
        widths = {
            tuple(len(kept[0][f"layers.{layer}.{kind}"]) for kind in ("heads", "ffn"))
            for layer in range(shape["num_hidden_layers"])
        }
        assert file.format == ("llama" if len(widths) == 1 else "deci")
        parity = compare_logits(reference_logits(model, TOKENS), llama_logits(file.path, TOKENS))
    check_parity(parity, "F32")
