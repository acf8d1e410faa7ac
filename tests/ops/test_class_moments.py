import numpy as np
import pytest
import torch
from backends import ISAS, QUICK, assert_threads_agree, generator, on_isa
from hypothesis import given
from hypothesis import strategies as st

from fdda_fast import ops
from fdda_fast.ops import reference

EPS = torch.finfo(torch.float32).eps


def moments64(x, labels, num_classes):
    """Differentiable, in float64, class by class."""
    x = x.double().flatten(2) if x.dim() == 4 else x.double().unsqueeze(2)
    mean = [x[labels == k].mean((0, 2)) for k in range(num_classes) if (labels == k).any()]
    var = [
        x[labels == k].var((0, 2), correction=0) for k in range(num_classes) if (labels == k).any()
    ]
    return torch.stack(mean), torch.stack(var)


@st.composite
def cases(draw):
    g = generator(draw(st.integers(0, 2**32 - 1)))
    batch = draw(st.integers(1, 9))
    channels = draw(st.sampled_from([1, 3, 16, 63, 64, 65, 130]))
    kind = draw(st.sampled_from(["contiguous", "channels_last", "2d", "sliced"]))
    size = [draw(st.integers(1, 20)) for _ in range(2)]
    shape = (batch, channels) if kind == "2d" else (batch, channels, *size)
    shift = draw(st.sampled_from([0.0, 5.0, 300.0]))
    x = (torch.randn(shape, generator=g) + shift).to(
        draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    )
    if kind == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif kind == "sliced":
        x = torch.cat([x, x], 1)[:, ::2]
    num_classes = draw(st.integers(1, 6))
    return x, torch.randint(0, num_classes, (batch,), generator=g), num_classes


@QUICK
@given(case=cases())
def test_forward_against_float64(case):
    x, labels, num_classes = case
    present = torch.bincount(labels, minlength=num_classes) > 0
    mean64, var64 = moments64(x, labels, num_classes)
    # A rounding of the result, and what float32 deviations from the center can lose.
    mean_error = 2 * EPS * mean64.abs() + 2 * EPS * var64.sqrt()
    var_error = 8 * EPS * var64 + 1e-30
    for isa in [*ISAS, "reference"]:
        if isa == "reference":
            mean, var, count = reference.class_moments(x, labels, num_classes)
        else:
            with on_isa(isa):
                mean, var, count = ops.class_moments(x, labels, num_classes)
        assert mean.dtype == var.dtype == torch.float32
        assert torch.equal(count, torch.bincount(labels, minlength=num_classes))
        assert ((mean[present].double() - mean64).abs() <= mean_error).all(), isa
        assert ((var[present].double() - var64).abs() <= var_error).all(), isa
        assert not mean[~present].any()
        assert not var[~present].any()


@QUICK
@given(case=cases())
def test_backward_against_float64_autograd(case):
    x, labels, num_classes = case
    present = torch.bincount(labels, minlength=num_classes) > 0
    g = generator(0)
    grad_mean, grad_var = torch.randn(2, num_classes, x.shape[1], generator=g)
    exact = x.double().detach().requires_grad_()
    mean64, var64 = moments64(exact, labels, num_classes)
    loss = (mean64 * grad_mean[present]).sum() + (var64 * grad_var[present]).sum()
    (expected,) = torch.autograd.grad(loss, exact)
    for isa in ISAS:
        with on_isa(isa):
            leaf = x.detach().requires_grad_()
            mean, var, _ = ops.class_moments(leaf, labels, num_classes)
            (grad,) = torch.autograd.grad((mean * grad_mean).sum() + (var * grad_var).sum(), leaf)
        assert grad.dtype == x.dtype
        rounding = torch.finfo(x.dtype).eps
        # The mean is rounded to float32 before it is subtracted from x.
        lost = 4 * EPS * (x.float().abs().max() + 1) * grad_var.abs().max()
        size = (torch.bincount(labels)[labels] * (x[0, 0].numel())).double()
        tolerance = rounding * expected.abs() + lost / size.reshape(-1, *[1] * (x.dim() - 1))
        if x.dtype == torch.float16:
            tolerance = tolerance + 2.0**-24
        assert ((grad.double() - expected).abs() <= tolerance).all(), isa


