"""A whole round on a device, and what it keeps between rounds, on tiny models."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny import DECODERS, questions, tiny_tokenizer

from fedspine_edge import device, kernels
from fedspine_edge.batches import Encoding
from fedspine_edge.checkpoint import load_device_state, load_pruned, save_device_state, save_pruned
from fedspine_edge.data import Example
from fedspine_edge.device import DeviceState, run_round
from fedspine_edge.errors import CheckpointError, IncompatibleError, MemoryLimitError, TuningError
from fedspine_edge.lora import LoRALinear, fresh_factors
from fedspine_edge.masks import keep_all
from fedspine_edge.protocol import Assignment, tensors_nbytes
from fedspine_edge.quantized import DecodedArrays, as_float16, packed_once
from fedspine_edge.structure import FAMILIES
from fedspine_edge.tuning import predict
from fedspine_edge.wire_format import assignment_from_bytes, to_bytes, update_from_bytes
from fedspine_edge.workbench import GlobalModel, load_global, open_workbench

STEPS = 12


def opened(path, family):
    bench = open_workbench(path, sha256=None, num_labels=2, choices=None)
    if family not in DECODERS:
        return bench, tokens_of(bench, family)
    encoding = encoding_of(bench, family)
    return open_workbench(path, sha256=None, num_labels=2, choices=encoding.choice_tokens()), tokens_of(bench, family)


def encoding_of(bench, family):
    return Encoding(
        tiny_tokenizer(decoder=family in DECODERS), ("human", "number"), "{text} Label:" if family in DECODERS else None
    )


def tokens_of(bench, family):
    return encoding_of(bench, family).encode([Example(*pair) for pair in questions()])


def assignment_for(bench, **changes):
    layout = bench.layout
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for matrix in layout.matrices:
        lora_a, lora_b = fresh_factors(matrix.out_features, matrix.in_features, 4, generator)
        tensors[f"lora_a/{matrix.name}"] = lora_a.numpy().astype(np.float16)
        tensors[f"lora_b/{matrix.name}"] = lora_b.numpy().astype(np.float16)
    for group in layout.groups:
        tensors[f"keep/{group.name}"] = np.arange(group.num_members, dtype=np.int32)
        tensors[f"importance/{group.name}"] = np.full(group.num_members, np.nan, dtype=np.float16)
    parameters = dict(bench.model.named_parameters())
    for name, _ in layout.task_head:
        tensors[f"task_head/{name}"] = parameters[name].detach().numpy().copy()
    plain = Assignment(
        run_id="run-1", device_id="device-00", round_index=0, base_sha256=layout.base_sha256, pruning_ratio=0.5,
        rank=4, scaling=2.0, num_steps=STEPS, prune_interval=4, batch_size=6, learning_rate=5e-3, seed=7,
        mask_agreement=0.7, mask_mode="uniform", revive=True, tensors=tensors,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


def in_integers(bench, assignment, dtype):
    few = DecodedArrays(packed_once(assignment.tensors, bench.layout, "int8"), bench.layout, assignment.rank)
    return dataclasses.replace(assignment, update_dtype=dtype, tensors=few)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_round_lowers_the_loss_and_prunes_to_the_ratio(family, tiny_models):
    bench, tokens = opened(tiny_models[family], family)
    assignment = assignment_for(bench, num_steps=40, prune_interval=10)
    update, state = run_round(bench, assignment, tokens, DeviceState())
    assert update.report.loss_after < update.report.loss_before
    assert state.pruning_ratio == 0.5
    for group in bench.layout.groups:
        kept = update.tensors[f"keep/{group.name}"]
        assert len(kept) == group.num_members // 2 // group.block * group.block or len(kept) == group.block
        measured = np.isfinite(update.tensors[f"importance/{group.name}"])
        assert np.flatnonzero(measured).tolist() == kept.tolist()
    for matrix in bench.layout.matrices:
        lora_b = update.tensors[f"lora_b/{matrix.name}"]
        out = matrix.out_features
        if matrix.out_group:
            members = bench.layout.group(matrix.out_group).num_members
            out = len(update.tensors[f"keep/{matrix.out_group}"]) * out // members
        assert lora_b.shape == (out, 4)
        assert lora_b.dtype == np.float16


def test_the_same_round_gives_the_same_update(tiny_models):
    bench, tokens = opened(tiny_models["llama"], "llama")
    first, _ = run_round(bench, assignment_for(bench), tokens, DeviceState())
    again, _ = run_round(bench, assignment_for(bench), tokens, DeviceState())
    assert all(np.array_equal(first.tensors[n], again.tensors[n], equal_nan=True) for n in first.tensors)


def test_native_and_reference_kernels_agree_on_a_round(tiny_models):
    bench, tokens = opened(tiny_models["qwen2"], "qwen2")
    native, _ = run_round(bench, assignment_for(bench), tokens, DeviceState())
    with kernels.use_backend("reference"):
        plain, _ = run_round(bench, assignment_for(bench), tokens, DeviceState())
    # float16 on the wire: one unit in the last place of values below 1. AdamW makes a whole step of a gradient however
    # small, and one that all but cancels may change its sign with what is kept in bfloat16.
    off = []
    for name, expected in plain.tensors.items():
        off.append(~np.isclose(native.tensors[name], expected, rtol=2e-2, atol=2e-3, equal_nan=True).ravel())
        assert off[-1].mean() <= 0.1, name
        np.testing.assert_allclose(native.tensors[name], expected, rtol=2e-2, atol=5e-2, err_msg=name)
    assert np.concatenate(off).mean() <= 0.01


def test_a_round_that_will_not_fit_is_refused_before_it_starts(tiny_models, monkeypatch):
    bench, tokens = opened(tiny_models["llama"], "llama")
    monkeypatch.setattr(device, "available_memory_bytes", lambda: 1 << 10)
    monkeypatch.setattr(device, "tune", lambda *_, **__: pytest.fail("it started"))
    with pytest.raises(MemoryLimitError, match="MiB of free memory for a step, found 0 MiB"):
        run_round(bench, assignment_for(bench), tokens, DeviceState())


def test_messages_survive_the_wire(tiny_models):
    bench, tokens = opened(tiny_models["bert"], "bert")
    assignment = assignment_for(bench)
    assert assignment_from_bytes(to_bytes(assignment)) == assignment
    update, _ = run_round(bench, assignment_from_bytes(to_bytes(assignment)), tokens, DeviceState())
    back = update_from_bytes(to_bytes(update))
    assert back == update
    assert all(np.array_equal(back.tensors[n], update.tensors[n], equal_nan=True) for n in update.tensors)


def test_an_assignment_for_another_base_is_refused(tiny_models):
    bench, tokens = opened(tiny_models["llama"], "llama")
    with pytest.raises(IncompatibleError, match="assignment is for base ffffffffffff, this device has"):
        run_round(bench, assignment_for(bench, base_sha256="f" * 64), tokens, DeviceState())


def test_a_loss_that_is_not_finite_is_an_error(tiny_models):
    bench, tokens = opened(tiny_models["llama"], "llama")
    assignment = assignment_for(bench)
    name = next(iter(n for n in assignment.tensors if n.startswith("lora_b/")))
    assignment.tensors[name][:] = np.nan
    with pytest.raises(TuningError, match="expected a finite loss, found nan"):
        run_round(bench, assignment, tokens, DeviceState())


def test_a_device_with_one_example_does_its_round(tiny_models):
    bench, tokens = opened(tiny_models["distilbert"], "distilbert")
    update, _ = run_round(bench, assignment_for(bench), tokens.take(np.array([0])), DeviceState())
    assert update.report.num_examples == 1


def world_of(bench, update):
    """The update as if it were the global adapter."""
    layout = bench.layout
    keep = {group.name: update.tensors[f"keep/{group.name}"] for group in layout.groups}
    generator = torch.Generator().manual_seed(3)
    factors = {}
    for matrix in layout.matrices:
        lora_a, lora_b = fresh_factors(matrix.out_features, matrix.in_features, 4, generator)
        factors[matrix.name] = (lora_a.numpy(), (torch.randn(lora_b.shape, generator=generator) * 0.05).numpy())
    task_head = {name: update.tensors[f"task_head/{name}"] for name, _ in layout.task_head}
    mean_inputs = {
        name.removeprefix("mean_input/"): value for name, value in update.tensors.items() if "mean_input/" in name
    }
    filled = {name: np.nan_to_num(value, nan=0.25) for name, value in mean_inputs.items()}
    return GlobalModel(keep=keep, factors=factors, task_head=task_head, mean_inputs=filled, scaling=2.0)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_saved_pruned_model_says_what_the_shrunk_one_says(family, tiny_models, tmp_path):
    bench, tokens = opened(tiny_models[family], family)
    update, _ = run_round(bench, assignment_for(bench), tokens, DeviceState())
    world = world_of(bench, update)
    save_pruned(tmp_path / "out", bench.base, bench.layout, world, mode="uniform")
    loaded = load_pruned(tmp_path / "out")
    load_global(bench, world)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        expected, found = bench.model(input_ids=ids).logits, loaded(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-3)  # matrices are stored as float16
    assert (predict(loaded, tokens, choices=bench.choices) == predict(bench.model, tokens, choices=bench.choices)).all()


def test_a_pruned_directory_of_another_format_is_refused(tiny_models, tmp_path):
    bench, tokens = opened(tiny_models["llama"], "llama")
    update, _ = run_round(bench, assignment_for(bench), tokens, DeviceState())
    save_pruned(tmp_path / "out", bench.base, bench.layout, world_of(bench, update), mode="uniform")
    file = tmp_path / "out" / "fedspine_prune.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(CheckpointError, match="is format 9, this program reads 1"):
        load_pruned(tmp_path / "out")


def test_an_unpruned_global_model_is_the_merged_base(tiny_models, tmp_path):
    bench, _ = opened(tiny_models["llama"], "llama")
    zero = {
        m.name: (np.ones((2, m.in_features), "f4"), np.zeros((m.out_features, 2), "f4")) for m in bench.layout.matrices
    }
    save_pruned(
        tmp_path / "out",
        bench.base,
        bench.layout,
        GlobalModel(keep_all(bench.layout), zero, {}, {}, 2.0),
        mode="uniform",
    )
    saved = load_pruned(tmp_path / "out").state_dict()
    for name in bench.base.files:
        weight = bench.base.read(name)
        assert torch.equal(saved[name], weight.half().float() if weight.ndim == 2 else weight)


def test_a_full_disk_leaves_the_last_model_and_no_litter(tiny_models, tmp_path, monkeypatch):
    bench, tokens = opened(tiny_models["llama"], "llama")
    update, _ = run_round(bench, assignment_for(bench), tokens, DeviceState())
    target = tmp_path / "out"
    save_pruned(target, bench.base, bench.layout, world_of(bench, update), mode="uniform")
    before = (target / "model.safetensors").read_bytes()

    def full(*_args, **_more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedspine_edge.checkpoint.save_file", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*out: No space left on device"):
        save_pruned(target, bench.base, bench.layout, world_of(bench, update), mode="uniform")
    assert (target / "model.safetensors").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_device_remembers_the_newest_whole_state_of_an_earlier_round(tmp_path):
    for index in range(4):
        state = DeviceState(index / 10, {"layers.0.heads": np.array([index, np.nan], dtype=np.float32)})
        save_device_state(tmp_path, "device-01", index, state)
    assert sorted(file.name for file in tmp_path.iterdir())[0] == "device-01.round-000002.safetensors"
    assert load_device_state(tmp_path, "device-01", 4).pruning_ratio == 0.3
    assert load_device_state(tmp_path, "device-01", 3).importance["layers.0.heads"][0] == 2
    newest = tmp_path / "device-01.round-000003.safetensors"
    newest.write_bytes(newest.read_bytes()[:40])
    assert load_device_state(tmp_path, "device-01", 4).pruning_ratio == 0.2
    assert load_device_state(tmp_path, "device-02", 4) == DeviceState()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_round_on_narrow_weights_learns_nearly_the_same(dtype, tiny_models):
    bench, tokens = opened(tiny_models["bert"], "bert")
    asked = assignment_for(bench)
    plain, _ = run_round(bench, asked, tokens, DeviceState())
    narrow, _ = run_round(bench, dataclasses.replace(asked, base_dtype=dtype), tokens, DeviceState())
    linears = [module for module in bench.model.modules() if isinstance(module, LoRALinear)]
    assert {linear.packed.dtype for linear in linears} == {dtype}
    assert narrow.report.loss_after == pytest.approx(plain.report.loss_after, rel=0.02)
    assert any((array != narrow.tensors[name]).any() for name, array in plain.tensors.items() if "lora_b" in name)
    again, _ = run_round(bench, asked, tokens, DeviceState())  # the next one may ask for other weights
    for name, array in plain.tensors.items():
        np.testing.assert_array_equal(array, again.tensors[name])


def test_a_round_with_dropout_learns_otherwise_the_same_each_time_and_predicts_without(tiny_models):
    bench, tokens = opened(tiny_models["bert"], "bert")
    asked = dataclasses.replace(assignment_for(bench), lora_dropout=0.5)
    dropped, _ = run_round(bench, asked, tokens, DeviceState())
    linears = [module for module in bench.model.modules() if isinstance(module, LoRALinear)]
    assert linears
    assert all(linear.dropout is None for linear in linears)
    again, _ = run_round(bench, asked, tokens, DeviceState())
    plain, _ = run_round(bench, dataclasses.replace(asked, lora_dropout=0.0), tokens, DeviceState())
    for name, array in dropped.tensors.items():
        np.testing.assert_array_equal(array, again.tensors[name])
    assert any((array != plain.tensors[name]).any() for name, array in dropped.tensors.items() if "lora_b" in name)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_round_in_few_bits_sends_less_and_remembers_what_it_lost(dtype, tiny_models, tmp_path):
    bench, tokens = opened(tiny_models["bert"], "bert")
    plain, _ = run_round(bench, assignment_for(bench), tokens, DeviceState())
    asked = in_integers(bench, assignment_for(bench), dtype)
    update, state = run_round(bench, asked, tokens, DeviceState())
    assert tensors_nbytes(update) < tensors_nbytes(plain)
    read = as_float16(update, dtype, bench.layout)
    for name, array in plain.tensors.items():
        assert read.tensors[name].shape == array.shape
    assert set(state.residuals) == {matrix.name for matrix in bench.layout.matrices}
    assert any(np.abs(pair[1]).max() > 0 for pair in state.residuals.values())
    save_device_state(tmp_path, "a", 0, state)
    again = load_device_state(tmp_path, "a", 1)
    for name, pair in state.residuals.items():
        for kept, loaded in zip(pair, again.residuals[name], strict=True):
            np.testing.assert_array_equal(kept, loaded)
    assert set(again.importance) == set(state.importance)
    # A second round from what was saved, after more members went, is the same whether or not the device was restarted.
    further = dataclasses.replace(asked, round_index=1, pruning_ratio=0.5)
    one, other = (run_round(bench, further, tokens, remembered)[0] for remembered in (state, again))
    for name, array in one.tensors.items():
        np.testing.assert_array_equal(array, other.tensors[name])


def test_an_assignment_of_integers_is_tuned_like_what_it_reads_as_and_survives_the_way(tiny_models):
    bench, tokens = opened(tiny_models["bert"], "bert")
    plain = assignment_for(bench)
    asked = in_integers(bench, plain, "int8")
    received = assignment_from_bytes(to_bytes(asked))
    assert tensors_nbytes(received) == tensors_nbytes(asked) < tensors_nbytes(plain)
    near, back = asked.tensors, as_float16(received, "int8", bench.layout).tensors
    for name, array in plain.tensors.items():
        np.testing.assert_array_equal(near[name], back[name])
        if name.startswith("lora_"):
            np.testing.assert_allclose(near[name], array, atol=0.02 * max(1e-6, float(np.abs(array).max())))
    one, other = (run_round(bench, message, tokens, DeviceState())[0] for message in (asked, received))
    for name, array in one.tensors.items():
        np.testing.assert_array_equal(array, other.tensors[name])
