"""Kernels against what a user would write without them: `make bench`.

One group per operator and shape; the first thing to read is the ratio of the medians in a group.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fdda_fast.ops as ops

# (channels, size, kernel): 3x3 and 1x1 layers of ResNet-18 at 224 px.
CONVOLUTIONS = [(64, 56, 3), (128, 28, 3), (256, 14, 3), (512, 7, 3), (64, 56, 1)]
ACTIVATION = (32, 64, 56, 56)


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


@pytest.mark.parametrize("provider", ["copy", "torch", "fdda_fast"])
def test_fake_quantize(benchmark, provider):
    benchmark.group = f"fake quantisation, known range, {list(ACTIVATION)}"
    x = torch.rand(ACTIVATION)
    out = torch.empty_like(x)
    low, high = torch.tensor(0.0), torch.tensor(1.0)
    runs = {
        "copy": lambda: out.copy_(x),
        "torch": lambda: torch.fake_quantize_per_tensor_affine(x, 1 / 15, 0, 0, 15),
        "fdda_fast": lambda: ops.fake_quantize_range(x, low, high, 4),
    }
    benchmark(runs[provider])


@pytest.mark.parametrize("provider", ["torch", "fdda_fast"])
def test_weight_fake_quantize(benchmark, provider):
    benchmark.group = "fake quantisation of a weight to its own ranges, [512, 512, 3, 3]"
    weight = torch.randn(512, 512, 3, 3)

    def plain():
        low, high = torch.aminmax(weight.flatten(1), dim=1)
        scale = (high - low) / 15
        zero_point = (-low / scale).round().int()
        return torch.fake_quantize_per_channel_affine(weight, scale, zero_point, 0, 0, 15)

    benchmark(plain if provider == "torch" else lambda: ops.fake_quantize_minmax(weight, 4, 0))


@pytest.mark.parametrize("provider", ["torch", "fdda_fast"])
def test_norm_residual_relu_quantizer(benchmark, provider):
    """Forward and backward, the range learned; for torch without a gradient of the range."""
    benchmark.group = f"batch norm + residual + ReLU + quantiser, both ways, {list(ACTIVATION)}"
    channels = ACTIVATION[1]
    x, residual, grad = (
        torch.randn(ACTIVATION).contiguous(memory_format=torch.channels_last) for _ in range(3)
    )
    norm = torch.nn.BatchNorm2d(channels).eval()
    low, high = torch.tensor(0.0), torch.tensor(2.0, requires_grad=True)
    leaves = [x.requires_grad_(), residual.requires_grad_(), norm.weight, norm.bias]

    def plain():
        y = F.relu(norm(x) + residual)
        y = torch.fake_quantize_per_tensor_affine(y, 2 / 15, 0, 0, 15)
        return torch.autograd.grad(y, leaves, grad)

    def fused():
        y = ops.bn_relu_fake_quantize(
            x, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, low, high, 4,
            True, residual, "clipped",
        )  # fmt: skip
        return torch.autograd.grad(y, [*leaves, high], grad)

    benchmark(plain if provider == "torch" else fused)


@pytest.mark.parametrize("provider", ["mean and var", "fdda_fast"])
def test_class_moments(benchmark, provider):
    benchmark.group = f"moments of 8 classes, {list(ACTIVATION)}"
    x, labels = torch.randn(ACTIVATION), torch.arange(ACTIVATION[0]) % 8

    def plain():
        parts = [x[labels == label] for label in range(8)]
        return [(p.mean((0, 2, 3)), p.var((0, 2, 3), correction=0)) for p in parts]

    benchmark(plain if provider == "mean and var" else lambda: ops.class_moments(x, labels, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("provider", ["torch", "fdda_fast"])
@pytest.mark.parametrize("operator", ["upsample_conv3x3", "conv3x3_few_outputs"])
def test_generator_convolution(benchmark, operator, provider, dtype):
    """The generator's second and third convolution at 224 px, forward and backward, 8 images."""
    inputs, outputs, size = {
        "upsample_conv3x3": (128, 64, 112),
        "conv3x3_few_outputs": (64, 3, 224),
    }[operator]
    benchmark.group = f"{operator}, {inputs} to {outputs} channels, {size}x{size}, {dtype}"
    x = torch.randn(8, inputs, size, size, dtype=dtype).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(outputs, inputs, 3, 3), torch.randn(outputs)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def plain(x, weight, bias):
        if operator == "upsample_conv3x3":
            x = F.interpolate(x, scale_factor=2)
        return F.conv2d(x, weight.to(dtype), bias.to(dtype), padding=1)

    run = plain if provider == "torch" else getattr(ops, operator)
    grad_y = torch.randn_like(plain(*leaves))
    benchmark(lambda: torch.autograd.grad(run(*leaves), leaves, grad_y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("provider", ["torch", "fdda_fast"])
def test_conditional_bn(benchmark, provider, dtype):
    """Forward and backward of the generator's last one at 224 px, 8 images, 1000 classes."""
    benchmark.group = f"conditional batch norm and LeakyReLU, [8, 64, 224, 224], {dtype}"
    x = torch.randn(8, 64, 224, 224, dtype=dtype).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, 1000, 64)
    labels, leaves = torch.randint(1000, (8,)), [t.requires_grad_() for t in (x, weight, bias)]

    def plain(x, weight, bias):
        y = F.batch_norm(x, None, None, None, None, True, 0.0, 0.8)
        weight, bias = (t[labels][:, :, None, None].to(dtype) for t in (weight, bias))
        return F.leaky_relu(weight * y + bias, 0.2)

    def ours(x, weight, bias):
        return ops.conditional_bn_lrelu(x, labels, weight, bias, [8], 0.8)[0]

    run = plain if provider == "torch" else ours
    grad_y = torch.randn_like(x)
    benchmark(lambda: torch.autograd.grad(run(*leaves), leaves, grad_y))
