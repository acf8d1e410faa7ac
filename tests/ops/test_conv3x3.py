import pytest
import torch
import torch.nn.functional as F
from backends import ISAS, QUICK, assert_threads_agree, generator, on_isa
from hypothesis import given
from hypothesis import strategies as st

from fdda_fast import ops
from fdda_fast.ops import _winograd, _winograd_bfloat16, convolutions, reference

NAMES = ["conv3x3", "conv3x3_input_gradient", "conv3x3_weight_gradient"]
DTYPES = [torch.float32, torch.bfloat16]
# Of the direct convolution's error, and in units of the dtype's rounding of the result.
FACTOR = {torch.float32: 10, torch.bfloat16: 3}
ROUNDINGS = {torch.float32: 32, torch.bfloat16: 1}
# Root mean square of the error in that of the result.
RELATIVE = {torch.float32: 3e-6, torch.bfloat16: 6e-3}
CHANNELS = {torch.float32: [1, 3, 16, 17, 64], torch.bfloat16: [3, 32, 64, 96]}


@pytest.fixture(params=[512, 5, 1, None], ids=["one group", "groups", "tiles", "as it pays"])
def path(request, monkeypatch):
    """Winograd at every size in one group of tiles or several, or whatever is faster."""
    if request.param:
        monkeypatch.setattr(convolutions, "_winograd_pays", lambda *_: True)
        monkeypatch.setattr(_winograd, "TILES", request.param)


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(convolutions, "_winograd_pays", lambda *_: True)


@st.composite
def cases(draw, dtype):
    """x, weight, grad_y"""
    g = generator(draw(st.integers(0, 2**32 - 1)))
    shape = [draw(st.integers(0, 5)), draw(st.sampled_from(CHANNELS[dtype]))]
    shape += [draw(st.integers(1, 12)) for _ in range(2)]
    outputs = draw(st.sampled_from([1, 3, 5, 16, 33] + CHANNELS[dtype]))
    weight = torch.randn(outputs, shape[1], 3, 3, generator=g) / (3 * shape[1] ** 0.5)
    tensors = (
        torch.randn(shape, generator=g).to(dtype),
        weight.to(draw(st.sampled_from([torch.float32, dtype]))),
        torch.randn(shape[0], outputs, *shape[2:], generator=g).to(dtype),
    )
    kinds = st.sampled_from(["contiguous", "channels_last", "sliced"])
    return [laid_out(t, draw(kinds)) for t in tensors]


def laid_out(x, kind):
    if kind == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    return torch.cat([x, x], 1)[:, ::2].copy_(x) if kind == "sliced" else x


def plain(x, weight):
    return F.conv2d(x, weight, padding=1)


def gradients(function, x, weight, grad_y):
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]


def exact_and_usual(x, weight, grad_y):
    """Of float64, and of the direct convolution in the dtype of x."""
    tensors = x, weight, grad_y
    return [gradients(plain, *(t.to(d) for t in tensors)) for d in (torch.float64, x.dtype)]


def sizes(*tensors):
    """Root mean squares of results and gradients as they are where no terms cancel by chance."""
    squares = gradients(plain, *(t.double().square() for t in tensors))
    return [s.mean().sqrt().item() if s.numel() else 0.0 for s in squares]


def distance(found, exact):
    """Root mean square."""
    return (found.double() - exact).square().mean().sqrt().item() if exact.numel() else 0.0


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", DTYPES)
@QUICK
@given(data=st.data())
def test_results_and_gradients(dtype, data):
    """Against float64."""
    case = x, weight, grad_y = data.draw(cases(dtype))
    exact, usual = exact_and_usual(*case)
    dtypes = [dtype, dtype, weight.dtype]
    runs = {
        "reference": [
            reference.conv3x3(x, weight),
            reference.conv3x3_input_gradient(grad_y, weight),
            reference.conv3x3_weight_gradient(grad_y, x).to(weight.dtype),
        ]
    }
    for isa in ISAS:
        with on_isa(isa):
            runs[isa] = gradients(ops.conv3x3, *case)
    for run, results in runs.items():
        assert results[0].is_contiguous(memory_format=torch.channels_last)
        assert [r.dtype for r in results] == dtypes
        for result, want, direct, size in zip(results, exact, usual, sizes(*case), strict=True):
            assert result.shape == want.shape
            rounding = ROUNDINGS[dtype] * torch.finfo(dtype).eps * (size + 0.1)
            assert distance(result, want) <= FACTOR[dtype] * distance(direct, want) + rounding, run


