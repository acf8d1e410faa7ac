"""The kernels of csrc/cuda, bit for bit equal to the operators of the CPU."""

import pytest
import torch
from emulation import HERE, ROOT, build, needs_compiler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed_arguments import convolutions, linears_s32, run_conv, run_linear

pytestmark = needs_compiler
FEW = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SEEDS = st.integers(0, 9)  # of the order of the threads


def assert_same_bits(actual, expected):
    assert actual.shape == expected.shape
    assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


@pytest.fixture(scope="module")
def emulation():
    return build(
        *(ROOT / "csrc/cuda" / name for name in ("packed.cu", "gemm/gemm.cu")),
        HERE / "operators.cu",
    )


@settings(FEW, max_examples=60)
@given(
    args=convolutions(
        groups=st.sampled_from([1, 2, 3, 12]),
        channels=st.integers(1, 9),
        outputs=st.integers(1, 7),
        kernels=st.integers(1, 3),
        sizes=st.integers(1, 6),
    ),
    seed=SEEDS,
)
def test_direct_convolution(emulation, args, seed):
    emulation.reset(seed)
    actual = run_conv(emulation, "packed_conv2d", args)
    assert_same_bits(actual, torch.ops.fdda.packed_conv2d(*args))


@settings(FEW, max_examples=30)
@given(args=linears_s32(), seed=SEEDS)
def test_linear_of_int32(emulation, args, seed):
    emulation.reset(seed)
    assert_same_bits(run_linear(emulation, args), torch.ops.fdda.packed_linear(*args))


TILES = st.sampled_from(["conv_gemm_128x128", "conv_gemm_32x64"])


@settings(FEW, max_examples=60)
@given(
    args=convolutions(
        groups=st.just(1),
        channels=st.sampled_from([1, 3, 4, 8, 16, 20, 24, 48, 80]),
        outputs=st.integers(1, 150),
        kernels=st.integers(1, 3),
        sizes=st.integers(1, 12),
    ),
    tile=TILES,
    seed=SEEDS,
)
def test_convolution_on_tensor_cores(emulation, args, tile, seed):
    emulation.reset(seed)
    actual = run_conv(emulation, tile, args)
    assert_same_bits(actual, torch.ops.fdda.packed_conv2d(*args))
    assert emulation.bank_conflicts == 0
