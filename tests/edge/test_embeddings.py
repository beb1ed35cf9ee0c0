"""Token embeddings and language heads held in few bits."""

import pytest
import torch
from tiny import CONFIGS, DECODERS
from torch import nn

from fedspine_edge import kernels
from fedspine_edge.embeddings import PackedEmbedding, PackedHead, hold_embeddings
from fedspine_edge.memory_plan import tensor_bytes
from fedspine_edge.workbench import open_workbench

IDS = torch.tensor([[3, 5, 0, 18, 1]])


def opened(path, family):
    choices = [0] if family in DECODERS else None
    bench = open_workbench(path, sha256=None, num_labels=2, choices=choices)
    return bench.model, bench.base.reader().weight


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_rows_and_logits_are_those_of_the_weight_the_panels_stand_for(tiny_models, family, dtype):
    model, read = opened(tiny_models[family], family)
    plain = model.get_input_embeddings()(IDS)
    hold_embeddings(model, read, dtype)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding)
    assert embedding.packed.dtype == dtype
    table = kernels.unpack(embedding.packed)
    torch.testing.assert_close(embedding(IDS), table[IDS], rtol=0, atol=0)
    torch.testing.assert_close(embedding(IDS), plain, rtol=0.01, atol=0.01 * float(plain.abs().max()))
    if family not in DECODERS:
        assert head is None
        return
    assert isinstance(head, PackedHead)
    assert (head.packed is embedding.packed) is bool(model.config.tie_word_embeddings)
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(head(hidden), hidden @ kernels.unpack(head.packed).T)


@pytest.mark.parametrize("family", ["llama", "mistral", "bert"])
def test_float32_again_is_the_model_of_before(tiny_models, family):
    model, read = opened(tiny_models[family], family)
    before = {name: value.clone() for name, value in model.state_dict().items() if not value.is_meta}
    held = tensor_bytes(model)
    hold_embeddings(model, read, "int8")
    assert tensor_bytes(model) < held
    embedding = model.get_input_embeddings()
    hold_embeddings(model, read, "int8")
    assert model.get_input_embeddings() is embedding
    hold_embeddings(model, read, "float32")
    after = {name: value for name, value in model.state_dict().items() if not value.is_meta}
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0)
    assert tensor_bytes(model) == held
    head = model.get_output_embeddings()
    if model.config.tie_word_embeddings and head is not None:
        assert head.weight is model.get_input_embeddings().weight
    assert not any(parameter.requires_grad for parameter in nn.ModuleList([model.get_input_embeddings()]).parameters())


def test_a_base_that_cannot_be_read_once_is_read_again(tiny_models):
    model, read = opened(tiny_models["llama"], "llama")
    plain = model.get_input_embeddings()(IDS)

    def failing(name):
        raise OSError(name)

    with pytest.raises(OSError, match="embed_tokens"):
        hold_embeddings(model, failing, "int8")
    hold_embeddings(model, read, "float32")
    torch.testing.assert_close(model.get_input_embeddings()(IDS), plain, rtol=0, atol=0)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
