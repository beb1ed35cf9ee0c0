"""The elementwise kernels against their meaning in float64, for every instruction set this CPU has."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedspine_edge import elementwise, kernels, reference

EPSILON = 1e-5
ULP = 2.0**-23
NATIVE = [pytest.param(f"native-{isa}") for isa in kernels.available_isas()]
SIZES = [(1, 1), (1, 97), (7, 1), (7, 7), (7, 15), (97, 33), (3, 576), (2, 1030)]
native_only = pytest.mark.skipif(kernels.backend() != "native", reason="the reference leaves this to torch")


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


def short(x: Tensor) -> Tensor:
    """Rounded to what the backward keeps, so that it is compared to the last bits."""
    return x.bfloat16().float()


def assert_close(found: Tensor, expected: Tensor, largest_term: float = 0.0) -> None:
    """Within about 30 roundings of the largest element, or of the largest term where terms cancel."""
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    atol = 4e-6 * max(float(expected.detach().abs().max()), largest_term) + 1e-30
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=atol)


def run_both(
    function: str, leaves: list[Tensor], dy: Tensor, *, largest_term: float = 0.0, **arguments
) -> list[Tensor]:
    """Checks a kernel's output and the leaves' gradients against float64, and returns them."""
    results = []
    for module, dtype in ((elementwise, torch.float32), (reference, torch.float64)):
        typed = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        constants = {name: v.to(dtype) if isinstance(v, Tensor) else v for name, v in arguments.items()}
        y = getattr(module, function)(*typed, **constants)
        results.append([y, *torch.autograd.grad(y, typed, dy.to(dtype))])
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected, largest_term)
    return results[0]


def run_norm(tokens: int, features: int) -> list[Tensor]:
    x, dy, weight = draw(tokens, features, seed=1), draw(tokens, features, seed=2), draw(features, seed=3)
    largest_term = float((weight * dy / (x.pow(2).mean(-1, keepdim=True) + EPSILON).sqrt()).abs().max())
    return run_both("rms_norm", [x], dy, weight=weight, epsilon=EPSILON, largest_term=largest_term)


def run_gate(*shape: int) -> list[Tensor]:
    return run_both("swiglu", [short(4 * draw(*shape, seed=1)), short(draw(*shape, seed=2))], draw(*shape, seed=3))


def run_gelu(*shape: int) -> list[Tensor]:
    return run_both("gelu", [short(2 * draw(*shape, seed=1))], draw(*shape, seed=3))


def run_layer_norm(tokens: int, features: int, *, residual: bool = True) -> None:
    """The output to float32's last bits; the gradient to those of the normalised rows as they are kept."""
    x, other, dy = (draw(tokens, features, seed=seed) for seed in (1, 2, 3))
    weight, bias = draw(features, seed=4), draw(features, seed=5)
    leaves = [leaf.requires_grad_() for leaf in ((x, other) if residual else (x,))]
    y = elementwise.layer_norm(x, other if residual else None, weight, bias, epsilon=EPSILON)
    z = (x.detach().double() + other.detach().double()) if residual else x.detach().double()
    centred = z - z.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
    assert_close(y, centred * rstd * weight.double() + bias.double(), largest_term=float(rstd.max()))
    kept = centred * rstd if kernels.backend() == "reference" else (centred * rstd).float().bfloat16().double()
    slope = weight.double() * dy.double()
    dz = rstd * (slope - slope.mean(-1, keepdim=True) - kept * (slope * kept).mean(-1, keepdim=True))
    largest = float((rstd * slope).abs().max())
    for gradient in torch.autograd.grad(y, leaves, dy):
        # A number next to the middle between two bfloat16s may be kept as the other one: 2^-8 of one term.
        assert float((gradient - dz).abs().max()) <= (4e-6 if features == 1 else 1e-2 / features + 4e-6) * largest


def test_norm_by_hand(each_backend):
    # mean(x^2) = (1 + 49) / 2 = 25, so y = x / 5 * weight
    y = elementwise.rms_norm(torch.tensor([[1.0, 7.0]]), torch.tensor([10.0, -5.0]), epsilon=0.0)
    torch.testing.assert_close(y, torch.tensor([[2.0, -7.0]]), rtol=1e-6, atol=0)


def test_epsilon_is_added_to_the_mean_square(each_backend):
    # mean(x^2) + epsilon = 9 + 16
    y = elementwise.rms_norm(torch.tensor([3.0, -3.0]), torch.ones(2), epsilon=16.0)
    torch.testing.assert_close(y, torch.tensor([0.6, -0.6]), rtol=1e-6, atol=0)


