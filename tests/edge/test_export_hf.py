"""Directories that transformers loads itself: stock where a class fits, with the shipped class elsewhere."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers.dynamic_module_utils
from export_models import save_decoder
from pruned_models import mixed_keep, save_world, uniform_keep, world_at
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, DECODERS
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
)

from fedspine_edge import hf
from fedspine_edge.base_model import open_base
from fedspine_edge.checkpoint import load_pruned, read_prune_file
from fedspine_edge.errors import IncompatibleError, VerificationError
from fedspine_edge.export.checks import check_directory
from fedspine_edge.export.model_directory import read_model_directory
from fedspine_edge.hf.directory import MODELING_FILE
from fedspine_edge.masks import Keep, keep_all
from fedspine_edge.protocol import Layout
from fedspine_edge.workbench import open_workbench

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
TEXT = [4 + index * 7 % 15 for index in range(256)]
# The tiny models hold 160 positions; decoders rotate further, encoders do not.


@pytest.fixture(autouse=True)
def code_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Shipped classes are copied into a folder of the test's own."""
    folder = tmp_path_factory.mktemp("modules")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
    monkeypatch.syspath_prepend(str(folder))
    return


def auto(family: str) -> Any:
    return AutoModelForCausalLM if family in DECODERS else AutoModelForSequenceClassification


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("compensated", [False, True], ids=["plain", "compensated"])
@pytest.mark.parametrize("family", DECODERS)
def test_a_uniform_decoder_loads_in_stock_transformers(
    tiny_models: dict[str, Path], tmp_path: Path, family: str, compensated: bool
) -> None:
    folder = save_world(tmp_path / "out", tiny_models[family], uniform_keep, compensated=compensated)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__module__.startswith("transformers.models.")
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits_of(model), logits_of(load_pruned(folder)))
    assert sorted(path.name for path in folder.glob("*.py")) == []
    config = json.loads((folder / "config.json").read_text())
    widths = [config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")]
    assert widths == [2, 1, 8, 64]
    unpruned = read_prune_file(folder)["unpruned"]
    assert [unpruned[key] for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size")] == [4, 2, 96]
    assert unpruned["model_type"] == family
    assert config["model_type"] == ("llama" if compensated else family)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_any_mask_of_any_family_loads_with_the_shipped_class(
    tiny_models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    folder = save_world(tmp_path / "out", tiny_models[family], mixed_keep, compensated=True)
    model, info = auto(family).from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert type(model).__name__.startswith("Pruned")
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits_of(model), logits_of(load_pruned(folder)))


@pytest.mark.parametrize("family", sorted(set(CONFIGS) - set(DECODERS)))
def test_a_uniform_encoder_without_lost_heads_is_stock(
    tiny_models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    folder = save_world(tmp_path / "out", tiny_models[family], lambda layout: uniform_keep(layout, heads=False))
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(logits_of(model), logits_of(load_pruned(folder)))
    assert not (folder / MODELING_FILE).exists()


def test_an_encoder_that_lost_heads_needs_the_shipped_class(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = save_world(tmp_path / "out", tiny_models["bert"], uniform_keep)
    assert (folder / MODELING_FILE).is_file()
    assert check_directory(folder, [5, 6, 7]).max_abs_dlogit == 0


def test_a_per_layer_directory_is_not_loaded_as_something_else(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = save_world(tmp_path / "out", tiny_models["llama"], mixed_keep)
    with pytest.raises(RuntimeError, match="mismatched"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("family", ["qwen2", "mpnet"])
def test_a_loaded_model_saves_itself_and_loads_again(tiny_models: dict[str, Path], tmp_path: Path, family: str) -> None:
    folder = save_world(tmp_path / "out", tiny_models[family], mixed_keep, compensated=True)
    first = auto(family).from_pretrained(folder, trust_remote_code=True)
    first.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / MODELING_FILE).read_bytes() == (folder / MODELING_FILE).read_bytes()
    again = auto(family).from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(logits_of(again), logits_of(first))


@pytest.mark.parametrize("family", DECODERS)
def test_generation_with_a_cache_is_generation_without(
    tiny_models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    folder = save_world(tmp_path / "out", tiny_models[family], mixed_keep, compensated=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    prompt = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cached = model.generate(**prompt, **settings, use_cache=True)
    assert cached.shape == (1, 16)
    assert torch.equal(cached, model.generate(**prompt, **settings, use_cache=False))


def test_the_tokenizer_rides_along(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = save_world(tmp_path / "out", tiny_models["llama"], mixed_keep)
    assert AutoTokenizer.from_pretrained(folder)("how far is he")["input_ids"] == [4, 5, 7, 8]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft asks transformers so
@pytest.mark.parametrize("chooser", [uniform_keep, mixed_keep])
def test_peft_trains_a_step_on_it(tiny_models: dict[str, Path], tmp_path: Path, chooser: Any) -> None:
    folder = save_world(tmp_path / "out", tiny_models["llama"], chooser, compensated=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=chooser is mixed_keep)
    before = logits_of(model)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = tuned(input_ids=IDS, labels=IDS).loss
        losses.append(float(loss.detach()))
        torch.autograd.backward(loss)
        optimizer.step()
    assert losses[-1] < losses[0]
    assert not torch.equal(logits_of(tuned), before)


def test_a_sliding_window_with_compensation_keeps_its_family(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "windowed"
    source.mkdir()
    for file in tiny_models["mistral"].iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "sliding_window": 4}))
    folder = save_world(tmp_path / "out", source, uniform_keep, compensated=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__name__ == "PrunedMistralForCausalLM"
    assert torch.equal(logits_of(model), logits_of(load_pruned(folder)))


@pytest.mark.parametrize(
    ("compensated", "kind"), [(False, "MistralForCausalLM"), (True, "PrunedLlamaForCausalLM")], ids=["plain", "biased"]
)
def test_heads_that_do_not_divide_the_width_are_no_stock_llama(tmp_path: Path, compensated: bool, kind: str) -> None:
    def three_heads(layout: Layout) -> Keep:
        keep = keep_all(layout)
        return {name: members[1:] if name.endswith(".heads") else members for name, members in keep.items()}

    source = save_decoder(tmp_path / "source", "llama", num_key_value_heads=4)
    folder = save_world(tmp_path / "out", source, three_heads, compensated=compensated)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=compensated)
    assert type(model).__name__ == kind
    assert torch.equal(logits_of(model), logits_of(load_pruned(folder)))
    assert read_prune_file(folder)["unpruned"]["model_type"] == "llama"
    assert [layer.num_heads for layer in read_model_directory(folder).layers] == [3, 3, 3]


def test_an_unpruned_model_stays_what_it_was(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = save_world(tmp_path / "out", tiny_models["qwen2"], keep_all)
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.num_attention_heads, config.intermediate_size) == ("qwen2", 4, 96)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(folder)), logits_of(load_pruned(folder)))


@pytest.mark.parametrize("chooser", [uniform_keep, mixed_keep])
@pytest.mark.parametrize("family", DECODERS)
def test_the_exporter_reads_both_forms(tiny_models: dict[str, Path], tmp_path: Path, family: str, chooser: Any) -> None:
    folder = save_world(tmp_path / "out", tiny_models[family], chooser, compensated=True)
    model = read_model_directory(folder)
    layout = open_workbench(tiny_models[family], sha256=None, num_labels=2, choices=[5, 6]).layout
    keep = chooser(layout)
    assert [layer.num_key_value_heads for layer in model.layers] == [len(keep[f"layers.{i}.heads"]) for i in (0, 1)]
    assert [layer.intermediate_size for layer in model.layers] == [len(keep[f"layers.{i}.ffn"]) for i in (0, 1)]


def test_a_uniform_directory_is_a_base_for_the_next_pruning(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = save_world(tmp_path / "out", tiny_models["llama"], uniform_keep, compensated=True)
    bench = open_workbench(folder, sha256=None, num_labels=2, choices=[5, 6])
    assert bench.layout.group("layers.0.ffn").num_members == 64
    again = save_world(tmp_path / "again", folder, keep_all, tuned=False)
    assert torch.equal(logits_of(load_pruned(again)), logits_of(load_pruned(folder)))


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_a_per_layer_directory_is_a_base_for_the_next_pruning(
    tiny_models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    first = save_world(tmp_path / "first", tiny_models[family], mixed_keep, compensated=True)
    same = save_world(tmp_path / "same", first, keep_all, tuned=False, task_head=False)
    assert torch.equal(logits_of(load_pruned(same)), logits_of(load_pruned(first)))

    def one_head_less(layout: Layout) -> Keep:
        keep = keep_all(layout)
        return keep | {"layers.1.heads": keep["layers.1.heads"][1:]}

    second = save_world(tmp_path / "second", first, one_head_less, tuned=False)
    assert (second / "model.safetensors").stat().st_size < (first / "model.safetensors").stat().st_size
    model = auto(family).from_pretrained(second, trust_remote_code=True)
    assert torch.equal(logits_of(model), logits_of(load_pruned(second)))


def test_reloading_is_exact_on_real_text_lengths(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = save_world(tmp_path / "out", tiny_models["llama"], mixed_keep, compensated=True)
    parity = check_directory(folder, TEXT)
    assert (parity.num_positions, parity.max_abs_dlogit, parity.top1_agreement) == (256, 0.0, 1.0)
    assert parity.perplexity == parity.reference_perplexity
    with pytest.raises(ValueError, match="expected a text of 256 tokens or more, found 3"):
        check_directory(folder, TEXT[:3])


def test_code_that_is_not_ours_is_not_run(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = save_world(tmp_path / "out", tiny_models["llama"], mixed_keep)
    (folder / MODELING_FILE).write_text("raise SystemExit('run')\n")
    with pytest.raises(IncompatibleError, match=f"expected this program's {MODELING_FILE} in .*, found another"):
        check_directory(folder, TEXT)


def test_a_directory_that_transformers_reads_otherwise_is_caught(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = save_world(tmp_path / "out", tiny_models["bert"], mixed_keep)
    tensors = load_file(folder / "model.safetensors")
    # transformers takes a name for another that lacks the model's prefix, and overwrites the trained head.
    tensors["bert.classifier.weight"] = tensors["classifier.weight"] + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"expected equal logits from transformers, found them .* apart"):
        check_directory(folder, [5, 6, 7, 8])


def test_the_shipped_file_stands_alone() -> None:
    tree = ast.parse((Path(hf.__file__).parent / MODELING_FILE).read_text())
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported == {"__future__", "typing", "torch", "transformers"}


def test_factors_are_merged_before_the_biases_are_filled(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    bench = open_workbench(tiny_models["qwen2"], sha256=None, num_labels=2, choices=[5, 6])
    world = world_at(bench.layout, uniform_keep(bench.layout), compensated=True)
    folder = save_world(tmp_path / "out", tiny_models["qwen2"], uniform_keep, compensated=True)
    base, read = open_base(folder), open_base(tiny_models["qwen2"]).read
    assert not base.read("model.layers.0.mlp.up_proj.bias").any()
    assert not base.read("model.layers.0.self_attn.o_proj.bias").eq(0).all()
    kept = world.keep["layers.0.heads"][0]
    stored = read("model.layers.0.self_attn.k_proj.bias")[8 * kept : 8 * kept + 8]
    assert np.allclose(base.read("model.layers.0.self_attn.k_proj.bias"), stored)


def test_a_llama_written_from_mistral_is_an_ordinary_llama(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = save_world(tmp_path / "out", tiny_models["mistral"], uniform_keep, compensated=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is LlamaForCausalLM
    assert not {"sliding_window", "layer_types"} & set(json.loads((folder / "config.json").read_text()))
