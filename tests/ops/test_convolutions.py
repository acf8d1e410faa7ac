import pytest
import torch
import torch.nn.functional as F
from backends import ISAS, QUICK, assert_threads_agree, generator, on_isa
from hypothesis import given
from hypothesis import strategies as st

from fdda_fast import ops
from fdda_fast.ops import _products, _strips, _winograd_bfloat16, _winograd_upsample, reference

NAMES = ["upsample_conv3x3", "conv3x3_few_outputs"]
# Of the direct convolution's error; of Winograd's also in units of float32's rounding.
FACTOR, WINOGRAD_FACTOR, WINOGRAD_ROUNDINGS = 3, 10, 32
# How far bfloat16 may be off, in units of the output's rounding: every one of four terms is
# rounded, as are the differences and the sums of weights.
ROUNDINGS = {torch.float32: 16, torch.bfloat16: 4, torch.float16: 2}


@pytest.fixture(params=[8 << 20, 20_000, 1], ids=["images", "rows", "row"])
def strip_bytes(request, monkeypatch):
    """Several images a strip, several rows, one row; never Winograd."""
    monkeypatch.setattr(_strips, "STRIP_BYTES", request.param)
    monkeypatch.setattr(_winograd_upsample, "upsample_pays", lambda *_: False)
    monkeypatch.setattr(_winograd_bfloat16, "pays", lambda *_: False)


@pytest.fixture(params=[160, 5, 1], ids=["one group", "groups", "tiles"])
def winograd(request, monkeypatch):
    """At every size, in one group of tiles or several."""
    monkeypatch.setattr(_winograd_upsample, "upsample_pays", lambda x, _: x.dtype == torch.float32)
    monkeypatch.setattr(_winograd_upsample, "TILES", request.param)


@pytest.fixture
def bfloat16_winograd(monkeypatch):
    """In bfloat16 at every size."""
    monkeypatch.setattr(_winograd_bfloat16, "pays", lambda x, _: x.dtype == torch.bfloat16)


@st.composite
def cases(
    draw,
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    inputs=(1, 3, 16, 17, 64),
    outputs=(1, 3, 5, 16, 32),
):
    g = generator(draw(st.integers(0, 2**32 - 1)))
    shape = [draw(st.integers(0, 5)), draw(st.sampled_from(inputs))]
    shape += [draw(st.integers(1, 12)) for _ in range(2)]
    kind = draw(st.sampled_from(["contiguous", "channels_last", "sliced"]))
    x = torch.randn(shape, generator=g)
    x = x.to(draw(st.sampled_from(dtypes)))
    if kind == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif kind == "sliced":
        x = torch.cat([x, x], 1)[:, ::2]
    outputs = draw(st.sampled_from(outputs))
    weight = torch.randn(outputs, shape[1], 3, 3, generator=g) / (3 * shape[1] ** 0.5)
    return x, weight, torch.randn(outputs, generator=g)


def plain(name, x, weight, bias):
    if name == "upsample_conv3x3":
        x = F.interpolate(x, scale_factor=2)
    return F.conv2d(x, weight, bias, padding=1)


def gradients(function, tensors, grad_y):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y.to(y.dtype))]


def sizes(name, tensors, grad_y):
    """Root mean squares of results and gradients as they are where no terms cancel by chance."""
    squares = gradients(
        lambda *t: plain(name, *t), [t.double().square() for t in tensors], grad_y**2
    )
    return [s.mean().sqrt().item() if s.numel() else 0.0 for s in squares]


def distance(found, exact):
    """Root mean square."""
    return (found.double() - exact).square().mean().sqrt().item() if exact.numel() else 0.0


