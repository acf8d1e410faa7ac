"""The functions the CUDA kernels are made of, compiled for the CPU and compared bit for bit."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from backends import generator

from fdda_fast import ops
from fdda_fast.ops import reference

COMPILER = shutil.which(os.environ.get("CXX", "c++").split()[0])
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def direct_conv(tmp_path_factory):
    library = tmp_path_factory.mktemp("direct") / "direct_conv.so"
    source = Path(__file__).with_name("direct_conv.cpp")
    flags = ["-O2", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off"]
    subprocess.run([COMPILER, *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library)).direct_conv


def pointer(t):
    return ctypes.c_void_p(t.data_ptr() if t is not None else None)


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
@pytest.mark.parametrize("groups", [1, 3, 12])
@pytest.mark.parametrize("limit", [7, 2**40])
@pytest.mark.parametrize("output_range", [None, [3, 200]])
def test_direct_convolution(direct_conv, bits, groups, limit, output_range):
    g = generator(bits)
    x = torch.randint(0, 256, (2, 6, 7, 12), generator=g, dtype=torch.uint8)
    half = 2 ** (bits - 1)
    q = torch.randint(-half, half, (24, 6 * 12 // groups), generator=g, dtype=torch.int8)
    weight = ops.pack_weight(q, bits)
    offset = torch.randint(-limit, limit + 1, (24,), generator=g)
    multiplier, bias = torch.rand(24, generator=g) / limit, torch.randn(24, generator=g)
    geometry = ([3, 2], [2, 1], [1, 1], [1, 2], groups, 33)
    size = (2, 3, 7, 24)
    residual = torch.randint(0, 256, size, generator=g, dtype=torch.uint8)
    args = (x, weight, bits, 24, *geometry, offset, multiplier, bias, residual, 0.3, output_range)
    expected = reference.packed_conv2d(*args)
    assert expected.shape == size
    actual = torch.empty_like(expected)
    shape = [*x.shape, bits, size[3], *size[1:3], 3, 2, 2, 1, 1, 1, 1, 2, groups, 33]
    codes = output_range is not None
    lo, hi = output_range or (0, 0)
    direct_conv(
        (ctypes.c_int64 * len(shape))(*shape),
        *map(pointer, (x, weight, offset, multiplier, bias, residual)),
        ctypes.c_float(0.3),
        pointer(None if codes else actual),
        pointer(actual if codes else None),
        ctypes.c_float(lo),
        ctypes.c_float(hi),
    )
    assert torch.equal(actual, expected)
