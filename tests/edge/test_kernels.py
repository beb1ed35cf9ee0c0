"""The kernels against their meaning in float64, for every instruction set this CPU has."""

import copy
import importlib.util
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fedspine_edge
from fedspine_edge import backends, kernels, reference
from fedspine_edge.dropout import Dropout

SCALING = 2.0
NATIVE = [pytest.param(f"native-{isa}") for isa in kernels.available_isas()]
# Float32 sums of about 100 terms of size 1: a relative 1e-5 is 10 times what rounding gives.
TOLERANCE = 1e-5


@pytest.fixture(params=[*NATIVE, "reference"])
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    backend, _, isa = request.param.partition("-")
    with kernels.use_backend(backend):
        if not isa:
            yield request.param
            return
        with kernels.use_isa(isa):
            yield request.param


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=TOLERANCE * largest + 1e-30)


def run_layer(
    tokens: int, in_features: int, out_features: int, rank: int, *, bias: bool = True, dropout: Dropout | None = None
) -> list[Tensor]:
    """The layer's output and gradients by the kernels, then the same in float64."""
    weight = draw(out_features, in_features, seed=1)
    leaves = [draw(tokens, in_features, seed=2)]
    leaves += [draw(out_features, seed=3)] if bias else []
    leaves += [draw(rank, in_features, seed=4), draw(out_features, rank, seed=5)]
    dy = draw(tokens, out_features, seed=6)
    results = []
    for dtype in (torch.float32, torch.float64):
        given_leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        x, *vector, lora_a, lora_b = given_leaves
        arguments = {"bias": vector[0] if bias else None, "lora_a": lora_a, "lora_b": lora_b, "scaling": SCALING}
        arguments["dropout"] = dropout
        if dtype == torch.float32:
            y = kernels.lora_linear(x, kernels.pack(weight), **arguments)
        else:
            y = reference.lora_linear(x, weight.double(), **arguments)
        results.append([y, *torch.autograd.grad(y, given_leaves, dy.to(dtype))])
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected)
    return results[0]


def test_layer_by_hand(each_backend):
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    y = kernels.lora_linear(
        torch.tensor([[1.0, 10.0]]),
        kernels.pack(weight),
        bias=torch.tensor([100.0, 200.0]),
        lora_a=torch.tensor([[1.0, 1.0]]),
        lora_b=torch.tensor([[1.0], [-1.0]]),
        scaling=2.0,
    )
    # x W^T = [21, 43]; x A^T = 11, times scaling times B = [22, -22]
    assert y.tolist() == [[21.0 + 100 + 22, 43.0 + 200 - 22]]


@pytest.mark.parametrize("rank", [0, 1, 3, 8, 16, 17, 64])
def test_layer_of_every_rank_matches_float64(each_backend, rank):
    run_layer(33, 97, 70, rank)


@pytest.mark.parametrize("tokens", [1, 2, 7, 31, 32, 97, 260])
def test_layer_of_any_number_of_tokens_matches_float64(each_backend, tokens):
    run_layer(tokens, 40, 50, 5)


@pytest.mark.parametrize(("in_features", "out_features"), [(1, 1), (1, 97), (97, 1), (7, 15), (1030, 33), (33, 1030)])
def test_layer_of_odd_sizes_matches_float64(each_backend, in_features, out_features):
    run_layer(19, in_features, out_features, 4, bias=False)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 70),
    in_features=st.integers(1, 70),
    out_features=st.integers(1, 70),
    rank=st.integers(0, 40),
    isa=st.sampled_from(kernels.available_isas() or ("none",)),
)
def test_layer_of_any_shape_matches_float64(tokens, in_features, out_features, rank, isa):
    if isa == "none":
        run_layer(tokens, in_features, out_features, rank)
        return
    with kernels.use_isa(isa):
        run_layer(tokens, in_features, out_features, rank)


