import math

import pytest
import torch
import torch.nn.functional as F
from backends import (
    ISAS,
    QUICK,
    assert_same_bits,
    assert_threads_agree,
    generator,
    limits,
    norm_tensors,
    on_isa,
)
from hypothesis import given
from hypothesis import strategies as st

from fdda_fast import ops
from fdda_fast.ops import reference

EPS = 1e-5
NAMES = ("weight", "bias", "running_mean", "running_var")


@st.composite
def cases(draw):
    """Arguments by name."""
    g = generator(draw(st.integers(0, 2**32 - 1)))
    channels = draw(st.sampled_from([1, 3, 16, 63, 64, 65, 300]))
    kind = draw(st.sampled_from(["contiguous", "channels_last", "2d", "sliced"]))
    size = [draw(st.integers(1, 13)) for _ in range(2)]
    batch = draw(st.integers(0, 6))
    shape = (batch, channels) if kind == "2d" else (batch, channels, *size)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    x = (3 * torch.randn(shape, generator=g)).to(dtype)
    residual = torch.randn(shape, generator=g).to(dtype) if draw(st.booleans()) else None
    if kind == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
        if residual is not None and draw(st.booleans()):
            residual = residual.contiguous(memory_format=torch.channels_last)
    elif kind == "sliced":
        x = torch.cat([x, x], 1)[:, ::2]
    return {
        "x": x, **dict(zip(NAMES, norm_tensors(channels, g), strict=True)), "eps": EPS,
        "x_min": torch.tensor(draw(st.sampled_from([0.0, -1.3]))), "x_max": torch.tensor([2.5]),
        "bits": draw(st.integers(2, 8)), "relu": draw(st.sampled_from([True, False, 6.0, 2.0])),
        "residual": residual, "ste": draw(st.sampled_from(["identity", "clipped"])),
    }  # fmt: skip


def reference_arguments(case):
    *first, relu, residual, ste = case.values()
    return *first, *limits(relu), residual, ste == "clipped"


@QUICK
@given(case=cases())
def test_forward(case):
    """The reference, bit for bit; on float32 that is batch norm, addition, ReLU and quantiser."""
    expected = reference.bn_relu_fake_quantize(*reference_arguments(case))
    for isa in ISAS:
        with on_isa(isa):
            y = ops.bn_relu_fake_quantize(**case)
        assert y.stride() == torch.empty_like(case["x"]).stride()
        assert_same_bits(y, expected)
    x, residual, bits = case["x"], case["residual"], case["bits"]
    v = F.batch_norm(x.double(), *(case[n].double() for n in NAMES[2:] + NAMES[:2]), eps=EPS)
    v = (v if residual is None else v + residual.double()).clamp(*limits(case["relu"]))
    exact = reference.fake_quantize_range(v, case["x_min"], case["x_max"], bits)
    step = (case["x_max"] - case["x_min"]).item() / (2**bits - 1)
    # At most a code away, where rounding moves a value across the middle between two codes.
    distance = (expected.double() - exact.double()).abs()
    rounding = 2 * torch.finfo(x.dtype).eps * 4
    assert (distance <= step * 1.01 + rounding).all()
    if x.numel() > 100:
        assert (distance > rounding).double().mean() < 0.02


def pieces(case, v, grad):
    """What an element gives to each gradient, from v, the input of the clipping, in float64."""
    x = case["x"].double()
    shape = (1, -1, *[1] * (x.dim() - 2))
    low, high = limits(case["relu"])
    std = (case["running_var"].double() + EPS).sqrt().view(shape)
    kept = v.clamp(low, high)
    below, above = kept < case["x_min"], kept > case["x_max"]
    y = reference.fake_quantize_range(kept, case["x_min"], case["x_max"], case["bits"])
    grad, g = grad.double(), torch.where((v > low) & (v < high), grad, 0.0).double()
    if case["ste"] == "clipped":
        g = torch.where(below | above, 0.0, g)
    error = torch.where(below | above, 0.0, grad * (y.double() - kept.double()))
    stretch = error / (case["x_max"] - case["x_min"]).double()
    return {
        "x": g * case["weight"].double().view(shape) / std,
        "residual": g,
        "weight": g * (x - case["running_mean"].double().view(shape)) / std,
        "bias": g,
        "x_min": torch.where(below, grad, -stretch),
        "x_max": torch.where(above, grad, stretch),
    }