def test_gate_by_hand(each_backend):
    # 1 / (1 + exp(-ln 3)) = 3 / 4; 1 / (1 + exp(0)) = 1 / 2
    y = elementwise.swiglu(torch.tensor([math.log(3.0), 0.0, -math.log(3.0)]), torch.tensor([4.0, 9.0, 4.0]))
    expected = torch.tensor([3 * math.log(3.0), 0.0, -math.log(3.0)])
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("tokens", "features"), SIZES)
def test_norm_and_its_gradient_match_float64(each_backend, tokens, features):
    run_norm(tokens, features)


@pytest.mark.parametrize(("tokens", "features"), SIZES)
def test_gate_and_its_gradients_match_float64(each_backend, tokens, features):
    run_gate(tokens, features)


@pytest.mark.parametrize(("tokens", "features"), SIZES)
def test_gelu_and_its_gradient_match_float64(each_backend, tokens, features):
    run_gelu(tokens, features)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("tokens", "features"), SIZES)
def test_layer_norm_and_its_gradients_match_float64(each_backend, tokens, features, residual):
    run_layer_norm(tokens, features, residual=residual)


def test_layer_norm_by_hand(each_backend):
    # 1 + 2 and 4 + 1: mean 4, deviation 1
    y = elementwise.layer_norm(
        torch.tensor([[1.0, 4.0]]),
        torch.tensor([[2.0, 1.0]]),
        torch.tensor([10.0, 2.0]),
        torch.tensor([1.0, 1.0]),
        epsilon=0.0,
    )
    torch.testing.assert_close(y, torch.tensor([[-9.0, 3.0]]), rtol=1e-6, atol=0)


def test_gelu_by_hand(each_backend):
    # erf(1 / sqrt(2)) = .682689: the share of a normal within one deviation
    y = elementwise.gelu(torch.tensor([0.0, 1.0, -1.0, 30.0]))
    torch.testing.assert_close(y, torch.tensor([0.0, 0.8413447, -0.1586553, 30.0]), rtol=1e-6, atol=0)


def test_layer_norm_gradient_matches_finite_differences(each_backend):
    weight, bias, residual, dy = draw(9, seed=4), draw(9, seed=5), draw(3, 9, seed=6), draw(3, 9, seed=1)

    def norm(x: Tensor) -> Tensor:
        return elementwise.layer_norm(x, residual, weight, bias, epsilon=EPSILON)

    assert_finite_differences(norm, draw(3, 9), dy, tolerance=2e-2)  # of what is kept


def test_gelu_gradient_matches_finite_differences(each_backend):
    assert_finite_differences(elementwise.gelu, short(draw(3, 9, seed=5)), draw(3, 9, seed=7))


@pytest.mark.parametrize("place", [0, 8, 18])
def test_nan_passes_gelu_and_layer_norm(each_backend, place):
    x, rest = draw(2, 19), [i for i in range(19) if i != place]
    x[0, place] = math.nan
    leaf = x.requires_grad_()
    y = elementwise.gelu(leaf)
    for result in (y, *torch.autograd.grad(y, leaf, torch.ones(2, 19))):
        assert result[0, place].isnan()
        assert result[0, rest].isfinite().all()
    y = elementwise.layer_norm(leaf, None, torch.ones(19), torch.zeros(19), epsilon=EPSILON)
    for result in (y, *torch.autograd.grad(y, leaf, draw(2, 19))):
        assert result[0].isnan().all()
        assert result[1].isfinite().all()


@native_only
def test_what_is_computed_again_is_what_was_computed():
    gate, up = short(draw(7, 33)).requires_grad_(), short(draw(7, 33, seed=1)).requires_grad_()
    for y in (elementwise.swiglu(gate, up), elementwise.gelu(gate), elementwise.rms_norm(gate, up[0], epsilon=0.1)):
        _, again = y.computed_again
        assert torch.equal(again(), y)
    y = elementwise.layer_norm(gate, up, torch.ones(33), torch.zeros(33), epsilon=0.1)
    torch.testing.assert_close(y.computed_again[1](), y.detach(), rtol=2**-8, atol=0)


def test_wrong_arguments_of_layer_norm_and_gelu_are_refused():
    x, weight = draw(3, 8), torch.ones(8)
    for arguments, message in (
        ((x, draw(3, 7), weight, weight), r"residual of shape \[3, 8\], found \[3, 7\]"),
        ((x, None, weight, torch.ones(7)), r"bias of shape \[8\], found \[7\]"),
        ((x.double(), None, weight, weight), "x as float32 on cpu, found float64"),
        ((x[:0], None, weight, weight), "at least one element in x"),
    ):
        with pytest.raises(ValueError, match=message):
            elementwise.layer_norm(*arguments, epsilon=0.1)
    with pytest.raises(ValueError, match="epsilon of at least 0, found -1"):
        elementwise.layer_norm(x, None, weight, weight, epsilon=-1.0)
    with pytest.raises(ValueError, match="x as float32 on cpu, found int64"):
        elementwise.gelu(torch.ones(3, dtype=torch.int64))


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 40),
    features=st.integers(1, 150),
    isa=st.sampled_from(kernels.available_isas() or ("none",)),
)
def test_any_shape_matches_float64(tokens, features, isa):
    if isa == "none":
        run_norm(tokens, features)
        return
    with kernels.use_isa(isa):
        run_norm(tokens, features)
        run_gate(tokens, features)


