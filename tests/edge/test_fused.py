"""A model on our kernels against the same one as transformers builds it."""

import ctypes
import gc

import numpy as np
import pytest
import torch
from tiny import CONFIGS, DECODERS, VOCABULARY
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedspine_edge import kernels
from fedspine_edge.fused import fuse
from fedspine_edge.fused_layers import FusedAttention, FusedEncoderLayer, FusedMLP, FusedRMSNorm, valid_keys
from fedspine_edge.lora import LoRALinear, fresh_factors, replace_module
from fedspine_edge.structure import layout_of
from fedspine_edge.workbench import open_workbench

BATCH, TOKENS = 3, 11
ENCODERS = sorted(set(CONFIGS) - set(DECODERS))


def tuned(family: str, **changes):
    """A random model with norms that are not all ones, frozen, with LoRA on its matrices."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    kind = AutoModelForCausalLM if family in DECODERS else AutoModelForSequenceClassification
    model = kind.from_config(config).requires_grad_(False).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() or name.endswith("bias"):
                parameter.uniform_(0.5, 1.5)
            elif "relative_attention_bias" in name:
                parameter.normal_()
    generator = torch.Generator().manual_seed(1)
    for matrix in layout_of(config, base_sha256="0" * 64).matrices:
        linear = model.get_submodule(matrix.name)
        lora_a, _ = fresh_factors(matrix.out_features, matrix.in_features, 3, generator)
        lora_b = torch.randn(matrix.out_features, 3, generator=generator) * 0.1
        packed = kernels.pack(linear.weight.detach())
        bias = None if linear.bias is None else linear.bias.detach()
        replace_module(model, matrix.name, LoRALinear(packed, bias=bias, lora_a=lora_a, lora_b=lora_b, scaling=2.0))
    return model


def loss_of(model) -> Tensor:
    """A language model's loss, or a classifier's of rows of unequal length."""
    ids = torch.randint(0, len(VOCABULARY), (BATCH, TOKENS), generator=torch.Generator().manual_seed(2))
    if model.config.model_type in DECODERS:
        return model(input_ids=ids, labels=ids, use_cache=False).loss
    valid = torch.arange(TOKENS) < torch.tensor([[TOKENS], [4], [9]])
    ids[~valid] = 0
    labels = torch.tensor([0, 1, 1])
    return functional.cross_entropy(model(input_ids=ids, attention_mask=valid).logits, labels)


class Mallinfo2(ctypes.Structure):
    """What glibc's allocator knows of itself."""

    _fields_ = [(f"field{index}", ctypes.c_size_t) for index in range(10)]


def held_bytes() -> int:
    function = ctypes.CDLL(None).mallinfo2
    function.restype = Mallinfo2
    found = function()
    return found.field7 + found.field4  # in use in the arenas, and mapped on their own


def gradients(model) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


# What is kept in bfloat16 is off by up to 2^-9 of itself, and gradients that cancel by several times that.
@pytest.mark.parametrize(("backend", "tolerance"), [("native", 2e-2), ("reference", 2e-4)])
@pytest.mark.parametrize("family", CONFIGS)
def test_the_fused_model_has_the_same_loss_and_the_same_gradients(family, backend, tolerance):
    plain, fused = tuned(family), tuned(family)
    fuse(fused)
    loss = loss_of(plain)
    loss.backward()
    with kernels.use_backend(backend):
        found = loss_of(fused)
        found.backward()
    assert float(found.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
    expected = gradients(plain)
    assert list(gradients(fused)) == list(expected)
    assert len(expected) == 2 * len(layout_of(plain.config, base_sha256="0" * 64).matrices)  # A and B of each
    for name, gradient in gradients(fused).items():
        largest = float(expected[name].abs().max())
        # A bias common to all keys cancels in the softmax: BERT's key projections learn all but nothing from it.
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=tolerance * largest + 1e-7, msg=name)


@pytest.mark.parametrize("family", DECODERS)
def test_every_norm_mlp_and_attention_is_replaced_and_no_name_changes(family):
    model = AutoModelForCausalLM.from_config(CONFIGS[family]())
    before = dict(model.named_parameters())
    paths = {name for name, _ in model.named_modules()}
    fuse(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is parameter for name, parameter in before.items())
    assert sum(isinstance(module, FusedRMSNorm) for module in model.modules()) == 2 * 2 + 1
    assert sum(isinstance(module, FusedMLP) for module in model.modules()) == 2
    assert sum(isinstance(module, FusedAttention) for module in model.modules()) == 2
    assert not {type(module).__name__ for module in model.modules()} & {"SiLU", "SiLUActivation"}
    assert {f"model.layers.{i}.mlp.{name}_proj" for i in (0, 1) for name in ("gate", "up", "down")} <= paths & {
        name for name, _ in model.named_modules()
    }


def test_epsilon_is_the_models_own():
    plain, fused = tuned("llama", rms_norm_eps=0.5), tuned("llama", rms_norm_eps=0.5)
    fuse(fused)
    assert float(loss_of(fused).detach()) == pytest.approx(float(loss_of(plain).detach()), rel=1e-5)
    assert float(loss_of(fused).detach()) != pytest.approx(float(loss_of(tuned("llama")).detach()), rel=1e-4)


