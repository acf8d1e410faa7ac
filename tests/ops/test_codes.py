"""Sums and values of codes."""

import pytest
import torch
from backends import ISAS, assert_same_bits, generator, on_isa

from fdda_fast import ops
from fdda_fast.ops import reference


def codes(*shape):
    return torch.randint(0, 256, shape, generator=generator(0), dtype=torch.uint8)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 1, 130), (0, 2, 2, 3), (2, 0, 2, 3)])
def test_sum_pool(isa, shape):
    x = codes(*shape)
    expected = x.long().sum((1, 2)).int()
    with on_isa(isa):
        strided = x.transpose(1, 2).contiguous().transpose(1, 2)
        for actual in (ops.sum_pool_codes(x), ops.sum_pool_codes(strided)):
            assert actual.dtype == torch.int32
            assert torch.equal(actual, expected)
    assert torch.equal(reference.sum_pool_codes(x), expected)


@pytest.mark.parametrize("shape", [(256,), (2, 3, 4), (0, 3)])
def test_dequantize_codes(shape):
    x = codes(*shape).transpose(0, -1)
    y = ops.dequantize_codes(x, 3.7, 128)
    assert_same_bits(y, ((x.float() - 128) / 3.7).contiguous())
    assert y.is_contiguous()


def test_dequantize_sums():
    x = torch.randint(-(2**31), 2**31, (5, 9), generator=generator(0)).int().T
    y = ops.dequantize_sums(x, 49, 3.7, 255)
    assert_same_bits(y, ((x.double() - 255 * 49) / (3.7 * 49)).float().contiguous())
    assert ops.dequantize_sums(x[:0], 1, 1.0, 0).shape == (0, 5)


@pytest.mark.parametrize("shape", [(32,), (2, 0, 64), (3, 2, 5, 96)])
def test_packed_codes(shape):
    x = codes(*shape) & 15
    packed = ops.pack_codes(x)
    assert packed.shape == (*shape[:-1], shape[-1] // 2)
    for c in range(shape[-1]):
        byte = packed[..., c // 32 * 16 + c % 16]
        assert torch.equal(byte >> 4 if c % 32 >= 16 else byte & 15, x[..., c])
    assert torch.equal(ops.unpack_codes(packed), x)
    numbers = (3.3, 128, 0.7, 1.5, 4)
    expected = ops.pack_codes(ops.requantize_codes(codes(*shape), *numbers))
    assert torch.equal(ops.requantize_codes_packed(codes(*shape), *numbers), expected)


def test_opcheck():
    check, fdda = torch.library.opcheck, torch.ops.fdda
    check(fdda.sum_pool_codes.default, (codes(2, 3, 4, 5),))
    check(fdda.dequantize_codes.default, (codes(2, 3), 2.5, 7))
    check(fdda.pack_codes.default, (codes(2, 64),))
    check(fdda.unpack_codes.default, (codes(2, 48),))
    check(fdda.requantize_codes_packed.default, (codes(2, 64), 3.3, 128, 0.7, 1.5, 4))
    check(fdda.dequantize_sums.default, (codes(2, 3).int(), 4, 2.5, 7))


@pytest.mark.parametrize(
    ("operator", "args", "error", "message"),
    [
        ("sum_pool_codes", (torch.zeros(1, 1, 1, 1),), TypeError, "x: expected torch.uint8"),
        ("sum_pool_codes", (codes(2, 3),), ValueError, "x: expected shape"),
        (
            "sum_pool_codes",
            (codes(1).expand(1, 4096, 4096, 1),),
            ValueError,
            "x: expected at most 8421504 pixels an image, got 16777216",
        ),
        ("pack_codes", (codes(2, 48),), ValueError, "x: expected a multiple of 32 in the last dim"),
        ("unpack_codes", (codes(2, 24),), ValueError, "packed: expected a multiple of 16 in the"),
        ("pack_codes", (codes(2, 32).int(),), TypeError, "x: expected torch.uint8"),
        (
            "requantize_codes_packed",
            (codes(2, 32), 3.3, 128, 0.7, 1.5, 5),
            ValueError,
            "bits: expected 2 to 4, got 5",
        ),
        ("dequantize_codes", (codes(2).int(), 1.0, 0), TypeError, "x: expected torch.uint8"),
        ("dequantize_codes", (codes(2), 0.0, 0), ValueError, "scale: expected a number other"),
        ("dequantize_codes", (codes(2), 1.0, 256), ValueError, "zero_point: expected 0 to 255"),
        ("dequantize_sums", (codes(2), 1, 1.0, 0), TypeError, "x: expected torch.int32"),
        ("dequantize_sums", (codes(2).int(), 0, 1.0, 0), ValueError, "count: expected 1 to"),
    ],
)
def test_refuses(operator, args, error, message):
    with pytest.raises(error, match=message):
        getattr(ops, operator)(*args)