def test_layer_backward_matches_finite_differences(each_backend):
    # The layer is linear in each input alone, so a central difference of any width is exact: no step to choose.
    x, lora_a, lora_b = draw(5, 7, seed=1), draw(3, 7, seed=2), draw(4, 3, seed=3)
    packed, dy = kernels.pack(draw(4, 7)), draw(5, 4, seed=4)
    leaves = [leaf.requires_grad_() for leaf in (x, lora_a, lora_b)]

    def loss(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        y = kernels.lora_linear(x, packed, bias=None, lora_a=lora_a, lora_b=lora_b, scaling=SCALING)
        return (y * dy).sum()

    gradients = torch.autograd.grad(loss(*leaves), leaves)
    for index, gradient in enumerate(gradients):
        for place in range(leaves[index].numel()):
            moved = [leaf.detach().clone() for leaf in leaves]
            moved[index].view(-1)[place] += 1
            up = loss(*moved)
            moved[index].view(-1)[place] -= 2
            difference = float(up - loss(*moved)) / 2
            assert difference == pytest.approx(float(gradient.view(-1)[place]), abs=1e-4)


def test_leading_dimensions_and_strides_are_taken(each_backend):
    weight, lora_a, lora_b = draw(6, 10), draw(2, 10), draw(2, 6).T
    x = draw(4, 10, 3).transpose(1, 2)
    assert not x.is_contiguous()
    y = kernels.lora_linear(x, kernels.pack(weight), bias=None, lora_a=lora_a, lora_b=lora_b, scaling=SCALING)
    assert y.shape == (4, 3, 6)
    assert_close(
        y,
        reference.lora_linear(
            x.double(), weight.double(), bias=None, lora_a=lora_a.double(), lora_b=lora_b.double(), scaling=SCALING
        ),
    )


def test_expanded_gradients_are_taken(each_backend):
    x = draw(3, 4).requires_grad_()
    weight = draw(5, 4)
    kernels.lora_linear(x, kernels.pack(weight), bias=None, lora_a=None, lora_b=None, scaling=1.0).sum().backward()
    assert_close(x.grad, weight.double().sum(0).expand(3, 4))


def test_layer_without_lora_is_a_linear_layer(each_backend):
    x, weight, bias = draw(9, 20), draw(30, 20), draw(30)
    y = kernels.lora_linear(x, kernels.pack(weight), bias=bias, lora_a=None, lora_b=None, scaling=SCALING)
    assert_close(y, torch.nn.functional.linear(x.double(), weight.double(), bias.double()))


def test_no_grad_gives_the_same_output_and_no_graph(each_backend):
    x, lora_a, lora_b = draw(9, 20), draw(2, 20).requires_grad_(), draw(30, 2)
    packed = kernels.pack(draw(30, 20))
    arguments = {"bias": None, "lora_a": lora_a, "lora_b": lora_b, "scaling": SCALING}
    with torch.no_grad():
        y = kernels.lora_linear(x, packed, **arguments)
    assert not y.requires_grad
    assert torch.equal(y, kernels.lora_linear(x, packed, **arguments))


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_wanted_gradients_are_given(each_backend, wanted):
    leaves = [
        leaf.requires_grad_(want) for leaf, want in zip((draw(3, 4), draw(2, 4), draw(5, 2)), wanted, strict=True)
    ]
    x, lora_a, lora_b = leaves
    weight = draw(5, 4)
    y = kernels.lora_linear(x, kernels.pack(weight), bias=None, lora_a=lora_a, lora_b=lora_b, scaling=SCALING)
    y.backward(draw(3, 5))
    twins = [leaf.detach().double().requires_grad_() for leaf in leaves]
    z = reference.lora_linear(twins[0], weight.double(), bias=None, lora_a=twins[1], lora_b=twins[2], scaling=SCALING)
    z.backward(draw(3, 5).double())
    for leaf, twin, want in zip(leaves, twins, wanted, strict=True):
        assert (leaf.grad is not None) == want
        if want:
            assert_close(leaf.grad, twin.grad)


@pytest.mark.skipif(kernels.backend() != "native", reason="the reference leaves saving to autograd")
def test_a_frozen_adapter_saves_neither_input_nor_hidden():
    saved = []
    x = draw(64, 128).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.nbytes) or tensor, lambda t: t):
        kernels.lora_linear(
            x, kernels.pack(draw(96, 128)), bias=None, lora_a=draw(4, 128), lora_b=draw(96, 4), scaling=SCALING
        )
    assert sum(saved) == 4 * (4 * 128 + 96 * 4)


@pytest.mark.skipif(kernels.backend() != "native", reason="threads are the native kernels'")
@pytest.mark.parametrize("tokens", [16, 301])
def test_threads_do_not_change_a_bit(tokens):
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            layer = run_layer(tokens, 384, 160, 16)
            packed = kernels.pack(draw(160, 384))
            factors = {"lora_a": draw(16, 384), "lora_b": draw(160, 16), "grad_a": draw(16, 384, seed=1)}
            scores = [
                kernels.importance(packed, **factors, grad_b=draw(160, 16, seed=1), scaling=SCALING, axis=axis)
                for axis in ("out", "in")
            ]
            runs.append([*layer, *scores])
    finally:
        torch.set_num_threads(before)
    for many in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], many, strict=True))


def keeps_of(size: int) -> list[list[int]]:
    return [[], [size - 1], list(range(0, size, 3)), list(range(size))]


