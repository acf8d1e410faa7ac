"""A linear layer whose outputs are feature maps, against float64."""

import pytest
import torch
from backends import ISAS, QUICK, assert_threads_agree, generator, on_isa
from hypothesis import given
from hypothesis import strategies as st

from fdda_fast import ops
from fdda_fast.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def cases(draw):
    """z, weight, bias, size, dtype"""
    g = generator(draw(st.integers(0, 2**32 - 1)))
    images, inputs = draw(st.integers(0, 19)), draw(st.sampled_from([1, 7, 16, 17, 100]))
    channels = draw(st.sampled_from([1, 3, 16, 33]))
    size = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    z = torch.randn(images, inputs, generator=g)
    weight = torch.randn(channels * size[0] * size[1], inputs, generator=g)
    bias = torch.randn(len(weight), generator=g)
    if draw(st.booleans()):  # views with gaps
        z, weight, bias = (torch.stack([t, t], -1)[..., 0] for t in (z, weight, bias))
    return z, weight, bias, size, draw(st.sampled_from(DTYPES))


def with_gradients(function, z, weight, bias, size, dtype, grad_y):
    leaves = [t.detach().requires_grad_() for t in (z, weight, bias)]
    y = function(*leaves, size, dtype)
    return y.detach(), *torch.autograd.grad(y, leaves, grad_y)


@QUICK
@given(case=cases(), channels_last=st.booleans())
def test_equals_float64(case, channels_last):
    z, weight, bias, size, dtype = case
    shape = len(z), len(weight) // (size[0] * size[1]), *size
    grad_y = torch.randn(shape, generator=generator(1)).to(dtype)
    if channels_last:
        grad_y = grad_y.contiguous(memory_format=torch.channels_last)
    g = grad_y.double().flatten(1)
    y = (z.double() @ weight.double().t() + bias).view(shape)
    expected = y, g @ weight.double(), g.t() @ z.double(), g.sum(0)
    for isa in ISAS:
        with on_isa(isa):
            actual = with_gradients(ops.linear_to_maps, z, weight, bias, size, dtype, grad_y)
        assert actual[0].dtype == dtype
        assert actual[0].permute(0, 2, 3, 1).is_contiguous()
        for a, e, eps in zip(actual, expected, (torch.finfo(dtype).eps, *3 * [0.0]), strict=True):
            torch.testing.assert_close(a.double(), e, rtol=eps + 1e-5, atol=1e-4)


@pytest.mark.parametrize("isa", ISAS)
def test_a_gradient_too_large_for_caches(isa):
    """It is written past them."""
    g = generator(2)
    z, grad_y = torch.randn(3, 100, generator=g), torch.randn(3, 128, 19, 19, generator=g)
    expected = reference.linear_to_maps_backward(grad_y, z)
    with on_isa(isa):
        actual = torch.ops.fdda.linear_to_maps_backward(grad_y, z)
    assert actual[0].nbytes > 16 << 20
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_the_result(isa, dtype):
    g = generator(3)
    z, weight = torch.randn(16, 100, generator=g), torch.randn(24 * 90, 100, generator=g)
    bias, grad_y = torch.randn(len(weight), generator=g), torch.randn(16, 24, 9, 10, generator=g)
    with on_isa(isa):
        assert_threads_agree(
            with_gradients, ops.linear_to_maps, z, weight, bias, (9, 10), dtype, grad_y.to(dtype)
        )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"z": torch.zeros(2, 3, 4)}, ValueError, "z: expected"),
        ({"z": torch.zeros(2, 3).double()}, TypeError, "z: expected"),
        ({"weight": torch.zeros(12, 4)}, ValueError, "weight: expected"),
        ({"weight": torch.zeros(13, 3), "bias": torch.zeros(13)}, ValueError, "weight: expected"),
        ({"bias": torch.zeros(11)}, ValueError, "bias: expected"),
        ({"size": (0, 2)}, ValueError, "size: expected"),
        ({"dtype": torch.float64}, TypeError, "dtype: expected"),
    ],
)
def test_refuses(changes, error, message):
    good = {
        "z": torch.zeros(2, 3), "weight": torch.zeros(12, 3), "bias": torch.zeros(12),
        "size": (2, 2), "dtype": torch.float32,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        ops.linear_to_maps(**good | changes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    arguments = torch.randn(2, 3), torch.randn(12, 3), torch.randn(12)
    for grads in (True, False):
        leaves = [t.requires_grad_(grads) for t in arguments]
        torch.library.opcheck(torch.ops.fdda.linear_to_maps.default, (*leaves, [2, 2], dtype))
    backward = torch.randn(2, 3, 2, 2).to(dtype), torch.randn(2, 3)
    torch.library.opcheck(torch.ops.fdda.linear_to_maps_backward.default, backward)