@QUICK
@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_backward(case, seed):
    """Every gradient, written out in float64 from the values the forward pass computes."""
    grad = torch.randn(case["x"].shape, generator=generator(seed)).to(case["x"].dtype)
    norm = [case[n] for n in NAMES]
    none = (torch.zeros(case["x"].shape[0], dtype=torch.int64), 1, -math.inf, math.inf)
    v = reference.bn_relu_class_moments(case["x"].float(), *norm, EPS, *none)[0]
    if case["residual"] is not None:
        v = v + case["residual"].float()
    made = pieces(case, v, grad)
    dims = [d for d in range(grad.dim()) if d != 1]
    names = [n for n in made if case[n] is not None]
    for isa in ISAS:
        leaves = {n: case[n].detach().requires_grad_() for n in names}
        with on_isa(isa):
            y = ops.bn_relu_fake_quantize(**case | leaves)
            found = torch.autograd.grad(y, list(leaves.values()), grad)
        for name, actual in zip(names, found, strict=True):
            addends = made[name]
            assert actual.shape == case[name].shape
            assert actual.dtype == case[name].dtype
            if name in ("x", "residual"):
                rtol = 2 * torch.finfo(grad.dtype).eps
                torch.testing.assert_close(actual.double(), addends, rtol=rtol, atol=1e-6)
                continue
            over = dims if name in ("weight", "bias") else list(range(grad.dim()))
            exact, size = addends.sum(over), addends.abs().sum(over)
            plain = addends.float().sum(over).double()
            if name.startswith("x_"):  # a position of 2^bits codes is rounded first
                size = size + grad.double().abs().sum()
            error = (actual.double().view(exact.shape) - exact).abs()
            assert (error <= 2 * (plain - exact).abs() + 2.0**-20 * size).all(), (isa, name)
    flags = (case["ste"] == "clipped", True)
    back = reference.bn_relu_fake_quantize_backward(grad, *reference_arguments(case)[:-1], *flags)
    order = ("x", "residual", "weight", "bias", "x_min", "x_max")
    for name, expected in zip(order, back, strict=True):
        if name in names:
            actual = found[names.index(name)]
            scale = 1 + float(made[name].abs().sum()) if name not in ("x", "residual") else 1
            torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-5 * scale)


