"""Shrinking equals zeroing: the laws that make a pruned model the model it claims to be."""

import numpy as np
import pytest
import torch
from tiny import DECODERS, questions
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedspine_edge import base_model, workbench
from fedspine_edge.batches import Encoding, collate
from fedspine_edge.data import Example
from fedspine_edge.lora import fresh_factors
from fedspine_edge.masks import keep_all
from fedspine_edge.protocol import expand_members
from fedspine_edge.shrink import slice_factors
from fedspine_edge.structure import FAMILIES
from fedspine_edge.tuning import loss_of


def opened(path, family):
    choices = [10, 11] if family in DECODERS else None
    return workbench.open_workbench(path, sha256=None, num_labels=2, choices=choices)


def random_factors(layout, rank=3):
    generator = torch.Generator().manual_seed(5)
    factors = {m.name: fresh_factors(m.out_features, m.in_features, rank, generator) for m in layout.matrices}
    return {name: (a, torch.randn(b.shape, generator=generator) * 0.1) for name, (a, b) in factors.items()}


def batch_of(bench, family):
    encoding = Encoding(bench.base.tokenizer(), ("human", "number"), "{text} Label:" if family in DECODERS else None)
    tokens = encoding.encode([Example(*pair) for pair in questions(6)])
    return collate(tokens, np.arange(6))


def some_of(layout):
    keep = keep_all(layout)
    keep["layers.0.heads"] = keep["layers.0.heads"][1:]
    keep["layers.1.ffn"] = np.setdiff1d(keep["layers.1.ffn"], np.arange(8, 40)).astype(np.int32)
    return keep


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_an_unpruned_model_with_fresh_factors_is_the_base_model(family, tiny_models):
    bench = opened(tiny_models[family], family)
    generator = torch.Generator().manual_seed(0)
    factors = {m.name: fresh_factors(m.out_features, m.in_features, 4, generator) for m in bench.layout.matrices}
    bench.fit(keep_all(bench.layout), factors, scaling=2.0, mean_inputs={})
    auto = AutoModelForCausalLM if family in DECODERS else AutoModelForSequenceClassification
    stock = auto.from_pretrained(tiny_models[family]).eval()
    batch = batch_of(bench, family)
    with torch.no_grad():
        torch.testing.assert_close(loss_of(bench.model, batch), loss_of(stock, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_shrinking_equals_zeroing_what_members_write(family, tiny_models):
    bench = opened(tiny_models[family], family)
    layout, batch = bench.layout, batch_of(bench, family)
    factors, keep = random_factors(layout), some_of(layout)
    bench.fit(keep, slice_factors(layout, factors, keep_all(layout), keep), scaling=2.0, mean_inputs={})
    with torch.no_grad():
        shrunk_loss = loss_of(bench.model, batch)
    auto = AutoModelForCausalLM if family in DECODERS else AutoModelForSequenceClassification
    stock = auto.from_pretrained(tiny_models[family]).eval()
    for matrix in layout.matrices:
        linear = stock.get_submodule(matrix.name)
        lora_a, lora_b = factors[matrix.name]
        with torch.no_grad():
            linear.weight += 2.0 * lora_b @ lora_a
            if matrix.in_group is not None:
                members = layout.group(matrix.in_group).num_members
                gone = np.setdiff1d(np.arange(members), keep[matrix.in_group])
                linear.weight[:, expand_members(gone, members, matrix.in_features)] = 0.0
    with torch.no_grad():
        torch.testing.assert_close(shrunk_loss, loss_of(stock, batch), rtol=1e-5, atol=1e-6)


def test_compensation_is_exact_when_removed_inputs_are_constant():
    from fedspine_edge.compensation import compensation

    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    bias = compensation(weight, torch.tensor([0]), np.array([7.0, 0.5, 2.0]))
    assert bias.tolist() == [2 * 0.5 + 3 * 2.0, 5 * 0.5 + 6 * 2.0]


def test_compensation_of_unmeasured_inputs_is_zero():
    from fedspine_edge.compensation import compensation

    bias = compensation(torch.ones(2, 2), torch.tensor([0]), np.array([1.0, np.nan]))
    assert bias.tolist() == [0.0, 0.0]


def test_slicing_twice_is_slicing_once(tiny_models):
    layout = opened(tiny_models["llama"], "llama").layout
    factors, everything, some = random_factors(layout), keep_all(layout), some_of(layout)
    fewer = {**some, "layers.0.heads": some["layers.0.heads"][:1]}
    fewer["layers.1.heads"] = some["layers.1.heads"][1:]
    twice = slice_factors(layout, slice_factors(layout, factors, everything, some), some, fewer)
    once = slice_factors(layout, factors, everything, fewer)
    assert all(torch.equal(a, b) for name in once for a, b in zip(once[name], twice[name], strict=True))


def test_a_truncated_weight_file_is_refused(tiny_models, tmp_path):
    import shutil

    from fedspine_edge.errors import CheckpointError

    folder = shutil.copytree(tiny_models["llama"], tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="expected a whole safetensors file"):
        base_model.open_base(folder)


def test_a_directory_without_safetensors_is_refused(tiny_models, tmp_path):
    import shutil

    from fedspine_edge.errors import CheckpointError

    folder = shutil.copytree(tiny_models["bert"], tmp_path / "none")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"expected \*\.safetensors"):
        base_model.open_base(folder)