def assert_finite_differences(function, x: Tensor, dy: Tensor, *, tolerance: float = 2e-3) -> None:
    """Moves each element of x by 2^-6 both ways: the error is of the order of the square of that, 2e-4."""
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf), leaf, dy)
    step = 2.0**-6
    for place in range(x.numel()):
        moved = x.clone(memory_format=torch.contiguous_format)
        moved.view(-1)[place] += step
        up = float((function(moved) * dy).sum())
        moved.view(-1)[place] -= 2 * step
        difference = (up - float((function(moved) * dy).sum())) / (2 * step)
        assert difference == pytest.approx(float(gradient.reshape(-1)[place]), abs=tolerance)


def test_norm_gradient_matches_finite_differences(each_backend):
    weight = draw(9, seed=4)
    assert_finite_differences(
        lambda x: elementwise.rms_norm(x, weight, epsilon=EPSILON), draw(3, 9), draw(3, 9, seed=1)
    )


def test_gate_gradients_match_finite_differences(each_backend):
    gate, up, dy = short(draw(3, 9, seed=5)), short(draw(3, 9, seed=6)), draw(3, 9, seed=7)
    assert_finite_differences(lambda moved: elementwise.swiglu(moved, up), gate, dy)
    assert_finite_differences(lambda moved: elementwise.swiglu(gate, moved), up, dy)


def test_the_gate_is_right_to_three_ulp_wherever_it_is_a_normal_number(each_backend):
    gate = torch.cat([torch.linspace(-84, 120, 200_003), torch.logspace(-30, 0, 1_001), -torch.logspace(-30, 0, 1_001)])
    exact = torch.nn.functional.silu(gate.double())
    error = (elementwise.swiglu(gate, torch.ones_like(gate)).double() - exact).abs() / exact.abs()
    assert float(error[exact != 0].max()) <= 3 * ULP


def test_a_gate_far_out_is_closed_or_open(each_backend):
    gate = torch.tensor([-90.0, -105.0, -1e4, -3e38, 90.0, 1e4, 3e38]).requires_grad_()
    y = elementwise.swiglu(gate, torch.ones(7))
    # 90 exp(-90) = 7e-38 is about where float32 ends
    torch.testing.assert_close(y, torch.tensor([0.0, 0.0, 0.0, 0.0, 90.0, 1e4, 3e38]), rtol=0, atol=1e-37)
    (slope,) = torch.autograd.grad(y, gate, torch.ones(7))
    torch.testing.assert_close(slope, torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0]), rtol=0, atol=1e-36)


@pytest.mark.parametrize("place", [0, 8, 18])  # in whole vectors and in what is left of one
def test_nan_stays_where_the_formula_puts_it(each_backend, place):
    x, rest = draw(2, 19), [i for i in range(19) if i != place]
    x[0, place] = math.nan
    leaf = x.clone().requires_grad_()
    y = elementwise.rms_norm(leaf, torch.ones(19), epsilon=EPSILON)
    (dx,) = torch.autograd.grad(y, leaf, torch.ones(2, 19))
    assert y[0].isnan().all()
    assert dx[0].isnan().all()
    assert y[1].isfinite().all()
    assert dx[1].isfinite().all()
    gate, up = x.clone().requires_grad_(), torch.ones(2, 19).requires_grad_()
    y = elementwise.swiglu(gate, up)
    for result in (y, *torch.autograd.grad(y, (gate, up), torch.ones(2, 19))):
        assert result[0, place].isnan()
        assert result[0, rest].isfinite().all()
        assert result[1].isfinite().all()


def test_a_row_beyond_float32_is_normalised_to_zero_as_torch_does(each_backend):
    x, weight = torch.tensor([[3e30, 1.0], [3.0, 4.0]]), torch.ones(2)
    expected = reference.rms_norm(x, weight, epsilon=EPSILON)
    assert expected[0].tolist() == [0.0, 0.0]
    torch.testing.assert_close(elementwise.rms_norm(x, weight, epsilon=EPSILON), expected, rtol=1e-6, atol=0)


def test_leading_dimensions_and_strides_are_taken(each_backend):
    x, weight = draw(4, 10, 3).transpose(1, 2), draw(20)[::2]
    assert not x.is_contiguous()
    assert not weight.is_contiguous()
    for leaf in (x, x.clone().requires_grad_()):
        y = elementwise.rms_norm(leaf, weight, epsilon=EPSILON)
        assert_close(y, reference.rms_norm(x.double(), weight.double(), epsilon=EPSILON))
    up = draw(4, 3, 10)
    for leaf in (x, x.clone().requires_grad_()):
        assert_close(elementwise.swiglu(leaf, up), reference.swiglu(x.double(), up.double()))
    assert elementwise.rms_norm(draw(10), draw(10), epsilon=EPSILON).shape == (10,)


