import pytest
import torch
import torch.nn.functional as F
from backends import ISAS, QUICK, assert_threads_agree, generator, on_isa
from hypothesis import given
from hypothesis import strategies as st

from fdda_fast import ops
from fdda_fast.ops import reference

EPS = 1e-3


@st.composite
def cases(draw):
    g = generator(draw(st.integers(0, 2**32 - 1)))
    groups = draw(st.lists(st.integers(0, 4), max_size=3))
    batch, channels = sum(groups), draw(st.sampled_from([1, 3, 16, 63, 64, 65, 130]))
    kind = draw(st.sampled_from(["contiguous", "channels_last", "2d", "sliced"]))
    size = [draw(st.integers(1, 20)) for _ in range(2)]
    shape = (batch, channels) if kind == "2d" else (batch, channels, *size)
    x = 3 * torch.randn(shape, generator=g) + draw(st.sampled_from([0, 20]))
    x = x.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))
    if kind == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif kind == "sliced":
        x = torch.cat([x, x], 1)[:, ::2]
    classes = draw(st.integers(1, 5))
    labels = torch.randint(0, classes, (batch,), generator=g)
    weight, bias = torch.randn(2, classes, channels, generator=g)
    return x, labels, weight, bias, groups, EPS, draw(st.sampled_from([0.2, 1.0, 0.0]))


def plain(x, labels, weight, bias, groups, eps, negative_slope):
    """Batch norm group by group, in the dtype of x."""
    parts = []
    for part in x.split(groups):
        dims = (0, 2, 3)[: x.dim() - 1]
        if part.numel():
            var, mean = torch.var_mean(part, dims, correction=0, keepdim=True)
            part = (part - mean) / (var + eps).sqrt()
        parts.append(part)
    shape = (*x.shape[:2], *[1] * (x.dim() - 2))
    normalized = torch.cat(parts) if parts else x
    y = normalized * weight[labels].reshape(shape) + bias[labels].reshape(shape)
    return F.leaky_relu(y, negative_slope)


def errors(found, expected):
    return (found.double() - expected).abs().max().item() if expected.numel() else 0.0


@QUICK
@given(case=cases())
def test_forward(case):
    """Twice as near to float64 as plain torch is, or rounding; moments like class_moments."""
    x, *rest = case
    exact = plain(x.double(), rest[0], rest[1].double(), rest[2].double(), *rest[3:])
    rounding = torch.finfo(x.dtype).eps * (1 + exact.abs().max().item() if x.numel() else 1)
    bound = 2 * errors(plain(x.float(), *rest).to(x.dtype), exact) + rounding
    group = torch.arange(len(rest[3])).repeat_interleave(torch.tensor(rest[3]).long())
    y_reference, *_ = reference.conditional_bn_lrelu(*case)
    assert errors(y_reference, exact) <= bound
    for isa in ISAS:
        with on_isa(isa):
            y, mean, var = ops.conditional_bn_lrelu(*case)
            if rest[3]:
                moments = ops.class_moments(x, group, len(rest[3]))
                assert torch.equal(mean, moments[0])
                assert torch.equal(var, moments[1])
        assert y.dtype == x.dtype
        assert y.stride() == torch.empty_like(x).stride()
        assert errors(y, exact) <= bound, isa


@QUICK
@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_backward(case, seed):
    """Against autograd through float64, elements at the activation's kink left out."""
    x, labels, weight, bias, groups, eps, slope = case
    grad_y = torch.randn(x.shape, generator=generator(seed))
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    pre = plain(leaves[0], labels, *leaves[1:], groups, eps, 1.0)
    grad_y = torch.where(pre.abs() < 1e-3, 0.0, grad_y).to(x.dtype)
    y = F.leaky_relu(pre, slope)
    exact = torch.autograd.grad(y, leaves, grad_y.double())
    leaves = [t.detach().float().requires_grad_() for t in (x, weight, bias)]
    y = plain(leaves[0], labels, *leaves[1:], groups, eps, slope)
    usual = torch.autograd.grad(y, leaves, grad_y.float())
    # What the statistics take from a gradient cancels, all of it in groups of one pixel.
    variance = [
        part.var([0, *range(2, x.ndim)], correction=0)
        for part in x.double().split(groups)
        if len(part)
    ]
    steepest = (torch.stack(variance).min().item() + eps) ** -0.5 if variance else 0.0
    largest = (grad_y.float().abs().max() * weight.abs().max()).item() if x.numel() else 0.0
    cancelled = torch.finfo(torch.float32).eps * steepest * largest
    for isa in [*ISAS, "reference"]:
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        if isa == "reference":
            _, mean, var = reference.conditional_bn_lrelu(*case)
            found = reference.conditional_bn_lrelu_backward(
                grad_y, x, labels, weight, bias, mean, var, groups, eps, slope
            )
        else:
            with on_isa(isa):
                y = ops.conditional_bn_lrelu(leaves[0], labels, *leaves[1:], groups, eps, slope)[0]
                found = torch.autograd.grad(y, leaves, grad_y)
        for grad, leaf, want, plainly in zip(found, leaves, exact, usual, strict=True):
            assert grad.dtype == leaf.dtype
            assert grad.shape == leaf.shape
            scale = want.abs().max().item() if want.numel() else 0.0
            rounding = torch.finfo(leaf.dtype).eps * scale + 1e-5 * (1 + scale) + cancelled
            assert errors(grad, want) <= 2 * errors(plainly, want) + rounding, isa


