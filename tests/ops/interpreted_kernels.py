"""Numbers of the Triton kernels; test_triton.py runs this file with TRITON_INTERPRET=1."""

import pytest
import torch
from backends import assert_same_bits, generator
from fdda_fast.kernels import class_moments, fake_quantize

from fdda_fast.ops import reference

LAYOUTS = ["contiguous", "channels_last", "sliced", "2d"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def sample(layout, dtype):
    x = torch.randn(3, 10, 9, 14, generator=generator(0))
    x = {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "sliced": x[:, ::2, :, 1:],
        "2d": x[:, :, 0, 0],
    }[layout]
    return x.to(dtype) if layout != "sliced" else x.to(dtype)[:, :, :, ::2]


def interpreter_rounding(function, x, *args):
    """The interpreter truncates to bfloat16; compiled code rounds, see the offline compilation."""
    if x.dtype != torch.bfloat16:
        return function(x, *args)
    bits = function(x.float(), *args).contiguous().view(torch.int32)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_quantize(layout, dtype):
    x = sample(layout, dtype)
    x[0] = 0.25
    for bits in (2, 4, 8):
        for axis in (None, 0, 1):
            y = fake_quantize.fake_quantize_minmax(x, bits, axis)
            assert y.stride() == torch.empty_like(x).stride()
            assert_same_bits(y, interpreter_rounding(reference.fake_quantize_minmax, x, bits, axis))
        low, high = torch.tensor(-0.4), torch.tensor(0.9)
        y = fake_quantize.fake_quantize_range(x, low, high, bits)
        expected = interpreter_rounding(reference.fake_quantize_range, x, low, high, bits)
        assert_same_bits(y, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_class_moments(layout, dtype, shift):
    x = sample(layout, dtype) + shift
    labels = torch.tensor([2, 0, 2])
    mean, var, count = class_moments.class_moments(x, labels, 4)
    mean64, var64, count64 = reference.class_moments(x, labels, 4)
    assert torch.equal(count, count64)
    torch.testing.assert_close(mean, mean64, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var, var64, rtol=2e-6, atol=1e-7)
    gradients = torch.randn(2, *mean.shape, generator=generator(1))
    arguments = (*gradients, x, labels, mean64, count)
    grad = class_moments.class_moments_backward(*arguments)
    expected = reference.class_moments_backward(*arguments)
    assert grad.stride() == expected.stride()
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(grad, expected, rtol=2 * rounding, atol=1e-6)


def test_class_moments_of_rows_longer_than_a_tile():
    x = torch.randn(2, 2, 50, 47, generator=generator(0)) + 1000
    labels = torch.tensor([0, 0])
    for layout in (torch.contiguous_format, torch.channels_last):
        y = x.contiguous(memory_format=layout)
        mean, var, _ = class_moments.class_moments(y, labels, 1)
        mean64, var64, _ = reference.class_moments(y, labels, 1)
        torch.testing.assert_close(mean, mean64, rtol=2e-7, atol=0)
        torch.testing.assert_close(var, var64, rtol=2e-6, atol=0)