def case_at_size(dtype=torch.float32):
    g = generator(6)
    x, grad_y = torch.randn(2, 3, 128, 27, 30, generator=g).to(dtype)
    return x, torch.randn(128, 128, 3, 3, generator=g) / 34, grad_y


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_at_size(dtype, monkeypatch):
    monkeypatch.setattr(_winograd_bfloat16, "prefers_own_bfloat16_products", lambda: True)
    case = case_at_size(dtype)
    assert convolutions._winograd_pays(*case[:2])
    exact, usual = exact_and_usual(*case)
    for result, direct, want in zip(gradients(ops.conv3x3, *case), usual, exact, strict=True):
        assert distance(result, want) <= FACTOR[dtype] * distance(direct, want)
        assert distance(result, want) <= RELATIVE[dtype] * want.square().mean().sqrt()


def test_where_bfloat16_pays(monkeypatch):
    """Where channels are multiples of 32, pixels enough, and the processor has what it takes."""
    monkeypatch.setattr(_winograd_bfloat16, "prefers_own_bfloat16_products", lambda: True)

    def pays(inputs, outputs, batch, size):
        x = torch.zeros(batch, inputs, size, size, dtype=torch.bfloat16)
        return convolutions._winograd_pays(x, torch.zeros(outputs, inputs, 3, 3))

    assert pays(32, 96, 16, 7)
    assert not pays(72, 64, 16, 7)
    assert not pays(64, 72, 16, 7)
    assert not pays(64, 64, 4, 7)
    assert not pays(64, 64, 1000, 1)
    monkeypatch.setattr(_winograd_bfloat16, "prefers_own_bfloat16_products", lambda: False)
    assert not pays(32, 96, 16, 7)


@pytest.mark.usefixtures("always")
def test_instruction_sets_agree_bit_by_bit():
    """The transforms do; the products are the library's."""
    results = []
    for isa in ISAS:
        with on_isa(isa):
            results.append(gradients(ops.conv3x3, *case_at_size()))
    assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("path")
def test_threads_do_not_change_the_result(isa, dtype):
    with on_isa(isa):
        assert_threads_agree(gradients, ops.conv3x3, *case_at_size(dtype))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_one_gradient_alone(wanted, dtype):
    x, weight, grad_y = case_at_size(dtype)
    _, *expected = gradients(ops.conv3x3, x, weight, grad_y)
    x.requires_grad_(wanted == "x")
    weight.requires_grad_(wanted == "weight")
    ops.conv3x3(x, weight).backward(grad_y)
    for leaf, want in zip((x, weight), expected, strict=True):
        assert torch.equal(leaf.grad, want) if leaf.requires_grad else leaf.grad is None


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 4, 4).half()}, TypeError, "x: expected torch.float32"),
        ({"x": torch.zeros(2, 3, 4)}, ValueError, "x: expected"),
        ({"weight": torch.zeros(4, 2, 3, 3)}, ValueError, r"weight: expected shape \['any', 3"),
        ({"weight": torch.zeros(4, 3, 3, 3).bfloat16()}, TypeError, "weight: expected torch.float"),
        ({"weight": torch.zeros(0, 3, 3, 3)}, ValueError, "weight: expected"),
    ],
)
def test_refuses(changes, error, message):
    good = {"x": torch.zeros(2, 3, 4, 4), "weight": torch.zeros(4, 3, 3, 3)}
    with pytest.raises(error, match=message):
        ops.conv3x3(**good | changes)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    g = generator(4)
    inputs, outputs = (8, 5) if dtype == torch.float32 else (64, 32)
    x = torch.randn(3, inputs, 5, 6, generator=g).to(dtype)
    weight = torch.randn(outputs, inputs, 3, 3, generator=g)
    grad_y = torch.randn(3, outputs, 5, 6, generator=g).to(dtype)
    for kind in ("contiguous", "channels_last", "sliced"):
        args = [laid_out(t, kind) for t in (x, weight, grad_y)]
        leaves = [t.detach().requires_grad_() for t in args[:2]]
        torch.library.opcheck(torch.ops.fdda.conv3x3.default, leaves)
        for name, inputs in zip(NAMES[1:], ((args[2], args[1]), (args[2], args[0])), strict=True):
            torch.library.opcheck(getattr(torch.ops.fdda, name).default, inputs)


@pytest.mark.usefixtures("path")
def test_compiles_without_graph_breaks():
    g = generator(5)
    x, weight = torch.randn(3, 4, 5, 6, generator=g), torch.randn(4, 4, 3, 3, generator=g)

    def loss(x, weight):
        return ops.conv3x3(ops.conv3x3(2 * x, weight), weight).square().sum()

    leaves = x.requires_grad_(), weight.requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two)