def test_expanded_gradients_are_taken(each_backend):
    leaf, twin = short(draw(3, 4)).requires_grad_(), short(draw(3, 4)).double().requires_grad_()
    elementwise.rms_norm(leaf, torch.ones(4), epsilon=EPSILON).sum().backward()
    reference.rms_norm(twin, torch.ones(4).double(), epsilon=EPSILON).sum().backward()
    assert_close(leaf.grad, twin.grad)
    leaf.grad = twin.grad = None
    elementwise.swiglu(leaf, torch.ones(3, 4)).sum().backward()
    reference.swiglu(twin, torch.ones(3, 4).double()).sum().backward()
    assert_close(leaf.grad, twin.grad)


def test_no_grad_gives_the_same_output_and_no_graph(each_backend):
    x, up, weight = draw(9, 20).requires_grad_(), draw(9, 20, seed=1), draw(20)
    for function in (
        lambda: elementwise.rms_norm(x, weight, epsilon=EPSILON),
        lambda: elementwise.swiglu(x, up),
    ):
        with torch.no_grad():
            y = function()
        assert not y.requires_grad
        assert torch.equal(y, function())


def test_a_weight_that_learns_gets_its_gradient(each_backend):
    x, dy = draw(5, 9), draw(5, 9, seed=1)
    weight, twin = draw(9).requires_grad_(), draw(9).double().requires_grad_()
    elementwise.rms_norm(x, weight, epsilon=EPSILON).backward(dy)
    reference.rms_norm(x.double(), twin, epsilon=EPSILON).backward(dy.double())
    assert_close(weight.grad, twin.grad)


def saved_by(function) -> int:
    """Bytes of distinct memory that a function's graph holds for the backward."""
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(held.values())


@native_only
def test_only_the_inputs_and_a_float_a_token_are_saved():
    x, gate, up, weight = draw(64, 128), draw(64, 128), draw(64, 128), draw(128)
    for leaf in (x, gate, up):
        leaf.requires_grad_()
    assert saved_by(lambda: elementwise.rms_norm(x, weight, epsilon=EPSILON)) == 4 * (64 * 128 + 128 + 64)
    assert saved_by(lambda: elementwise.swiglu(gate, up)) == 2 * 2 * 64 * 128
    assert saved_by(lambda: reference.swiglu(gate, up)) == 4 * 3 * 64 * 128


@native_only
def test_threads_do_not_change_a_bit():
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append([*run_norm(301, 577), *run_gate(301, 257)])
    finally:
        torch.set_num_threads(before)
    for many in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], many, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((draw(3, 5), draw(4)), r"expected x of shape \[3, 4\], found \[3, 5\]"),
        ((torch.zeros(0, 4), draw(4)), r"expected at least one element in x, found shape \[0, 4\]"),
        ((torch.tensor(1.0), draw(4)), r"expected x of shape \[4\], found \[\]"),
        ((draw(3, 4).double(), draw(4)), "expected x as float32 on cpu, found float64 on cpu"),
        ((draw(3, 4), draw(4).bfloat16()), "expected weight as float32 on cpu, found bfloat16 on cpu"),
        ((draw(3, 4), draw(4, 4)), r"expected weight of shape \[any\], found \[4, 4\]"),
    ],
)
def test_norm_refuses_what_does_not_fit(each_backend, arguments, message):
    with pytest.raises(ValueError, match=message):
        elementwise.rms_norm(*arguments, epsilon=EPSILON)


@pytest.mark.parametrize("epsilon", [-1e-6, math.nan])
def test_norm_refuses_an_epsilon_below_zero(each_backend, epsilon):
    with pytest.raises(ValueError, match="expected epsilon of at least 0, found"):
        elementwise.rms_norm(draw(3, 4), draw(4), epsilon=epsilon)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((draw(3, 5), draw(3, 4)), r"expected up of shape \[3, 5\], found \[3, 4\]"),
        ((torch.zeros(0, 4), torch.zeros(0, 4)), r"expected at least one element in gate, found shape \[0, 4\]"),
        ((draw(3).double(), draw(3)), "expected gate as float32 on cpu, found float64 on cpu"),
        ((draw(3), torch.zeros(3, device="meta")), "expected up as float32 on cpu, found float32 on meta"),
    ],
)
def test_gate_refuses_what_does_not_fit(each_backend, arguments, message):
    with pytest.raises(ValueError, match=message):
        elementwise.swiglu(*arguments)
