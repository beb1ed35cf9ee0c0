"""Adapters on a pruned base: PEFT and llama.cpp compute what the merged model does, and other bases are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers.dynamic_module_utils
from export_models import save_decoder, some_tokens
from gguf import GGUFReader, GGUFWriter
from pruned_models import SCALING, kept_factors, mixed_keep, save_world, uniform_keep
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedspine_edge.checkpoint import load_pruned
from fedspine_edge.errors import CheckpointError, IncompatibleError, UsageError, VerificationError
from fedspine_edge.export import adapter_gguf
from fedspine_edge.export.adapter_check import check_gguf_adapter
from fedspine_edge.export.adapter_gguf import write_gguf_adapter
from fedspine_edge.export.adapter_peft import check_peft_adapter, write_peft_adapter
from fedspine_edge.export.checks import check_gguf, reference_logits
from fedspine_edge.export.gguf import write_gguf
from fedspine_edge.export.verify import compare_logits, llama_logits

pytest.importorskip("llama_cpp", reason="needs the extra fedspine-edge[llama]")

TOKENS = some_tokens(47)
LONG = some_tokens(257, seed=1)
Q1 = "model.layers.1.self_attn.q_proj"


class Bench:
    """A base at a mask as directory and GGUF file, and factors of unequal ranks on it."""

    def __init__(self, folder: Path, family: str, chooser: Callable[[Any], Any]) -> None:
        source = save_decoder(folder / "source", family)
        self.base = save_world(folder / "base", source, chooser, compensated=True, tuned=False)
        self.merged = save_world(folder / "merged", source, chooser, compensated=True)
        self.gguf = write_gguf(self.base, folder / "base.gguf", quantization="F32", name="Tiny").path
        whole = kept_factors(source, chooser)
        self.factors = {
            name: (a[: 1 + index % 3].clone(), b[:, : 1 + index % 3].clone())
            for index, (name, (a, b)) in enumerate(whole.items())
        }
        self.whole = whole

    @torch.no_grad()
    def expected(self, factors: Any, tokens: list[int]) -> np.ndarray:
        """What the base says with the factors merged in float32, [T, V]."""
        model: Any = load_pruned(self.base)
        for name, (lora_a, lora_b) in factors.items():
            model.get_submodule(name).weight += SCALING * lora_b @ lora_a
        logits: np.ndarray = model(torch.tensor([tokens])).logits[0].numpy()
        return logits


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bench]:
    return {
        "per-layer": Bench(tmp_path_factory.mktemp("per-layer"), "llama", mixed_keep),
        "uniform": Bench(tmp_path_factory.mktemp("uniform"), "qwen2", uniform_keep),
    }


@pytest.fixture(autouse=True)
def code_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.mktemp("modules")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
    monkeypatch.syspath_prepend(str(folder))


@torch.no_grad()
def peft_logits(base: Path, adapter: Path, tokens: list[int], auto: Any = AutoModelForCausalLM) -> np.ndarray:
    model = auto.from_pretrained(base, trust_remote_code=(base / "modeling_pruned.py").exists())
    logits: np.ndarray = peft.PeftModel.from_pretrained(model, adapter).eval()(torch.tensor([tokens])).logits[0].numpy()
    return logits


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft asks transformers so
@pytest.mark.parametrize("kind", ["per-layer", "uniform"])
def test_peft_says_what_the_merged_model_says(benches: dict[str, Bench], tmp_path: Path, kind: str) -> None:
    bench = benches[kind]
    write_peft_adapter(tmp_path / "adapter", bench.base, bench.factors, scaling=SCALING)
    found = peft_logits(bench.base, tmp_path / "adapter", TOKENS)
    expected = bench.expected(bench.factors, TOKENS)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected - reference_logits(bench.base, TOKENS)).max() > 0.5
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    ranks = {config["r"], *config["rank_pattern"].values()}
    assert ranks == {1, 2, 3}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_the_whole_adapter_is_the_merged_directory(benches: dict[str, Bench], tmp_path: Path) -> None:
    bench = benches["per-layer"]
    write_peft_adapter(tmp_path / "adapter", bench.base, bench.whole, scaling=SCALING)
    found = peft_logits(bench.base, tmp_path / "adapter", TOKENS)
    merged = reference_logits(bench.merged, TOKENS)
    assert compare_logits(merged, found).mean_kl < 1e-4  # the merged matrices are rounded to float16
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (3, 6.0, {})


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_an_encoder_takes_its_adapter(tiny_models: dict[str, Path], tmp_path: Path, family: str) -> None:
    base = save_world(tmp_path / "base", tiny_models[family], mixed_keep, tuned=False)
    merged = save_world(tmp_path / "merged", tiny_models[family], mixed_keep)
    factors = kept_factors(tiny_models[family], mixed_keep)
    write_peft_adapter(tmp_path / "adapter", base, factors, scaling=SCALING)
    tokens = [3, 5, 6, 7]
    found = peft_logits(base, tmp_path / "adapter", tokens, AutoModelForSequenceClassification)
    expected = reference_logits(merged, tokens)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-3)
    assert np.abs(expected - reference_logits(base, tokens)[0]).max() > 1e-2


@pytest.mark.parametrize("kind", ["per-layer", "uniform"])
def test_llama_cpp_says_what_the_merged_model_says(benches: dict[str, Bench], tmp_path: Path, kind: str) -> None:
    bench, adapter = benches[kind], tmp_path / "adapter.gguf"
    write_gguf_adapter(adapter, bench.base, bench.gguf, bench.factors, scaling=SCALING, number_type="F32")
    expected = bench.expected(bench.factors, LONG)
    parity = check_gguf(bench.gguf, expected, LONG, quantization="F32", adapter=adapter)
    assert parity.top1_agreement == 1.0
    assert parity.perplexity == pytest.approx(parity.reference_perplexity, rel=1e-3)
    with pytest.raises(VerificationError):
        check_gguf(bench.gguf, expected, LONG, quantization="F32")


def test_half_the_size_at_float16(benches: dict[str, Bench], tmp_path: Path) -> None:
    bench, adapter = benches["per-layer"], tmp_path / "adapter.gguf"
    sizes = []
    for number_type in ("F32", "F16"):
        write_gguf_adapter(
            adapter,
            bench.base,
            bench.gguf,
            bench.whole,
            scaling=SCALING,
            number_type=number_type,
            overwrite=True,
        )
        sizes.append(sum(tensor.n_bytes for tensor in GGUFReader(adapter).tensors))
    assert sizes[0] == 2 * sizes[1]
    parity = compare_logits(bench.expected(bench.whole, TOKENS), llama_logits(bench.gguf, TOKENS, adapter=adapter))
    assert parity.mean_kl < 1e-4


def test_a_wrong_permutation_of_b_is_caught(
    benches: dict[str, Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, adapter = benches["per-layer"], tmp_path / "adapter.gguf"
    monkeypatch.setattr(adapter_gguf, "permute_rows", lambda rows, _: rows)
    write_gguf_adapter(adapter, bench.base, bench.gguf, bench.factors, scaling=SCALING, number_type="F32")
    with pytest.raises(VerificationError, match="at F32"):
        check_gguf(bench.gguf, bench.expected(bench.factors, LONG), LONG, quantization="F32", adapter=adapter)


def test_the_adapter_says_what_it_is(benches: dict[str, Bench], tmp_path: Path) -> None:
    bench, adapter = benches["per-layer"], tmp_path / "adapter.gguf"
    write_gguf_adapter(adapter, bench.base, bench.gguf, bench.factors, scaling=SCALING)
    reader, base = GGUFReader(adapter), GGUFReader(bench.gguf)
    facts = {key: field.contents() for key, field in reader.fields.items()}
    assert (facts["general.type"], facts["adapter.type"], facts["adapter.lora.alpha"]) == ("adapter", "lora", 0.0)
    assert facts["general.architecture"] == "deci"
    assert facts["fedspine.base_sha256"] == base.fields["fedspine.weights_sha256"].contents()
    names = {tensor.name for tensor in reader.tensors}
    assert {"blk.1.attn_q.weight.lora_a", "blk.1.attn_q.weight.lora_b"} <= names


def forged(path: Path, architecture: str = "deci", kind: str = "adapter", **tensors: np.ndarray) -> Path:
    """A GGUF adapter by another hand; `__` in a name stands for a dot."""
    writer = GGUFWriter(None, architecture)
    writer.add_type(kind)
    writer.add_string("adapter.type", "lora")
    for name, tensor in tensors.items():
        writer.add_tensor(name.replace("__", "."), tensor)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def array(*shape: int) -> np.ndarray:
    return np.zeros(shape, dtype=np.float32)


DOWN_A, DOWN_B = "blk__0__ffn_down__weight__lora_a", "blk__0__ffn_down__weight__lora_b"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"architecture": "llama", DOWN_A: array(2, 96)}, "an adapter of architecture deci for base.gguf, found llama"),
        ({"kind": "model", DOWN_A: array(2, 96)}, "expected general.type 'adapter' in .*, found 'model'"),
        ({}, "expected LoRA factors in forged.gguf, found none"),
        ({DOWN_A: array(2, 96)}, "expected factors of shapes .* for blk.0.ffn_down.weight"),
        ({DOWN_B: array(64, 2)}, "expected factors of shapes .* for blk.0.ffn_down.weight"),
        ({DOWN_A: array(2, 64), DOWN_B: array(64, 2)}, r"expected factors of shapes \[96, 'R'\] and \['R', 64\]"),
        ({DOWN_A: array(2, 96), DOWN_B: array(64, 3)}, "expected factors of shapes .* found"),
        ({"blk__9__ffn_down__weight__lora_a": array(2, 96)}, "factors of the base's matrices, found blk.9.ffn_down"),
    ],
)
def test_an_adapter_that_does_not_fit_never_reaches_llama_cpp(
    benches: dict[str, Bench], tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    adapter = forged(tmp_path / "forged.gguf", **content)
    with pytest.raises(IncompatibleError, match=message):
        check_gguf_adapter(adapter, benches["per-layer"].gguf)
    with pytest.raises(IncompatibleError, match=message):
        llama_logits(benches["per-layer"].gguf, TOKENS, adapter=adapter)


def test_an_adapter_by_another_hand_that_fits_is_taken(benches: dict[str, Bench], tmp_path: Path) -> None:
    bench = benches["per-layer"]
    adapter = forged(tmp_path / "forged.gguf", **{DOWN_A: array(2, 96), DOWN_B: array(64, 2)})
    found = llama_logits(bench.gguf, TOKENS, adapter=adapter)
    assert compare_logits(llama_logits(bench.gguf, TOKENS), found).max_abs_dlogit == 0


def nudged_copy(folder: Path, target: Path) -> Path:
    """A directory of the same shapes with one other number."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(target / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_another_base_of_the_same_shapes_is_refused(benches: dict[str, Bench], tmp_path: Path) -> None:
    bench = benches["per-layer"]
    other = nudged_copy(bench.base, tmp_path / "other")
    other_gguf = write_gguf(other, tmp_path / "other.gguf", quantization="F32", name="Other").path
    write_peft_adapter(tmp_path / "adapter", bench.base, bench.factors, scaling=SCALING)
    check_peft_adapter(tmp_path / "adapter", bench.base)
    with pytest.raises(IncompatibleError, match=r"expected the base \w{12} \(base\), found \w{12}"):
        check_peft_adapter(tmp_path / "adapter", other)
    write_gguf_adapter(tmp_path / "adapter.gguf", bench.base, bench.gguf, bench.factors, scaling=SCALING)
    with pytest.raises(IncompatibleError, match=r"expected an adapter of base \w{12}, found one of \w{12}"):
        check_gguf_adapter(tmp_path / "adapter.gguf", other_gguf)
    with pytest.raises(IncompatibleError, match=r"expected a file of base \w{12}, found other.gguf of \w{12}"):
        write_gguf_adapter(tmp_path / "second.gguf", bench.base, other_gguf, bench.factors, scaling=SCALING)
    assert not (tmp_path / "second.gguf").exists()