def test_gradients_equal_the_modules():
    """Autograd through batch norm, addition, ReLU6 and the quantiser alone."""
    g = generator(3)
    x, residual = (torch.randn(5, 8, 6, 7, generator=g) for _ in range(2))
    case = dict(zip(NAMES, norm_tensors(8, g), strict=True))
    leaves = [x, residual, case["weight"], case["bias"], torch.tensor(-0.2), torch.tensor(1.5)]
    leaves = [t.requires_grad_() for t in leaves]
    running = (case["running_mean"], case["running_var"])
    y = F.batch_norm(x, *running, *leaves[2:4], eps=EPS) + residual
    y = ops.fake_quantize_range(F.relu6(y), *leaves[4:], 4, ste="clipped")
    fused = ops.bn_relu_fake_quantize(
        x, *leaves[2:4], *running, EPS, *leaves[4:], 4, 6.0, residual, "clipped"
    )
    torch.testing.assert_close(fused, y)
    grad = torch.randn(y.shape, generator=g)
    expected = torch.autograd.grad(y, leaves, grad)
    torch.testing.assert_close(torch.autograd.grad(fused, leaves, grad), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_threads_do_not_change_the_result(isa, memory_format):
    g = generator(4)
    x = torch.randn(9, 70, 40, 30, generator=g).contiguous(memory_format=memory_format)
    norm, grad = norm_tensors(70, g), torch.randn(x.shape, generator=g)

    def run():
        leaves = [t.detach().requires_grad_() for t in (x, *norm[:2], torch.tensor(1.5))]
        y = ops.bn_relu_fake_quantize(*leaves[:3], *norm[2:], EPS, torch.tensor(0.0), leaves[3], 4)
        return y, *torch.autograd.grad(y, leaves, grad)

    with on_isa(isa):
        assert_threads_agree(run)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(2, 3).long()}, TypeError, "x: expected"),
        ({"x": torch.zeros(2, 3, 4)}, ValueError, "x: expected"),
        ({"weight": torch.zeros(2)}, ValueError, r"weight: expected shape \[3\]"),
        ({"running_var": torch.zeros(3, requires_grad=True)}, ValueError, "running_var: expected"),
        ({"x_max": torch.zeros(2)}, ValueError, "x_max: expected one element"),
        ({"bits": 17}, ValueError, "bits: expected 1 to 16, got 17"),
        ({"relu": -1.0}, ValueError, "relu: expected"),
        ({"residual": torch.zeros(2, 4)}, ValueError, "residual: expected shape"),
        ({"residual": torch.zeros(2, 3).bfloat16()}, TypeError, "residual: expected torch.float32"),
        ({"ste": "x"}, ValueError, "ste: expected"),
    ],
)
def test_refuses(changes, error, message):
    good = {"x": torch.zeros(2, 3), "eps": EPS, "bits": 4} | {n: torch.ones(3) for n in NAMES}
    good |= {"x_min": torch.tensor(0.0), "x_max": torch.tensor(1.0)}
    with pytest.raises(error, match=message):
        ops.bn_relu_fake_quantize(**good | changes)


def test_opcheck():
    g = generator(5)
    weight, bias, *running = norm_tensors(4, g)
    ends = torch.tensor(-0.5), torch.tensor(1.5)
    fdda, check = torch.ops.fdda, torch.library.opcheck
    for x in (
        torch.randn(3, 4, 5, 6, generator=g, requires_grad=True),
        torch.randn(3, 4, 5, 6, generator=g).to(memory_format=torch.channels_last).bfloat16(),
        torch.randn(3, 8, 5, 6, generator=g)[:, ::2],
        torch.randn(3, 4, generator=g, requires_grad=True),
    ):
        for residual in (None, torch.ones_like(x).requires_grad_(x.requires_grad)):
            norm = weight.detach().requires_grad_(x.requires_grad), bias, *running
            learned = [e.detach().requires_grad_(x.requires_grad) for e in ends]
            args = (x, *norm, EPS, *learned, 4, 0.0, 6.0, residual, True)
            check(fdda.bn_relu_fake_quantize.default, args)
            args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
            for range_gradient in (False, True):
                back = (torch.ones_like(x), *args, range_gradient)
                back = [a.detach() if isinstance(a, torch.Tensor) else a for a in back]
                check(fdda.bn_relu_fake_quantize_backward.default, tuple(back))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_larger_than_the_caches(dtype, memory_format):
    """Written past the caches; every image as it is alone."""
    images, g = 32 // dtype.itemsize, generator(7)
    norm = norm_tensors(64, g)
    x, residual, grad_y = torch.randn(3, images, 64, 128, 64, generator=g).to(dtype)
    x, residual = (t.contiguous(memory_format=memory_format) for t in (x, residual))

    def run(rows):
        inputs = [t[rows].clone().requires_grad_() for t in (x, residual)]
        y = ops.bn_relu_fake_quantize(
            inputs[0], *norm, EPS, torch.tensor(0.0), torch.tensor(2.0), 4, residual=inputs[1]
        )
        return y, *torch.autograd.grad(y, inputs, grad_y[rows])

    for isa in ISAS:
        with on_isa(isa):
            together = run(slice(None))
            alone = [run(slice(i, i + 1)) for i in range(images)]
        for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
            assert torch.equal(whole, torch.cat(parts)), isa