def assert_close_to_exact(name, case, seed, factor, roundings):
    """Against float64: `factor` times the error of the direct convolution, or a few roundings."""
    operator, x = getattr(ops, name), case[0]
    scale = 2 if name == "upsample_conv3x3" else 1
    shape = (len(x), len(case[1]), scale * x.shape[2], scale * x.shape[3])
    grad_y = torch.randn(shape, generator=generator(seed)).to(x.dtype)
    exact = gradients(lambda *t: plain(name, *t), [t.double() for t in case], grad_y)
    usual = gradients(lambda *t: plain(name, *t), [t.to(x.dtype) for t in case], grad_y)
    expected = sizes(name, case, grad_y)
    runs = {"reference": gradients(getattr(reference, name), case, grad_y)[:1]}
    runs["reference"] += getattr(reference, f"{name}_backward")(grad_y, *case[:2])
    for isa in ISAS:
        with on_isa(isa):
            runs[isa] = gradients(operator, case, grad_y)
    for run, results in runs.items():
        assert results[0].is_contiguous(memory_format=torch.channels_last)
        assert [r.dtype for r in results] == [x.dtype, x.dtype, torch.float32, torch.float32]
        for result, want, direct, size in zip(results, exact, usual, expected, strict=True):
            assert result.shape == want.shape
            rounding = roundings * torch.finfo(x.dtype).eps * (size + 0.1)
            assert distance(result, want) <= factor * distance(direct, want) + rounding, run


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("strip_bytes")
@QUICK
@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_results_and_gradients(name, case, seed):
    assert_close_to_exact(name, case, seed, FACTOR, ROUNDINGS[case[0].dtype])


@pytest.mark.usefixtures("winograd")
@QUICK
@given(case=cases([torch.float32]), seed=st.integers(0, 2**32 - 1))
def test_results_and_gradients_by_winograd(case, seed):
    name = "upsample_conv3x3"
    assert_close_to_exact(name, case, seed, WINOGRAD_FACTOR, WINOGRAD_ROUNDINGS)


@pytest.mark.usefixtures("bfloat16_winograd")
@QUICK
@given(case=cases([torch.bfloat16], (32, 64, 96), (32, 64)), seed=st.integers(0, 2**32 - 1))
def test_results_and_gradients_by_winograd_in_bfloat16(case, seed):
    assert_close_to_exact("upsample_conv3x3", case, seed, FACTOR, 1)