def test_a_quantised_base_takes_the_same_adapter(benches: dict[str, Bench], tmp_path: Path) -> None:
    bench = benches["per-layer"]
    base = write_gguf(bench.base, tmp_path / "base.gguf", quantization="Q8_0", name="Tiny").path
    write_gguf_adapter(tmp_path / "adapter.gguf", bench.base, base, bench.whole, scaling=SCALING)
    expected = bench.expected(bench.whole, LONG)
    bare, adapted = (
        compare_logits(expected, llama_logits(base, LONG, adapter=adapter)).mean_kl
        for adapter in (None, tmp_path / "adapter.gguf")
    )
    assert adapted < bare / 20


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({}, "expected LoRA factors, found none"),
        ({"model.layers.9.mlp.up_proj": (torch.ones(2, 64), torch.ones(96, 2))}, "matrices, found model.layers.9"),
        ({Q1: (torch.ones(2, 64), torch.ones(64, 2))}, r"shapes \[R, 64\] and \[128, R\] for .*, found \[2, 64\]"),
        ({Q1: (torch.ones(2, 64), torch.ones(128, 3))}, r"found \[2, 64\] and \[128, 3\]"),
        ({Q1: (torch.ones(0, 64), torch.ones(128, 0))}, r"found \[0, 64\]"),
        ({Q1: (torch.full((2, 64), torch.nan), torch.ones(128, 2))}, "expected finite factors, found NaN"),
    ],
)
def test_factors_of_another_mask_are_refused(
    benches: dict[str, Bench], tmp_path: Path, factors: Any, message: str
) -> None:
    bench = benches["per-layer"]
    with pytest.raises(IncompatibleError, match=message):
        write_peft_adapter(tmp_path / "adapter", bench.base, factors, scaling=SCALING)
    with pytest.raises(IncompatibleError, match=message):
        write_gguf_adapter(tmp_path / "adapter.gguf", bench.base, bench.gguf, factors, scaling=SCALING)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_replaced_only_when_asked(benches: dict[str, Bench], tmp_path: Path) -> None:
    bench = benches["per-layer"]
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter.gguf").write_bytes(b"before")
    with pytest.raises(UsageError, match=r"expected a new file, found that .*adapter exists"):
        write_peft_adapter(tmp_path / "adapter", bench.base, bench.factors, scaling=SCALING)
    with pytest.raises(UsageError, match=r"expected a new file, found that .*adapter.gguf exists"):
        write_gguf_adapter(tmp_path / "adapter.gguf", bench.base, bench.gguf, bench.factors, scaling=SCALING)
    assert (tmp_path / "adapter.gguf").read_bytes() == b"before"
    write_peft_adapter(tmp_path / "adapter", bench.base, bench.factors, scaling=SCALING, overwrite=True)
    check_peft_adapter(tmp_path / "adapter", bench.base)


