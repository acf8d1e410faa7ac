"""The training operators against what a user would write without them: `python bench/operators.py`.

Each against plain PyTorch and against torch.compile of the same formula, all in one process, in
turn; medians. GB/s counts what an operator has to move, every tensor once; its share is that of a
copy's (read + write) or, for what only reads, a read's GB/s, measured in the same turns; of
convolutions it is GMAC/s of the plain formula, and its share that of a matrix product's, which 81
products in place of 576, and 36 in place of 144, may exceed. `taskset -c 0` pins it to one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from timing import Run, copy_run, interleaved, multiply_run, read_run

from fdda_fast import ops

EPS = 1e-5


class Case(NamedTuple):
    """One operator at one shape.

    moved: bytes. macs: multiply-adds, or 0. reads_only: moved is compared with a read.
    """

    name: str
    plain: Callable
    ours: Callable
    args: tuple
    moved: float = 0
    macs: float = 0
    reads_only: bool = False
    backward: bool = False


def activation(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def norm_tensors(channels: int) -> tuple[torch.Tensor, ...]:
    """weight, bias, running_mean, running_var."""
    weight, bias, mean, var = torch.rand(4, channels) + 0.5
    return weight, bias, mean, var


def quantizers() -> Iterator[Case]:
    x = torch.rand(32, 64, 56, 56)
    scale, zero = torch.tensor(1 / 15), torch.tensor(0.0)
    yield Case(
        "fake_quantize, frozen range, 32x64x56x56",
        lambda x: torch.fake_quantize_per_tensor_affine(x, 1 / 15, 0, 0, 15),
        lambda x: ops.fake_quantize(x, scale, zero, 0, 15),
        (x,),
        moved=2 * x.nbytes,
    )

    def plain_weight(weight):
        low, high = torch.aminmax(weight.flatten(1), dim=1)
        scale = (high - low) / 15
        zero_point = (-low / scale).round().int()
        return torch.fake_quantize_per_channel_affine(weight, scale, zero_point, 0, 0, 15)

    weight = torch.randn(512, 512, 3, 3)
    yield Case(
        "fake_quantize_minmax, weight 512x512x3x3",
        plain_weight,
        lambda w: ops.fake_quantize_minmax(w, 4, 0),
        (weight,),
        moved=2 * weight.nbytes,
    )


def plain_moments(x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of two classes, the first half of x and the second, as a hook takes them."""
    return [(p.mean((0, 2, 3)), p.var((0, 2, 3), correction=0)) for p in x.chunk(2)]


def norms(dtype: torch.dtype) -> Iterator[Case]:
    kind = str(dtype).removeprefix("torch.")
    x = activation((32, 64, 112, 112), dtype)
    labels = torch.arange(32) // 16
    yield Case(
        f"class_moments, 32x64x112x112, {kind}",
        plain_moments,
        lambda x: ops.class_moments(x, labels, 2)[:2],
        (x,),
        moved=x.nbytes,
        reads_only=True,
    )
    tensors = norm_tensors(64)

    def plain(x):
        weight, bias, mean, var = (t.to(x.dtype) for t in tensors)
        y = F.relu(F.batch_norm(x, mean, var, weight, bias, False, 0.0, EPS))
        return y, *(m for pair in plain_moments(x) for m in pair)

    yield Case(
        f"bn_relu_class_moments both ways, 32x64x112x112, {kind}",
        plain,
        lambda x: ops.bn_relu_class_moments(x, *tensors, EPS, labels, 2),
        (x,),
        moved=5 * x.nbytes,
        backward=True,
    )
    low, high = torch.tensor(0.0), torch.tensor(2.0)

    def plain_quantizer(x, weight, bias):
        mean, var = tensors[2:]
        y = F.relu(F.batch_norm(x.float(), mean, var, weight, bias, False, 0.0, EPS))
        return torch.fake_quantize_per_tensor_affine(y, 2 / 15, 0, 0, 15).to(x.dtype)

    def quantizer(x, weight, bias):
        return ops.bn_relu_fake_quantize(x, weight, bias, *tensors[2:], EPS, low, high, 4)

    yield Case(
        f"bn_relu_fake_quantize both ways, 32x64x112x112, {kind}",
        plain_quantizer,
        quantizer,
        (x, *tensors[:2]),
        moved=5 * x.nbytes,
        backward=True,
    )


