import pytest
import torch
import torch.nn.functional as F
from backends import ISAS, QUICK, assert_threads_agree, generator, on_isa
from hypothesis import given
from hypothesis import strategies as st

from fdda_fast import ops
from fdda_fast.ops import _norm_few_outputs, _products, _strips, reference

EPS, SLOPE = 0.8, 0.2


@pytest.fixture(params=[8 << 20, 20_000, 1], ids=["images", "rows", "row"])
def strip_bytes(request, monkeypatch):
    """Several images a strip, several rows, one row."""
    monkeypatch.setattr(_strips, "STRIP_BYTES", request.param)


@pytest.fixture(params=[True, False], ids=["own products", "framework's products"])
def products(request, monkeypatch):
    """Each way on every processor, which otherwise chooses."""
    for module in (_products, _norm_few_outputs):
        monkeypatch.setattr(module, "prefers_own", lambda a: ISAS != [None] and request.param)


@st.composite
def cases(draw):
    """x, labels, groups, and the parameters [norm_weight, norm_bias, weight, bias]."""
    g = generator(draw(st.integers(0, 2**32 - 1)))
    groups = draw(st.lists(st.integers(0, 3), max_size=3))
    channels, outputs = draw(st.sampled_from([1, 3, 16, 17, 64])), draw(st.sampled_from([1, 3, 5]))
    shape = [sum(groups), channels] + [draw(st.integers(1, 12)) for _ in range(2)]
    kind = draw(st.sampled_from(["contiguous", "channels_last", "sliced"]))
    x = 2 * torch.randn(shape, generator=g) + 1
    x = x.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))
    if kind == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif kind == "sliced":
        x = torch.cat([x, x], 1)[:, ::2]
    labels = torch.randint(0, 4, (len(x),), generator=g)
    norm = torch.randn(2, 4, channels, generator=g).unbind()
    weight = torch.randn(outputs, channels, 3, 3, generator=g) / (3 * channels**0.5)
    return x, labels, groups, [*norm, weight, torch.randn(outputs, generator=g)]


def fused(labels, groups):
    def run(x, norm_weight, norm_bias, weight, bias):
        norm = labels, norm_weight, norm_bias, groups, EPS, SLOPE
        return ops.conditional_bn_lrelu_conv3x3(x, *norm, weight, bias)[0]

    return run


def one_after_the_other(labels, groups):
    def run(x, norm_weight, norm_bias, weight, bias):
        y = ops.conditional_bn_lrelu(x, labels, norm_weight, norm_bias, groups, EPS, SLOPE)[0]
        return ops.conv3x3_few_outputs(y, weight, bias)

    return run


def plain(labels, groups):
    """By PyTorch's own operators, in the dtype of its arguments."""

    def run(x, norm_weight, norm_bias, weight, bias):
        parts = []
        for part in x.split(groups):
            if part.numel():
                var, mean = torch.var_mean(part, (0, 2, 3), correction=0, keepdim=True)
                part = (part - mean) / (var + EPS).sqrt()
            parts.append(part)
        y = torch.cat(parts) if parts else x
        y = y * norm_weight[labels][:, :, None, None] + norm_bias[labels][:, :, None, None]
        return F.conv2d(F.leaky_relu(y, SLOPE), weight, bias, padding=1)

    return run


def gradients(function, tensors, grad_y):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y.to(y.dtype))]


def off(found, exact):
    """Root of the mean squared error."""
    return (found.double() - exact).square().mean().sqrt().item() if exact.numel() else 0.0


@pytest.mark.usefixtures("strip_bytes", "products")
@QUICK
@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_results_and_gradients(case, seed):
    """Against float64: not further off than the two operators, but for a rounding or two."""
    x, labels, groups, parameters = case
    tensors = [x, *parameters]
    shape = (len(x), len(parameters[-1]), *x.shape[2:])
    grad_y = torch.randn(shape, generator=generator(seed)).to(x.dtype)
    exact = gradients(plain(labels, groups), [t.double() for t in tensors], grad_y)
    for isa in ISAS:
        with on_isa(isa):
            found = gradients(fused(labels, groups), tensors, grad_y)
            usual = gradients(one_after_the_other(labels, groups), tensors, grad_y)
        assert found[0].is_contiguous(memory_format=torch.channels_last)
        assert found[0].dtype == x.dtype
        assert found[1].stride() == torch.empty_like(x).stride()
        for result, apart, want in zip(found, usual, exact, strict=True):
            assert result.dtype == apart.dtype
            assert result.shape == want.shape
            size = want.square().mean().sqrt().item() if want.numel() else 0.0
            # Parameters' gradients, float32, are sums of terms of order 1, which may cancel.
            smallest = 0.5 if result.dtype == torch.float32 else 0.1
            rounding = 4 * torch.finfo(result.dtype).eps * (size + smallest)
            assert off(result, want) <= 1.5 * off(apart, want) + rounding, isa