def test_large_factors_need_float32(benches: dict[str, Bench], tmp_path: Path) -> None:
    bench = benches["per-layer"]
    factors = {Q1: (torch.ones(1, 64), torch.full((128, 1), 1e5))}
    with pytest.raises(IncompatibleError, match=r"expected factors within float16, found larger ones for .*q_proj"):
        write_gguf_adapter(tmp_path / "adapter.gguf", bench.base, bench.gguf, factors, scaling=SCALING)
    with pytest.raises(ValueError, match="expected a number type of F32, F16, found 'Q8_0'"):
        write_gguf_adapter(
            tmp_path / "adapter.gguf", bench.base, bench.gguf, factors, scaling=SCALING, number_type="Q8_0"
        )


def test_damaged_adapters_are_refused(benches: dict[str, Bench], tmp_path: Path) -> None:
    bench = benches["per-layer"]
    write_gguf_adapter(tmp_path / "adapter.gguf", bench.base, bench.gguf, bench.factors, scaling=SCALING)
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "adapter.gguf").read_bytes()[:500])
    for name in ("cut.gguf", "absent.gguf"):
        with pytest.raises(CheckpointError, match=f"expected a whole GGUF file at .*{name}"):
            check_gguf_adapter(tmp_path / name, bench.gguf)
    adapter = tmp_path / "adapter"
    write_peft_adapter(adapter, bench.base, bench.factors, scaling=SCALING)
    record = json.loads((adapter / "fedspine_adapter.json").read_text())
    (adapter / "fedspine_adapter.json").write_text(json.dumps({**record, "format": 7}))
    with pytest.raises(IncompatibleError, match="is format 7, this program reads 1"):
        check_peft_adapter(adapter, bench.base)
    (adapter / "fedspine_adapter.json").write_text(json.dumps(record))
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"expected adapter_model\.safetensors in .*, found none"):
        check_peft_adapter(adapter, bench.base)
    with pytest.raises(CheckpointError, match=r"expected a readable fedspine_adapter\.json"):
        check_peft_adapter(tmp_path, bench.base)