@pytest.mark.parametrize("keep", keeps_of(97))
def test_gathered_rows_and_columns_are_torchs(each_backend, keep):
    matrix, indices = draw(97, 7), torch.tensor(keep, dtype=torch.int64)
    assert torch.equal(kernels.gather_rows(matrix, indices), matrix[indices])
    assert torch.equal(kernels.gather_columns(matrix.T, indices), matrix.T[:, indices])
    assert kernels.gather_columns(matrix.T, indices).is_contiguous()


@pytest.mark.parametrize("keep_out", [None, *keeps_of(70)[1:]])
@pytest.mark.parametrize("keep_in", [None, *keeps_of(35)[1:]])
def test_unpack_gives_the_kept_weight_back(each_backend, keep_out, keep_in):
    weight = draw(70, 35)
    rows = None if keep_out is None else torch.tensor(keep_out)
    columns = None if keep_in is None else torch.tensor(keep_in)
    packed = kernels.pack(weight, keep_out=rows, keep_in=columns)
    expected = weight if rows is None else weight[rows]
    expected = expected if columns is None else expected[:, columns]
    assert (packed.out_features, packed.in_features) == tuple(expected.shape)
    assert torch.equal(kernels.unpack(packed), expected)


def test_native_and_reference_pack_alike(each_backend):
    weight = draw(70, 35)
    with kernels.use_backend("reference"):
        expected = kernels.pack(weight)
    assert torch.equal(kernels.pack(weight).panels, expected.panels)
    assert expected.nbytes == 96 * 35 * 4


def test_mapped_files_and_slices_are_packed_in_place(each_backend, tmp_path):
    weight = draw(8, 6)
    weight.numpy().tofile(tmp_path / "weight.bin")
    mapped = torch.from_numpy(np.memmap(tmp_path / "weight.bin", np.float32, "c", shape=(8, 6)))
    assert torch.equal(kernels.unpack(kernels.pack(mapped[2:5, 1:4])), weight[2:5, 1:4])
    assert torch.equal(kernels.unpack(kernels.pack(weight.T)), weight.T)


def test_copies_of_a_model_share_the_packed_weight():
    packed = kernels.pack(draw(3, 4))
    assert copy.deepcopy(packed) is packed


def test_importance_by_hand(each_backend):
    # G = dB A + B dA - dB dA = [[2, 0], [0, 1]] * ..., worked out below.
    packed = kernels.pack(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
    arguments = {
        "lora_a": torch.tensor([[1.0, 2.0]]),
        "lora_b": torch.tensor([[1.0], [0.0]]),
        "grad_a": torch.tensor([[0.5, -1.0]]),
        "grad_b": torch.tensor([[2.0], [1.0]]),
        "scaling": 2.0,
    }
    # G = [[2 + .5 - 1, 4 - 1 + 2], [1 - .5, 2 + 1]] = [[1.5, 5], [.5, 3]]; W + 2 B A = [[3, 2], [3, 4]]
    assert kernels.importance(packed, **arguments, axis="out").tolist() == [4.5 + 10, 1.5 + 12]
    assert kernels.importance(packed, **arguments, axis="in").tolist() == [4.5 + 1.5, 10 + 12]


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize(
    ("out_features", "in_features", "rank"), [(1, 1, 1), (97, 33, 3), (33, 200, 17), (130, 64, 64)]
)
def test_importance_matches_the_dense_definition(each_backend, out_features, in_features, rank, axis):
    weight = draw(out_features, in_features)
    factors = {
        "lora_a": draw(rank, in_features, seed=1),
        "lora_b": draw(out_features, rank, seed=2),
        "grad_a": draw(rank, in_features, seed=3),
        "grad_b": draw(out_features, rank, seed=4),
    }
    found = kernels.importance(kernels.pack(weight), **factors, scaling=SCALING, axis=axis)
    wide = {name: factor.double() for name, factor in factors.items()}
    gradient = wide["grad_b"] @ wide["lora_a"] + wide["lora_b"] @ wide["grad_a"] - wide["grad_b"] @ wide["grad_a"]
    scores = (gradient * (weight.double() + SCALING * wide["lora_b"] @ wide["lora_a"])).abs()
    assert_close(found, scores.sum(1 if axis == "out" else 0))


@pytest.mark.parametrize("axis", ["out", "in"])
def test_importance_of_a_sample_sums_over_its_blocks(each_backend, axis):
    packed = kernels.pack(draw(130, 200))
    factors = {"lora_a": draw(3, 200), "lora_b": draw(130, 3), "grad_a": draw(3, 200, seed=1)}

    def scores(*sample: int) -> Tensor:
        return kernels.importance(packed, **factors, grad_b=draw(130, 3, seed=1), scaling=1.0, axis=axis, sample=sample)

    whole = scores(1, 5)
    assert_close(sum(scores(4, phase) for phase in range(4)), whole.double())
    assert torch.equal(scores(4, 6), scores(4, 2))
    assert not torch.equal(scores(4, 0), scores(4, 1))
    blocks = 7 if axis == "out" else 5
    assert torch.equal(scores(100, blocks + 1), scores(blocks, 1))  # there is always one to look at
    with pytest.raises(ValueError, match="expected a sample of every 1st block or fewer"):
        scores(0, 0)


def call(**changes):
    arguments = {"bias": None, "lora_a": draw(2, 4), "lora_b": draw(5, 2), "scaling": 1.0, "x": draw(3, 4)}
    arguments.update(changes)
    return kernels.lora_linear(arguments.pop("x"), kernels.pack(draw(5, 4)), **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": draw(3, 5)}, r"expected x of shape \[3, 4\], found \[3, 5\]"),
        ({"x": torch.zeros(0, 4)}, r"expected at least one token in x, found shape \[0, 4\]"),
        ({"x": torch.tensor(1.0)}, r"expected x of shape \[4\], found \[\]"),
        ({"x": draw(3, 4).double()}, "expected x as float32 on cpu, found float64 on cpu"),
        ({"x": torch.zeros(3, 4, device="meta")}, "expected x as float32 on cpu, found float32 on meta"),
        ({"bias": draw(4)}, r"expected bias of shape \[5\], found \[4\]"),
        ({"lora_a": None}, "expected both lora_a and lora_b or neither, found one of them"),
        ({"lora_a": draw(2, 3)}, r"expected lora_a of shape \[any, 4\], found \[2, 3\]"),
        ({"lora_b": draw(5, 3)}, r"expected lora_b of shape \[5, 2\], found \[5, 3\]"),
    ],
)
def test_layer_refuses_what_does_not_fit(each_backend, changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ([0, 5], r"expected keep within \[0, 5\), found 0..5"),
        ([-1, 2], r"expected keep within \[0, 5\), found -1..2"),
        ([1, 1], "expected keep sorted and unique"),
        ([2, 1], "expected keep sorted and unique"),
        ([True, False], "expected keep as a list of int64 on cpu, found bool on cpu"),
        ([[0], [1]], r"expected keep as a list of int64 on cpu, found int64 on cpu of shape \[2, 1\]"),
    ],
)
def test_gather_refuses_a_list_that_is_not_sorted_indices(each_backend, keep, message):
    with pytest.raises(ValueError, match=message):
        kernels.gather_rows(draw(5, 3), torch.tensor(keep))