@pytest.mark.usefixtures("products")
def test_images_of_several_strips():
    """As many pixels as do not fit into a second-level cache, in strips of unequal heights."""
    g = generator(5)
    labels, groups = torch.tensor([0, 2, 1]), [1, 2]
    tensors = [torch.randn(s, generator=g) for s in [(3, 64, 71, 40), (3, 64), (3, 64)]]
    tensors += [torch.randn(3, 64, 3, 3, generator=g) / 24, torch.randn(3, generator=g)]
    grad_y = torch.randn(3, 3, 71, 40, generator=g)
    exact = gradients(plain(labels, groups), [t.double() for t in tensors], grad_y)
    for isa in ISAS:
        with on_isa(isa):
            found = gradients(fused(labels, groups), tensors, grad_y)
        for result, want in zip(found, exact, strict=True):
            assert off(result, want) <= 1e-5 * want.square().mean().sqrt().item()


@QUICK
@given(case=cases())
def test_statistics_are_those_of_class_moments(case):
    x, labels, groups, (norm_weight, norm_bias, weight, bias) = case
    group = torch.arange(len(groups)).repeat_interleave(torch.tensor(groups).long())
    _, mean, var = ops.conditional_bn_lrelu_conv3x3(
        x, labels, norm_weight, norm_bias, groups, EPS, SLOPE, weight, bias
    )
    expected = reference.class_moments(x, group, len(groups))
    torch.testing.assert_close((mean, var), expected[:2], rtol=1e-5, atol=1e-5)
    assert not mean.requires_grad


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 50])
@pytest.mark.usefixtures("products")
def test_threads_do_not_change_the_result(isa, dtype, rows, monkeypatch):
    monkeypatch.setattr(_strips, "STRIP_BYTES", rows * 30 * 64 * 4)
    g = generator(3)
    labels, groups = torch.tensor([0, 2, 1]), [1, 2]
    tensors = [torch.randn(3, 64, 40, 30, generator=g).to(dtype)]
    tensors += [torch.randn(s, generator=g) for s in [(3, 64), (3, 64), (3, 64, 3, 3), (3,)]]
    grad_y = torch.randn(3, 3, 40, 30, generator=g)
    with on_isa(isa):
        assert_threads_agree(gradients, fused(labels, groups), tensors, grad_y)


def good():
    return {
        "x": torch.randn(3, 4, 5, 6),
        "labels": torch.tensor([0, 1, 1]),
        "norm_weight": torch.randn(2, 4),
        "norm_bias": torch.randn(2, 4),
        "groups": [1, 2],
        "eps": EPS,
        "negative_slope": SLOPE,
        "weight": torch.randn(3, 4, 3, 3),
        "bias": torch.randn(3),
    }


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(3, 4)}, ValueError, "x: expected"),
        ({"x": torch.zeros(3, 4, 5, 6).double()}, TypeError, "x: expected"),
        ({"labels": torch.tensor([0, 1])}, ValueError, "labels: expected"),
        ({"labels": torch.tensor([0, 1, 2])}, (ValueError, RuntimeError), "labels: expected"),
        ({"groups": [1, 1]}, ValueError, "groups: expected"),
        ({"weight": torch.zeros(3, 5, 3, 3)}, ValueError, "weight: expected"),
        ({"bias": torch.zeros(2)}, ValueError, "bias: expected"),
    ],
)
def test_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        ops.conditional_bn_lrelu_conv3x3(**good() | changes)


def test_opcheck():
    names = ("x", "norm_weight", "norm_bias", "weight", "bias")
    for x in (
        torch.randn(3, 4, 5, 6),
        torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last).bfloat16(),
        torch.randn(3, 8, 5, 6)[:, ::2],
    ):
        args = good() | {"x": x}
        for name in names:
            args[name] = args[name].detach().requires_grad_()
        operator = torch.ops.fdda.conditional_bn_lrelu_conv3x3.default
        torch.library.opcheck(operator, tuple(args.values()))