def test_gradient_through_one_output_alone():
    x = torch.randn(4, 3, 2, 2, generator=generator(0), requires_grad=True)
    labels = torch.tensor([0, 1, 0, 1])
    mean, var, count = ops.class_moments(x, labels, 2)
    assert not count.requires_grad
    (grad,) = torch.autograd.grad(mean.sum(), x, retain_graph=True)
    torch.testing.assert_close(grad, torch.full_like(x, 1 / 8))
    (grad,) = torch.autograd.grad(var.sum(), x)
    expected = 2 * (x - mean[labels][:, :, None, None]) / 8
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_large_mean_does_not_cancel(isa, memory_format):
    x = 1e4 + torch.randn(3, 64, 70, 70, generator=generator(0), dtype=torch.float64)
    x = x.float().contiguous(memory_format=memory_format)
    with on_isa(isa):
        mean, var, _ = ops.class_moments(x, torch.tensor([0, 0, 1]), 2)
    mean64, var64 = moments64(x, torch.tensor([0, 0, 1]), 2)
    torch.testing.assert_close(mean.double(), mean64, rtol=EPS, atol=0)
    torch.testing.assert_close(var.double(), var64, rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_threads_do_not_change_the_result(isa, memory_format):
    x = torch.randn(16, 96, 30, 30, generator=generator(0)).contiguous(memory_format=memory_format)
    labels = torch.randint(0, 10, (16,), generator=generator(1))

    def run():
        leaf = x.clone().requires_grad_()
        mean, var, _ = ops.class_moments(leaf, labels, 10)
        return mean, var, *torch.autograd.grad(mean.sum() + var.sum(), leaf)

    with on_isa(isa):
        assert_threads_agree(run)


@pytest.mark.parametrize("isa", ISAS)
def test_empty_batch_and_constant_input(isa):
    with on_isa(isa):
        mean, var, count = ops.class_moments(torch.empty(0, 5, 3, 3), torch.empty(0).long(), 4)
        assert not torch.cat([mean, var, count[:, None]], 1).any()
        mean, var, _ = ops.class_moments(torch.full((3, 70, 9, 9), 0.1), torch.zeros(3).long(), 1)
        assert torch.equal(mean, torch.full((1, 70), 0.1))
        assert not var.any()


def test_non_finite_values_are_not_hidden():
    x = torch.randn(2, 3, 4, 4)
    x[0, 1, 2, 3] = float("nan")
    for layout in (torch.contiguous_format, torch.channels_last):
        y = x.contiguous(memory_format=layout)
        mean, var, _ = ops.class_moments(y, torch.tensor([0, 1]), 2)
        assert np.argwhere(mean.isnan().numpy()).tolist() == [[0, 1]]
        assert np.argwhere(var.isnan().numpy()).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([0, 3]), ValueError, "labels: expected 0 to 2, got 0 to 3"),
        (torch.tensor([-1, 0]), ValueError, "labels: expected 0 to 2, got -1 to 0"),
        (torch.tensor([0]), ValueError, r"labels: expected shape \[2\], got \[1\]"),
        (torch.tensor([0, 1]).int(), TypeError, "labels: expected torch.int64, got torch.int32"),
    ],
)
def test_refuses_labels(labels, error, message):
    with pytest.raises(error, match=message):
        ops.class_moments(torch.zeros(2, 3), labels, 3)


def test_refuses_inputs():
    labels = torch.tensor([0, 1])
    with pytest.raises(TypeError, match="x: expected"):
        ops.class_moments(torch.zeros(2, 3).long(), labels, 3)
    with pytest.raises(ValueError, match="x: expected"):
        ops.class_moments(torch.zeros(2, 3, 4), labels, 3)
    with pytest.raises(ValueError, match="num_classes: expected"):
        ops.class_moments(torch.zeros(2, 3), labels, 0)


def test_opcheck():
    g = generator(0)
    labels = torch.tensor([0, 2, 0])
    for x in (
        torch.randn(3, 4, 5, 6, generator=g, requires_grad=True),
        torch.randn(3, 4, 5, 6, generator=g).to(memory_format=torch.channels_last).bfloat16(),
        torch.randn(3, 8, 5, 6, generator=g)[:, ::2],
        torch.randn(3, 4, generator=g, requires_grad=True),
    ):
        torch.library.opcheck(torch.ops.fdda.class_moments.default, (x, labels, 4))
        mean, var, count = ops.class_moments(x.detach(), labels, 4)
        torch.library.opcheck(
            torch.ops.fdda.class_moments_backward.default,
            (mean, var, x.detach(), labels, mean, count),
        )


def test_compiles_without_graph_breaks():
    x = torch.randn(3, 4, 5, 6, requires_grad=True)
    labels = torch.tensor([0, 2, 0])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(x):
        mean, var, _ = ops.class_moments(ops.fake_quantize_minmax(x, 4), labels, 3)
        return (mean * var).sum()

    (compiled,) = torch.autograd.grad(loss(x), x)
    mean, var, _ = ops.class_moments(ops.fake_quantize_minmax(x, 4), labels, 3)
    (eager,) = torch.autograd.grad((mean * var).sum(), x)
    assert torch.equal(compiled, eager)
