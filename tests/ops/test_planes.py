"""A processor unpacks weights in one of two ways; here both run."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from backends import ISAS, generator

from fdda_fast import ops

COMPILER = shutil.which(os.environ.get("CXX", "c++").split()[0])
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif("avx512vnni" not in ISAS, reason="needs AVX512-VNNI"),
]


@pytest.fixture(scope="module")
def planes(tmp_path_factory):
    library = tmp_path_factory.mktemp("planes") / "planes.so"
    source = Path(__file__).with_name("planes.cpp")
    flags = ["-O2", "-std=c++17", "-shared", "-fPIC", "-w"]
    flags += [f"-mavx512{x}" for x in ("f", "bw", "dq", "vl", "vnni")]
    subprocess.run([COMPILER, *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def aligned(size):
    memory = torch.empty(size + 64, dtype=torch.int8)
    return memory[-memory.data_ptr() % 64 :][:size]


@pytest.mark.parametrize("bit_matrices", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("depth", [1, 3, 4, 15, 16, 17, 147])
def test_unpacking(planes, bit_matrices, bits, depth):
    if bit_matrices and not planes.gfni():
        pytest.skip("needs GFNI")
    half, zero_point = 2 ** (bits - 1), 255
    q = torch.randint(-half, half, (16, depth), generator=generator(depth), dtype=torch.int8)
    q[0], q[1] = -half, half - 1
    offset = torch.arange(16, dtype=torch.int8).remainder(2) if bits < 8 else torch.zeros(16).char()
    blocks = -(-depth // 4)
    panel, start = aligned(64 * blocks), torch.empty(16, dtype=torch.int32)
    packed, offsets = ops.pack_weight(q, bits), offset.repeat_interleave(4)
    p = [ctypes.c_void_p(t.data_ptr()) for t in (packed, offsets, panel, start)]
    planes.unpack(
        int(bit_matrices), p[0], bits, ctypes.c_int64(depth), p[1], zero_point, p[2], p[3]
    )
    weight = q.int() + offset[:, None]
    expected = torch.nn.functional.pad(weight, (0, 4 * blocks - depth))
    expected = expected.view(16, blocks, 4).permute(1, 0, 2)
    assert torch.equal(panel.view(blocks, 16, 4).int(), expected)
    assert torch.equal(start, (-zero_point * weight.sum(1)).int())
