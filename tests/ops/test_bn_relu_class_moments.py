import math

import pytest
import torch
import torch.nn.functional as F
from backends import ISAS, QUICK, assert_threads_agree, generator, limits, norm_tensors, on_isa
from hypothesis import given
from hypothesis import strategies as st

from fdda_fast import ops
from fdda_fast.ops import reference

EPS = 1e-5


@st.composite
def cases(draw):
    g = generator(draw(st.integers(0, 2**32 - 1)))
    batch = draw(st.integers(0, 7))
    channels = draw(st.sampled_from([1, 3, 16, 63, 64, 65, 130]))
    kind = draw(st.sampled_from(["contiguous", "channels_last", "2d", "sliced"]))
    size = [draw(st.integers(1, 20)) for _ in range(2)]
    shape = (batch, channels) if kind == "2d" else (batch, channels, *size)
    x = 3 * torch.randn(shape, generator=g)
    x = x.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))
    if kind == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif kind == "sliced":
        x = torch.cat([x, x], 1)[:, ::2]
    num_classes = draw(st.integers(1, 5))
    labels = torch.randint(0, num_classes, (batch,), generator=g)
    relu = draw(st.sampled_from([True, False, 6.0, 0.5]))
    residual = torch.randn(x.shape, generator=g).to(x.dtype) if draw(st.booleans()) else None
    return x, norm_tensors(channels, g), labels, num_classes, relu, residual


@QUICK
@given(case=cases())
def test_forward(case):
    """y like the reference, bit for bit, and near batch norm; moments as class_moments has them."""
    x, norm, labels, num_classes, relu, residual = case
    args = (x, *norm, EPS, labels, num_classes)
    expected = reference.bn_relu_class_moments(*args, *limits(relu), residual)[0]
    weight, bias, running_mean, running_var = (t.double() for t in norm)
    exact = F.batch_norm(x.double(), running_mean, running_var, weight, bias, False, 0.0, EPS)
    exact = (exact if residual is None else exact + residual.double()).clamp(*limits(relu))
    for isa in ISAS:
        with on_isa(isa):
            y, mean, var = ops.bn_relu_class_moments(*args, relu, residual)
            alone = ops.class_moments(x, labels, num_classes)
        assert y.dtype == x.dtype
        assert y.stride() == torch.empty_like(x).stride()
        assert torch.equal(y, expected), isa
        assert torch.equal(mean, alone[0])
        assert torch.equal(var, alone[1])
    rounding = torch.finfo(x.dtype).eps
    torch.testing.assert_close(expected.double(), exact, rtol=rounding, atol=3e-5 + rounding)


@QUICK
@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_backward(case, seed):
    """Against autograd through batch norm, clamp and the moments in float64."""
    x, norm, labels, num_classes, relu, residual = case
    g = generator(seed)
    grad_y = torch.randn(x.shape, generator=g).to(x.dtype)
    grad_mean, grad_var = torch.randn(2, num_classes, x.shape[1], generator=g)
    low, high = limits(relu)
    args = (x.float(), *norm, EPS, labels, num_classes, -math.inf, math.inf, residual)
    v = reference.bn_relu_class_moments(*args)[0]
    through = grad_y.double() * ((v > low) & (v < high))

    exact = x.double().detach().requires_grad_()
    scale = (norm[0] / (norm[3] + EPS).sqrt()).double()
    loss = (through * exact * scale.view(-1, *[1] * (x.dim() - 2))).sum()
    for k in labels.unique():
        rows = exact[labels == k].transpose(0, 1).flatten(1)
        loss = loss + (rows.mean(1) * grad_mean[k]).sum()
        loss = loss + (rows.var(1, correction=0) * grad_var[k]).sum()
    (expected,) = torch.autograd.grad(loss, exact)
    for isa in ISAS:
        with on_isa(isa):
            leaves = [t.detach().requires_grad_() for t in (x, residual) if t is not None]
            out = ops.bn_relu_class_moments(
                leaves[0], *norm, EPS, labels, num_classes, relu, *leaves[1:]
            )
            grad, *grad_residual = torch.autograd.grad(out, leaves, [grad_y, grad_mean, grad_var])
        assert grad.dtype == x.dtype
        for found in grad_residual:  # passes or not, unchanged
            assert torch.equal(found, through.to(x.dtype))
        atol = 1e-5 * (1 + grad_var.abs().max().item())
        rtol = 2 * torch.finfo(x.dtype).eps
        torch.testing.assert_close(grad.double(), expected, rtol=rtol, atol=atol)


def test_reference_gradient_is_its_autograd():
    """The reference backward is what autograd makes of the reference forward in float32."""
    g = generator(1)
    x, residual = (torch.randn(4, 5, 6, 3, generator=g, requires_grad=True) for _ in range(2))
    norm, labels = norm_tensors(5, g), torch.tensor([0, 1, 0, 2])
    grad_y, grad_mean, grad_var = (torch.randn(s, generator=g) for s in (x.shape, (3, 5), (3, 5)))
    args = (*norm, EPS, labels)
    y, mean, var, count = reference.bn_relu_class_moments(x, *args, 3, 0.0, 2.0, residual)
    expected = torch.autograd.grad([y, mean, var], [x, residual], [grad_y, grad_mean, grad_var])
    grads = reference.bn_relu_class_moments_backward(
        grad_y, grad_mean, grad_var, x, *args, mean, count, 0.0, 2.0, residual
    )
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, wanted)


