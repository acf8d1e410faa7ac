"""The CUDA kernels of the packed operators on a GPU, bit for bit equal to the CPU's."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fdda_fast import ops

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda_emulation"))
from packed_arguments import BITS, convolutions, linears_s32, packable_convolutions

pytestmark = pytest.mark.gpu
MANY = settings(deadline=None, max_examples=200, suppress_health_check=list(HealthCheck))


def on_gpu(args):
    return [arg.cuda() if isinstance(arg, torch.Tensor) else arg for arg in args]


def assert_same_bits(actual, expected):
    assert actual.shape == expected.shape
    assert torch.equal(actual.cpu().view(torch.uint8), expected.view(torch.uint8))


@MANY
@given(
    args=convolutions(
        groups=st.sampled_from([1, 1, 2, 12]),
        channels=st.sampled_from([1, 3, 4, 8, 16, 20, 48, 80]),
        outputs=st.sampled_from([1, 7, 64, 150]),
        kernels=st.integers(1, 3),
        sizes=st.integers(1, 40),
    )
)
def test_convolutions(args):
    expected = torch.ops.fdda.packed_conv2d(*args)
    assert_same_bits(torch.ops.fdda.packed_conv2d(*on_gpu(args)), expected)


@MANY
@given(
    args=convolutions(
        groups=st.just(1),
        channels=st.sampled_from([8, 16, 48, 80]),
        outputs=st.sampled_from([1, 7, 64, 150]),
        kernels=st.integers(1, 3),
        sizes=st.integers(1, 40),
        bits=BITS,
        x_bits=4,
    )
)
def test_convolutions_of_4_bits(args):
    expected = torch.ops.fdda.packed_conv2d(*args)
    x, weight, *rest = on_gpu(args)
    depth = rest[2][0] * rest[2][1] * x.shape[3]
    weight = ops.reorder_weight(weight, rest[0], rest[1], depth)
    assert_same_bits(torch.ops.fdda.reordered_conv2d(x, weight, *rest, 4), expected)


@MANY
@given(args=packable_convolutions(40))
def test_convolutions_of_packed_codes(args):
    args = (*args[:-1], [0, 15])
    expected = ops.pack_codes(torch.ops.fdda.packed_conv2d(*args))
    x, weight, *rest = on_gpu(args)
    depth = rest[2][0] * rest[2][1] * x.shape[3]
    weight = ops.reorder_weight(weight, rest[0], rest[1], depth)
    actual = torch.ops.fdda.reordered_conv2d(ops.pack_codes(x), weight, *rest, 4, True, True)
    assert_same_bits(actual, expected)


@MANY
@given(args=linears_s32())
def test_linear_of_int32(args):
    expected = torch.ops.fdda.packed_linear(*args)
    assert_same_bits(torch.ops.fdda.packed_linear(*on_gpu(args)), expected)


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_reordering(bits, depthwise):
    half = 2 ** (bits - 1)
    q = torch.randint(-half, half, (40, 190), dtype=torch.int8)
    packed = ops.pack_weight(q, bits)
    expected = ops.reorder_weight(packed, bits, 40, 190, depthwise)
    assert_same_bits(ops.reorder_weight(packed.cuda(), bits, 40, 190, depthwise), expected)


@pytest.mark.parametrize("size", [1, 17, 64])
def test_codes(size):
    x = torch.randint(0, 256, (3, size, 9, 12), dtype=torch.uint8)
    image = torch.randn(3, 5, size, 9) * 4
    cases = [
        (ops.quantize, image, (3.3, -2.0, 5)),
        (ops.quantize, image.contiguous(memory_format=torch.channels_last), (3.3, -2.0, 5)),
        (ops.requantize_codes, x, (30.1, 128, 1.7, 0.5, 4)),
        (ops.requantize_codes_packed, x.repeat(1, 1, 1, 8), (30.1, 128, 1.7, 0.5, 4)),
        (ops.dequantize_codes, x, (30.1, 128)),
        (ops.dequantize_sums, x.int() * 1000, (49, 30.1, 128)),
        (ops.sum_pool_codes, x, ()),
        (ops.max_pool2d_codes, x, (3, 2, 1, 1, True)),
    ]
    for operator, tensor, args in cases:
        assert_same_bits(operator(tensor.cuda(), *args), operator(tensor, *args))
