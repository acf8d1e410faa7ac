"""Integer kernels against what a user would write without them: `make bench`.

One group per operator and shape; the first thing to read is the ratio of the medians in a group.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fdda_fast.ops as ops

# (channels, size, kernel): 3x3 and 1x1 layers of ResNet-18 at 224 px.
CONVOLUTIONS = [(64, 56, 3), (128, 28, 3), (256, 14, 3), (512, 7, 3), (64, 56, 1)]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("channels", "size", "kernel"), CONVOLUTIONS)
@pytest.mark.parametrize("provider", ["fp32", "w4a4"])
def test_convolution(benchmark, provider, channels, size, kernel):
    benchmark.group = f"conv {kernel}x{kernel}, {channels} channels, {size}x{size}"
    padding = kernel // 2
    if provider == "fp32":
        x = torch.randn(1, channels, size, size).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, kernel, kernel)
        weight = weight.contiguous(memory_format=torch.channels_last)
        run = torch.inference_mode()(lambda: F.conv2d(x, weight, padding=padding))
    else:
        codes = torch.randint(-8, 8, (channels, channels * kernel**2), dtype=torch.int8)
        weight = ops.pack_weight(codes, 4)
        x = torch.randint(0, 16, (1, size, size, channels), dtype=torch.uint8)
        parameters = (
            torch.zeros(channels, dtype=torch.int64),
            torch.full((channels,), 1e-3),
            torch.zeros(channels),
        )
        geometry = ([kernel] * 2, [1, 1], [padding] * 2, [1, 1], 1)

        def run():
            return ops.packed_conv2d(
                x, weight, 4, channels, *geometry, 0, *parameters, output_range=(0, 15)
            )

    benchmark.extra_info["gmac"] = channels**2 * kernel**2 * size**2 / 1e9
    benchmark(run)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(("channels", "size"), [s[:2] for s in CONVOLUTIONS if s[2] == 3])
@pytest.mark.parametrize("provider", ["F(3x3)", "without"])
def test_winograd_of_two_bits(benchmark, provider, channels, size, batch):
    """W2A3; a single channel whose weights reach 3 is what rules F(3x3, 3x3) out. Without it comes
    F(2x2, 3x3), on AVX512-VNNI F(4x4, 3x3)."""
    benchmark.group = f"W2A3 conv 3x3, {channels} channels, {size}x{size}, batch {batch}"
    codes = torch.randint(-2, 2, (channels, channels * 9), dtype=torch.int8)
    weight, offset = ops.pack_weight(codes, 2), torch.zeros(channels, dtype=torch.int64)
    offset[0] = 1 if provider == "F(3x3)" else 2
    x = torch.randint(0, 8, (batch, size, size, channels), dtype=torch.uint8)
    parameters = offset, torch.full((channels,), 1e-3), torch.zeros(channels)
    geometry = 3, 1, 1, 1, 1, 0  # kernel, stride, padding, dilation, groups, zero point
    benchmark(
        lambda: ops.packed_conv2d(
            x, weight, 2, channels, *geometry, *parameters, output_range=(0, 7)
        )
    )