def test_gradient_through_one_output_alone():
    g = generator(2)
    x = torch.randn(3, 4, 5, 5, generator=g, requires_grad=True)
    norm, labels = norm_tensors(4, g), torch.tensor([0, 1, 1])
    y, mean, var = ops.bn_relu_class_moments(x, *norm, EPS, labels, 2)
    (alone,) = torch.autograd.grad(mean.sum() + var.sum(), x, retain_graph=True)
    (expected,) = torch.autograd.grad(sum(m.sum() for m in ops.class_moments(x, labels, 2)[:2]), x)
    torch.testing.assert_close(alone, expected)
    (through,) = torch.autograd.grad(y.sum(), x)
    scale = (norm[0] / (norm[3] + EPS).sqrt()).view(1, -1, 1, 1)
    torch.testing.assert_close(through, (y > 0) * scale)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_threads_do_not_change_the_result(isa, memory_format):
    g = generator(3)
    x = torch.randn(9, 70, 40, 30, generator=g).contiguous(memory_format=memory_format)
    norm, labels = norm_tensors(70, g), torch.randint(0, 4, (9,), generator=g)

    def run():
        leaves = [x.clone().requires_grad_(), x.flip(0).requires_grad_()]
        out = ops.bn_relu_class_moments(leaves[0], *norm, EPS, labels, 4, True, leaves[1])
        return *out, *torch.autograd.grad(sum(o.sum() for o in out), leaves)

    with on_isa(isa):
        assert_threads_agree(run)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(2, 3).long()}, TypeError, "x: expected"),
        ({"x": torch.zeros(2, 3, 4)}, ValueError, "x: expected"),
        ({"weight": torch.zeros(2)}, ValueError, r"weight: expected shape \[3\]"),
        ({"bias": torch.zeros(3).double()}, TypeError, "bias: expected torch.float32"),
        ({"running_var": torch.zeros(3, requires_grad=True)}, ValueError, "running_var: expected"),
        ({"labels": torch.tensor([0, 5])}, ValueError, "labels: expected 0 to 4"),
        ({"num_classes": 0}, ValueError, "num_classes: expected"),
        ({"relu": 0.0}, ValueError, "relu: expected"),
        ({"residual": torch.zeros(3, 2)}, ValueError, r"residual: expected shape \[2, 3\]"),
        ({"residual": torch.zeros(2, 3).half()}, TypeError, "residual: expected torch.float32"),
    ],
)
def test_refuses(changes, error, message):
    good = {"x": torch.zeros(2, 3), "labels": torch.tensor([0, 1]), "num_classes": 5, "eps": EPS}
    names = ("weight", "bias", "running_mean", "running_var")
    good |= {name: torch.ones(3) for name in names}
    with pytest.raises(error, match=message):
        ops.bn_relu_class_moments(**good | changes)


def test_opcheck():
    g = generator(4)
    labels = torch.tensor([0, 2, 0])
    norm = norm_tensors(4, g)
    fdda = torch.ops.fdda
    for x in (
        torch.randn(3, 4, 5, 6, generator=g, requires_grad=True),
        torch.randn(3, 4, 5, 6, generator=g).to(memory_format=torch.channels_last).bfloat16(),
        torch.randn(3, 8, 5, 6, generator=g)[:, ::2],
        torch.randn(3, 4, generator=g, requires_grad=True),
    ):
        for residual in (None, x.flip(0)):
            args = (x, *norm, EPS, labels, 4, 0.0, 6.0, residual)
            torch.library.opcheck(fdda.bn_relu_class_moments.default, args)
            x = x.detach()
            y, mean, var, count = fdda.bn_relu_class_moments(x, *norm, EPS, labels, 4, 0.0, 6.0)
            args = (y, mean, var, x, *norm, EPS, labels, mean, count, 0.0, 6.0, residual)
            torch.library.opcheck(fdda.bn_relu_class_moments_backward.default, args)


def test_compiles_without_graph_breaks():
    g = generator(5)
    x = torch.randn(3, 4, 5, 6, generator=g, requires_grad=True)
    norm, labels = norm_tensors(4, g), torch.tensor([0, 2, 0])

    def loss(x):
        y, mean, var = ops.bn_relu_class_moments(2 * x, *norm, EPS, labels, 3)
        return (mean * var).sum() + y.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(x), x)
    (expected,) = torch.autograd.grad(loss(x), x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_larger_than_the_caches(dtype, memory_format):
    """Written past the caches; every image, a class of its own, as it is alone."""
    images, g = 32 // dtype.itemsize, generator(7)
    norm = norm_tensors(64, g)
    x, residual, grad_y = torch.randn(3, images, 64, 128, 64, generator=g).to(dtype)
    x, residual = (t.contiguous(memory_format=memory_format) for t in (x, residual))
    grads = torch.randn(2, images, 64, generator=g)

    def run(rows):
        inputs = [t[rows].clone().requires_grad_() for t in (x, residual)]
        labels = torch.arange(len(inputs[0]))
        y, *moments = ops.bn_relu_class_moments(
            inputs[0], *norm, EPS, labels, len(labels), True, inputs[1]
        )
        found = torch.autograd.grad([y, *moments], inputs, [grad_y[rows], *grads[:, rows]])
        return y, *moments, *found

    for isa in ISAS:
        with on_isa(isa):
            together = run(slice(None))
            alone = [run(slice(i, i + 1)) for i in range(images)]
        for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
            assert torch.equal(whole, torch.cat(parts)), isa