def test_an_mlp_of_another_activation_stays():
    model = tuned("llama", hidden_act="gelu")
    expected = loss_of(model)
    fuse(model)
    assert not any(isinstance(module, FusedMLP) for module in model.modules())
    assert any(isinstance(module, FusedRMSNorm) for module in model.modules())
    assert float(loss_of(model).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize("family", ENCODERS)
def test_every_layer_of_an_encoder_is_replaced_and_no_name_changes(family):
    model = AutoModelForSequenceClassification.from_config(CONFIGS[family]())
    before = dict(model.named_parameters())
    paths = {name for name, _ in model.named_modules()}
    fuse(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is parameter for name, parameter in before.items())
    assert {name for name, _ in model.named_modules()} == paths
    assert sum(isinstance(module, FusedEncoderLayer) for module in model.modules()) == 2


@pytest.mark.parametrize(("setting", "value"), [("hidden_act", "relu"), ("is_decoder", True)])
def test_an_encoder_of_another_kind_stays_as_it_is(setting, value):
    config = CONFIGS["bert"]()
    setattr(config, setting, value)
    model = AutoModelForSequenceClassification.from_config(config)
    before = [id(module) for module in model.modules()]
    fuse(model)
    assert [id(module) for module in model.modules()] == before


@pytest.mark.parametrize(("family", "part"), [("llama", FusedMLP), ("bert", FusedEncoderLayer)])
def test_an_opened_model_is_fused(tiny_models, family, part):
    model = open_workbench(tiny_models[family], sha256=None, num_labels=2, choices=None).model
    assert any(isinstance(module, part) for module in model.modules())


def test_what_a_row_is_padded_with_changes_nothing():
    model = tuned("bert")
    fuse(model)
    ids, valid = torch.tensor([[3, 4, 5, 0], [3, 4, 5, 9]]), torch.tensor([[True, True, True, False]] * 2)
    logits = model(input_ids=ids, attention_mask=valid).logits
    assert torch.equal(logits[0], logits[1])
    torch.testing.assert_close(logits[:1], model(input_ids=ids[:1, :3]).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_with_left_padding_or_a_cache_answers_as_before(family, implementation):
    plain, fused = tuned(family), tuned(family)
    fuse(fused)
    ids = torch.tensor([[0, 0, 4, 5, 6], [4, 5, 6, 7, 8]])
    padded = {"input_ids": ids, "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])}
    for model in (plain, fused):
        model.set_attn_implementation(implementation)
    with torch.no_grad():
        expected, found = plain(**padded), fused(**padded)
        torch.testing.assert_close(found.logits[:, 2:], expected.logits[:, 2:], rtol=1e-4, atol=1e-5)
        next_ids = torch.tensor([[9], [9]])
        mask = torch.cat([padded["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], dim=1)
        more = [
            model(input_ids=next_ids, attention_mask=mask, past_key_values=answer.past_key_values).logits
            for model, answer in ((plain, expected), (fused, found))
        ]
    torch.testing.assert_close(more[1], more[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_the_mask_of_an_encoder_says_which_keys_are_there(dtype):
    flat = torch.tensor([[1, 1, 0], [1, 0, 0]]).to(dtype)
    expected = flat.bool()
    added = torch.where(expected, 0.0, torch.finfo(torch.float32).min)
    assert valid_keys(None) is None
    assert torch.equal(valid_keys(flat), expected)
    assert torch.equal(valid_keys(expected[:, None, None, :].expand(2, 1, 3, 3)), expected)
    assert torch.equal(valid_keys(added[:, None, None, :]), expected)


@pytest.mark.skipif(kernels.backend() != "native", reason="the reference leaves saving to autograd")
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_much_less_is_saved_for_the_backward(family):
    plain, fused = tuned(family), tuned(family)
    fuse(fused)
    held = []
    for model in (plain, fused):
        loss_of(model).backward()
        before = held_bytes()
        loss = loss_of(model)
        held.append(held_bytes() - before)
        del loss
    assert held[1] < (0.6 if family == "llama" else 0.75) * held[0]  # of a tiny model; real ones save more


@pytest.mark.skipif(kernels.backend() != "native", reason="the reference keeps what it computes from")
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_what_enters_a_linear_after_a_norm_or_an_activation_is_not_held(family):
    """Once the forward is through, that memory is overwritten: the gradients do not notice."""
    model, twin = tuned(family), tuned(family)
    fuse(model)
    fuse(twin)
    seen = []
    ends = ("down_proj", "gate_proj", "1.self_attn.q_proj", "intermediate.dense", "output.dense")
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear) and name.endswith(ends) and "attention.output" not in name:
            module.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0].detach()))
    loss = loss_of(model)
    for product in seen:
        product.fill_(np.nan)
    loss.backward()
    loss_of(twin).backward()
    assert len(seen) == (5 if family == "llama" else 4)
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, gradients(twin)[name]), name


def test_the_graph_is_freed_with_the_loss():
    """Nothing that a forward made is kept alive by a cycle."""
    model = tuned("llama")
    fuse(model)
    loss_of(model).backward()
    gc.collect()
    gc.disable()
    try:
        before = held_bytes()
        for _ in range(3):
            loss = loss_of(model)
            del loss
        assert held_bytes() - before < 20_000
    finally:
        gc.enable()