def test_pack_refuses_to_keep_nothing(each_backend):
    with pytest.raises(ValueError, match="expected at least one kept output and input, found 0 and 3"):
        kernels.pack(draw(5, 3), keep_out=torch.tensor([], dtype=torch.int64))


def test_pack_refuses_another_dtype(each_backend):
    with pytest.raises(ValueError, match="expected base_weight as float32 on cpu, found bfloat16 on cpu"):
        kernels.pack(draw(5, 3).bfloat16())


def test_importance_refuses_rank_zero_and_unknown_axes(each_backend):
    packed = kernels.pack(draw(5, 3))
    factors = {"lora_a": draw(0, 3), "lora_b": draw(5, 0), "grad_a": draw(0, 3), "grad_b": draw(5, 0)}
    with pytest.raises(ValueError, match="expected lora_a of rank 1 or more, found 0"):
        kernels.importance(packed, **factors, scaling=1.0, axis="out")
    with pytest.raises(ValueError, match="expected axis out or in, found rows"):
        kernels.importance(packed, **factors, scaling=1.0, axis="rows")


def test_unknown_backends_and_instruction_sets_are_refused():
    with (
        pytest.raises(ValueError, match=r"expected a backend of .*reference, found fortran"),
        kernels.use_backend("fortran"),
    ):
        pass
    with pytest.raises(ValueError, match=r"expected an instruction set of .*, found mmx"), kernels.use_isa("mmx"):
        pass


def test_forced_choices_end_with_their_block():
    before = kernels.backend(), kernels.isa()
    with kernels.use_backend("reference"):
        assert kernels.backend() == "reference"
    for isa in kernels.available_isas():
        with kernels.use_isa(isa):
            assert kernels.isa() == isa
    assert (kernels.backend(), kernels.isa()) == before


def test_without_the_extension_the_reference_is_used(monkeypatch):
    monkeypatch.setitem(sys.modules, "fedspine_edge._native", None)
    monkeypatch.delattr(fedspine_edge, "_native", raising=False)
    spec = importlib.util.spec_from_file_location("backends_without_native", backends.__file__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    assert (fresh.backend(), fresh.isa(), fresh.available_isas()) == ("reference", "none", ())
    with pytest.raises(ValueError, match="expected an instruction set of none, found avx2"), fresh.use_isa("avx2"):
        pass