def generator(dtype: torch.dtype) -> Iterator[Case]:
    """The generator's last layers at 224 px, 8 images."""
    kind = str(dtype).removeprefix("torch.")
    x, labels = activation((8, 64, 224, 224), dtype), torch.arange(8) * 100
    weight, bias = torch.randn(2, 1000, 64)

    def plain_norm(x, weight, bias):
        y = F.batch_norm(x, None, None, None, None, True, 0.0, 0.8)
        weight, bias = (t[labels][:, :, None, None].to(dtype) for t in (weight, bias))
        return F.leaky_relu(weight * y + bias, 0.2)

    yield Case(
        f"conditional_bn_lrelu both ways, 8x64x224x224, {kind}",
        plain_norm,
        lambda x, weight, bias: ops.conditional_bn_lrelu(x, labels, weight, bias, [8], 0.8)[0],
        (x, weight, bias),
        moved=8 * x.nbytes,  # statistics, forward, the backward's sums and its result
        backward=True,
    )

    def convolution(x, weight, bias):
        return F.conv2d(x, weight.to(dtype), bias.to(dtype), padding=1)

    yield Case(
        f"conditional_bn_lrelu_conv3x3 both ways, 8x64x224x224 to 3, {kind}",
        lambda x, *parameters: convolution(plain_norm(x, *parameters[:2]), *parameters[2:]),
        lambda x, *parameters: ops.conditional_bn_lrelu_conv3x3(
            x, labels, *parameters[:2], [8], 0.8, 0.2, *parameters[2:]
        )[0],
        (x, weight, bias, torch.randn(3, 64, 3, 3), torch.randn(3)),
        moved=5 * x.nbytes,  # statistics, forward, the backward's sums and its result
        backward=True,
    )
    small = activation((8, 128, 112, 112), dtype)
    yield Case(
        f"upsample_conv3x3 both ways, 8x128x112x112 to 64, {kind}",
        lambda x, weight, bias: convolution(F.interpolate(x, scale_factor=2), weight, bias),
        ops.upsample_conv3x3,
        (small, torch.randn(64, 128, 3, 3), torch.randn(64)),
        macs=3 * 9 * 128 * 64 * 8 * 224**2,
        backward=True,
    )
    yield Case(
        f"conv3x3_few_outputs both ways, 8x64x224x224 to 3, {kind}",
        convolution,
        ops.conv3x3_few_outputs,
        (x, torch.randn(3, 64, 3, 3), torch.randn(3)),
        macs=3 * 9 * 64 * 3 * 8 * 224**2,
        backward=True,
    )


def networks() -> Iterator[Case]:
    """A convolution of ResNet-18's second stage at 224 px, 32 images."""
    for dtype in (torch.float32, torch.bfloat16):
        yield Case(
            f"conv3x3 both ways, 32x128x28x28 to 128, {str(dtype).removeprefix('torch.')}",
            lambda x, weight: F.conv2d(x, weight, padding=1),
            ops.conv3x3,
            (activation((32, 128, 28, 28), dtype), activation((128, 128, 3, 3), dtype)),
            macs=3 * 9 * 128 * 128 * 32 * 28**2,
            backward=True,
        )


def runs_of(case: Case) -> dict[str, Run]:
    args = case.args
    if case.backward:
        args = tuple(a.detach().clone().requires_grad_() for a in args)

    def outputs(function: Callable) -> list[torch.Tensor]:
        out = function(*args)
        return list(out) if isinstance(out, tuple | list) else [out]

    def run(function: Callable) -> Run:
        if not case.backward:
            return lambda: function(*args)
        gradients = [torch.randn_like(out) for out in outputs(function)]
        return lambda: torch.autograd.grad(outputs(function), args, gradients)

    providers = {
        "plain": case.plain,
        "compiled": torch.compile(case.plain, dynamic=False),
        "ours": case.ours,
    }
    return {name: run(function) for name, function in providers.items()}


def ceiling(case: Case) -> tuple[Run, float]:
    """What bounds the operator, and how much of it one call moves or multiplies."""
    x = case.args[0]
    if case.macs:
        return multiply_run(x.dtype)
    if case.reads_only:
        return read_run(x.numel(), x.dtype), x.nbytes
    return copy_run(x.numel(), x.dtype), 2 * x.nbytes


def on_threads(count: int, run: Run) -> Run:
    def call() -> object:
        torch.set_num_threads(count)
        return run()

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtypes = torch.float32, torch.bfloat16
    cases = [case for part in (norms, generator) for dtype in dtypes for case in part(dtype)]
    table = Table(title=f"training operators, {args.threads} thread")
    table.add_column("operator", no_wrap=True)
    columns = "ms", "x plain", "x compiled", "x one thread", "GB/s or GMAC/s", "% of the ceiling"
    for column in columns:
        table.add_column(column, justify="right")
    for case in [*quantizers(), *cases, *networks()]:
        if args.only not in case.name:
            continue
        bound, work = ceiling(case)
        runs = {**runs_of(case), "bound": bound}
        threads = {name: on_threads(args.threads, run) for name, run in runs.items()}
        one_thread = {"one thread": on_threads(1, runs["ours"])}
        seconds = interleaved({**threads, **one_thread}, args.rounds)
        ours = seconds["ours"]
        rate = (case.macs or case.moved) / ours
        table.add_row(
            case.name,
            f"{1e3 * ours:.2f}",
            f"{seconds['plain'] / ours:.2f}",
            f"{seconds['compiled'] / ours:.2f}",
            f"{seconds['one thread'] / ours:.2f}",
            f"{rate / 1e9:.1f}",
            f"{100 * rate / (work / seconds['bound']):.0f}",
        )
    console = Console()
    console.width = max(console.width, 120)  # names and figures whole, in a file, too
    console.print(table)


if __name__ == "__main__":
    main()
