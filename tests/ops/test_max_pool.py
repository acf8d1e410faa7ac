import pytest
import torch
import torch.nn.functional as F
from backends import ISAS, QUICK, assert_same_bits, assert_threads_agree, generator, on_isa
from hypothesis import assume, given
from hypothesis import strategies as st

from fdda_fast import ops
from fdda_fast.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def cases(draw):
    """x, windows"""
    kernel = [draw(st.integers(1, 4)) for _ in range(2)]
    windows = (
        kernel,
        [draw(st.integers(1, 3)) for _ in range(2)],
        [draw(st.integers(0, k // 2)) for k in kernel],
        [draw(st.integers(1, 2)) for _ in range(2)],
        draw(st.booleans()),
    )
    shape = [draw(st.integers(0, 3)), draw(st.sampled_from([1, 3, 64, 70]))]
    shape += [draw(st.integers(1, 12)) for _ in range(2)]
    room = (
        size + 2 * p - d * (k - 1) - 1
        for size, k, p, d in zip(shape[2:], kernel, windows[2], windows[3], strict=True)
    )
    assume(min(room) >= 0)
    x = torch.randn(shape, generator=generator(draw(st.integers(0, 2**32 - 1))))
    x = (4 * x).round() / 4  # with equal numbers
    if draw(st.booleans()):
        x[x > 1.5] = float("nan")
        x[x < -1] = -float("inf")
    x = x.to(draw(st.sampled_from(DTYPES)))
    kind = draw(st.sampled_from(["contiguous", "channels_last", "sliced"]))
    if kind == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    return (torch.cat([x, x], 1)[:, ::2].copy_(x) if kind == "sliced" else x), windows


def with_gradient(function, x, windows):
    x = x.detach().requires_grad_()
    y = function(x, *windows)
    # Whole numbers, whose sums are exact in every dtype.
    grad_y = torch.randint(-4, 5, y.shape, generator=generator(1)).to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, x, grad_y)


def reaches_the_image(x, windows):
    """Whether every window holds a pixel."""
    ones = F.max_pool2d(torch.ones(1, 1, *x.shape[2:]), *windows)
    return bool(ones.isfinite().all())


@QUICK
@given(case=cases())
def test_equals_the_framework(case):
    x, windows = case
    assume(reaches_the_image(x, windows))
    y, grad_x = with_gradient(F.max_pool2d, x, windows)
    for isa in ISAS:
        with on_isa(isa):
            found_y, found_grad = with_gradient(ops.max_pool2d, x, windows)
        assert found_y.is_contiguous(memory_format=torch.channels_last)
        assert_same_bits(found_y, y)
        assert torch.equal(found_grad, grad_x)
    if x.numel():
        found_y, tap = reference.max_pool2d(x, *windows)
        assert_same_bits(found_y, y)
        assert torch.equal(tap, torch.ops.fdda.max_pool2d(x, *windows)[1])
        grad_y = torch.randint(-4, 5, y.shape, generator=generator(1)).to(y.dtype)
        found = reference.max_pool2d_backward(grad_y, tap, list(x.shape[2:]), *windows)
        assert torch.equal(found, grad_x)


def test_a_window_beyond_the_image():
    y, grad_x = with_gradient(ops.max_pool2d, torch.ones(1, 1, 1, 3), ([2, 1], 1, [1, 0], [2, 1]))
    assert torch.equal(y, torch.full_like(y, -float("inf")))
    assert torch.equal(grad_x, torch.zeros(1, 1, 1, 3))


def test_many_taps():
    x = torch.randn(1, 2, 20, 20)
    assert torch.equal(ops.max_pool2d(x, 16, 4), F.max_pool2d(x, 16, 4))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(1, 2, 4, 4, dtype=torch.int32)}, TypeError, "x: expected torch.float32"),
        ({"x": torch.zeros(2, 4, 4)}, ValueError, "x: expected shape"),
        ({"kernel_size": 9}, ValueError, "kernel_size: expected a kernel within"),
        ({"padding": 2}, ValueError, "padding: expected at most half"),
        ({"stride": 0}, ValueError, "stride: expected 1 to"),
    ],
)
def test_refuses(changes, error, message):
    good = {"x": torch.zeros(1, 2, 4, 4), "kernel_size": 3, "stride": 2, "padding": 1}
    with pytest.raises(error, match=message):
        ops.max_pool2d(**good | changes)


def test_threads_do_not_change_the_result():
    x, windows = torch.randn(3, 64, 57, 40), ([3, 3], [2, 2], [1, 1], [1, 1], False)
    assert_threads_agree(with_gradient, ops.max_pool2d, x, windows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    x = torch.randn(2, 5, 9, 8).to(dtype)
    windows = [3, 2], [2, 1], [1, 0], [1, 2], True
    for given_x in (x, x.contiguous(memory_format=torch.channels_last), x[:, ::2]):
        leaf = given_x.detach().requires_grad_()
        torch.library.opcheck(torch.ops.fdda.max_pool2d.default, (leaf, *windows))
    y, tap = torch.ops.fdda.max_pool2d(x, *windows)
    torch.library.opcheck(torch.ops.fdda.max_pool2d_backward.default, (y, tap, [9, 8], *windows))


def test_compiles_without_graph_breaks():
    x = torch.randn(2, 4, 9, 8, requires_grad=True)

    def loss(x):
        return ops.max_pool2d(2 * x, 3, 2, 1).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (found,), (expected,) = (torch.autograd.grad(f(x), x) for f in (compiled, loss))
    torch.testing.assert_close(found, expected)