def test_is_consecutive_batch_norms():
    g = generator(3)
    x = torch.randn(7, 5, 6, 4, generator=g)
    ones, zeros = torch.ones(1, 5), torch.zeros(1, 5)
    y, mean, var = ops.conditional_bn_lrelu(x, torch.zeros(7).long(), ones, zeros, [3, 4], EPS, 1.0)
    for part, found, m, v in zip(x.split([3, 4]), y.split([3, 4]), mean, var, strict=True):
        running = torch.zeros(5), torch.ones(5)
        torch.testing.assert_close(F.batch_norm(part, *running, None, None, True, 1.0, EPS), found)
        size = part.numel() / 5
        torch.testing.assert_close(running, (m, v * size / (size - 1)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_threads_do_not_change_the_result(isa, memory_format):
    g = generator(3)
    x = torch.randn(9, 70, 40, 30, generator=g).contiguous(memory_format=memory_format)
    weight, bias = torch.randn(2, 4, 70, generator=g)
    labels = torch.randint(0, 4, (9,), generator=g)

    def run():
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y, *moments = ops.conditional_bn_lrelu(leaves[0], labels, *leaves[1:], [4, 5], EPS)
        return y, *moments, *torch.autograd.grad(y.square().sum(), leaves)

    with on_isa(isa):
        assert_threads_agree(run)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(2, 3).long()}, TypeError, "x: expected"),
        ({"x": torch.zeros(2, 3, 4)}, ValueError, "x: expected"),
        ({"weight": torch.zeros(4, 2)}, ValueError, r"weight: expected shape \['any', 3\]"),
        ({"bias": torch.zeros(3, 3)}, ValueError, r"bias: expected shape \[4, 3\]"),
        ({"bias": torch.zeros(4, 3).double()}, TypeError, "bias: expected torch.float32"),
        ({"labels": torch.tensor([0, 4])}, ValueError, "labels: expected 0 to 3"),
        ({"groups": [1]}, ValueError, "groups: expected a sum of 2"),
        ({"groups": [3, -1]}, ValueError, "groups: expected 0 to"),
        ({"groups": [2.0]}, TypeError, "groups: expected an integer"),
        ({"eps": 0.0}, ValueError, "eps: expected"),
        ({"negative_slope": float("nan")}, ValueError, "negative_slope: expected"),
    ],
)
def test_refuses(changes, error, message):
    good = {"x": torch.zeros(2, 3), "labels": torch.tensor([0, 1]), "groups": [2], "eps": EPS}
    good |= {"weight": torch.zeros(4, 3), "bias": torch.zeros(4, 3)}
    with pytest.raises(error, match=message):
        ops.conditional_bn_lrelu(**good | changes)


def test_opcheck():
    g = generator(4)
    labels = torch.tensor([0, 2, 0])
    weight, bias = torch.randn(2, 4, 4, generator=g)
    for x in (
        torch.randn(3, 4, 5, 6, generator=g),
        torch.randn(3, 4, 5, 6, generator=g).to(memory_format=torch.channels_last).bfloat16(),
        torch.randn(3, 8, 5, 6, generator=g)[:, ::2],
        torch.randn(3, 4, generator=g),
    ):
        leaves = [t.clone().requires_grad_() for t in (weight, bias)]
        args = (x.requires_grad_(), labels, *leaves, [1, 2], EPS, 0.2)
        torch.library.opcheck(torch.ops.fdda.conditional_bn_lrelu.default, args)
        x = x.detach()
        y, mean, var = ops.conditional_bn_lrelu(x, labels, weight, bias, [1, 2], EPS)
        args = (y, x, labels, weight, bias, mean, var, [1, 2], EPS, 0.2)
        torch.library.opcheck(torch.ops.fdda.conditional_bn_lrelu_backward.default, args)