def errors_at_size(name, dtype):
    """Errors of the operator and of the direct convolution: y and gradients of x, weight, bias."""
    g = generator(6)
    x = torch.randn(4, 64, 24, 24, generator=g).to(dtype)
    outputs = 32 if name == "upsample_conv3x3" else 3
    case = x, torch.randn(outputs, 64, 3, 3, generator=g) / 24, torch.randn(outputs, generator=g)
    size = 48 if name == "upsample_conv3x3" else 24
    grad_y = torch.randn(4, outputs, size, size, generator=g).to(dtype)
    exact = gradients(lambda *t: plain(name, *t), [t.double() for t in case], grad_y)
    usual = gradients(lambda *t: plain(name, *t), [t.to(dtype) for t in case], grad_y)
    found = gradients(getattr(ops, name), case, grad_y)
    return [(distance(f, e), distance(u, e)) for f, u, e in zip(found, usual, exact, strict=True)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("strip_bytes")
def test_error_is_like_the_direct_convolutions(name, dtype):
    for found, usual in errors_at_size(name, dtype):
        assert found <= FACTOR * usual


@pytest.mark.usefixtures("bfloat16_winograd")
def test_winograd_error_in_bfloat16():
    for found, usual in errors_at_size("upsample_conv3x3", torch.bfloat16):
        assert found <= FACTOR * usual


def winograd_case(dtype=torch.float32):
    """Large enough to pay; neither tiles nor, in float32, vectors of channels are whole."""
    g = generator(7)
    inputs, outputs = (72, 70) if dtype == torch.float32 else (96, 64)
    x = torch.randn(3, inputs, 43, 25, generator=g).to(dtype)
    weight = torch.randn(outputs, inputs, 3, 3, generator=g) / 25
    case = x, weight, torch.randn(outputs, generator=g)
    return case, torch.randn(3, outputs, 86, 50, generator=g).to(dtype)


def test_winograd_error_at_size():
    case, grad_y = winograd_case()
    assert _winograd_upsample.upsample_pays(*case[:2])
    exact = gradients(lambda *t: plain("upsample_conv3x3", *t), [t.double() for t in case], grad_y)
    usual = gradients(lambda *t: plain("upsample_conv3x3", *t), case, grad_y)
    found = gradients(ops.upsample_conv3x3, case, grad_y)
    for result, direct, want in zip(found, usual, exact, strict=True):
        assert distance(result, want) <= WINOGRAD_FACTOR * distance(direct, want)
        assert distance(result, want) <= 3e-6 * want.square().mean().sqrt()


def test_winograd_bias_gradient_is_rounded_once():
    """What cancels in the sum of grad_y does not show."""
    (x, weight, bias), grad_y = winograd_case()
    *_, found = gradients(ops.upsample_conv3x3, (x, weight, bias), grad_y)
    assert torch.equal(found, grad_y.double().sum((0, 2, 3)).float())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("bfloat16_winograd")
def test_winograd_on_threads_agrees_bit_by_bit(isa, dtype):
    with on_isa(isa):
        assert_threads_agree(gradients, ops.upsample_conv3x3, *winograd_case(dtype))


def test_winograd_on_instruction_sets_agrees_bit_by_bit(monkeypatch):
    """The transforms do."""
    monkeypatch.setattr(_products, "prefers_own_products", lambda: False)
    results = []
    for isa in ISAS:
        with on_isa(isa):
            results.append(gradients(ops.upsample_conv3x3, *winograd_case()))
    assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("outputs", [3, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_the_result(isa, name, outputs, dtype, monkeypatch):
    monkeypatch.setattr(_strips, "STRIP_BYTES", 1 << 20)
    g = generator(3)
    x = torch.randn(3, 64, 40, 30, generator=g).to(dtype)
    case = x, torch.randn(outputs, 64, 3, 3, generator=g), torch.randn(outputs, generator=g)

    def run():
        y = getattr(ops, name)(*case)
        return gradients(getattr(ops, name), case, y.square())

    with on_isa(isa):
        assert_threads_agree(run)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 4, 4).double()}, TypeError, "x: expected"),
        ({"x": torch.zeros(2, 3, 4)}, ValueError, "x: expected"),
        ({"weight": torch.zeros(4, 2, 3, 3)}, ValueError, r"weight: expected shape \['any', 3"),
        ({"weight": torch.zeros(4, 3, 3, 3).bfloat16()}, TypeError, "weight: expected torch.float"),
        ({"weight": torch.zeros(0, 3, 3, 3)}, ValueError, "weight: expected"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias: expected shape \[4\]"),
    ],
)
def test_refuses(name, changes, error, message):
    good = {"x": torch.zeros(2, 3, 4, 4), "weight": torch.zeros(4, 3, 3, 3)}
    with pytest.raises(error, match=message):
        getattr(ops, name)(**good | {"bias": torch.zeros(4)} | changes)


def opcheck(name, inputs=4, outputs=5):
    g = generator(4)
    weight = torch.randn(outputs, inputs, 3, 3, generator=g)
    bias = torch.randn(outputs, generator=g)
    dense = torch.randn(3, inputs, 5, 6, generator=g)
    for x in (
        dense,
        dense.to(memory_format=torch.channels_last).bfloat16(),
        torch.randn(3, 2 * inputs, 5, 6, generator=g)[:, ::2],
    ):
        leaves = [t.clone().requires_grad_() for t in (weight, bias)]
        operator = getattr(torch.ops.fdda, name)
        torch.library.opcheck(operator.default, (x.requires_grad_(), *leaves))
        x = x.detach()
        args = operator(x, weight, bias), x, weight
        torch.library.opcheck(getattr(torch.ops.fdda, f"{name}_backward").default, args)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    opcheck(name)


@pytest.mark.usefixtures("winograd", "bfloat16_winograd")
def test_winograd_opcheck():
    opcheck("upsample_conv3x3", 64, 32)


def test_compiles_without_graph_breaks():
    g = generator(5)
    x = torch.randn(3, 4, 5, 6, generator=g, requires_grad=True)
    weights = [torch.randn(4, 4, 3, 3, generator=g) for _ in range(2)]
    bias, labels = torch.randn(4, generator=g), torch.tensor([0, 1, 0])
    table = torch.randn(2, 4, generator=g)

    def loss(x):
        y = ops.upsample_conv3x3(2 * x, weights[0], bias)
        y, *_ = ops.conditional_bn_lrelu(y, labels, table, table, [1, 2], 1e-3)
        return ops.conv3x3_few_outputs(y, weights[1], bias).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(x), x)
    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(found, expected)
