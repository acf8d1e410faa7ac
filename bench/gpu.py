"""The GPU kernels on a GPU: results against the CPU's, then times: `python bench/gpu.py`.

Every operator that has CUDA or Triton kernels runs on both. Results of packed operators and of fake
quantisation are equal bit for bit, others have float sums: the largest difference is printed, in
units of the largest value. A wrong result ends the run with exit code 1, before anything is timed.

Times are medians of bursts between CUDA events, all in turn, in microseconds: the layers of
ResNet-18 with weights, packed in 4 and in 8 bits with everything that follows the products, against
the bare products in cuBLAS fp16 (of a matrix that an im2col would have to write first) and in
torch._int_mm, and against a convolution and ReLU in fp16 under torch.compile; then the operators on
codes against a copy. Without a GPU it says so and ends with exit code 2.
"""

from __future__ import annotations

import statistics
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fdda_fast import ops
from fdda_fast.gpu_report import BATCHES, Layer, resnet18
from fdda_fast.ops._library import has_cuda_kernels

EPS = 1e-5
TOLERANCE = 1e-5  # of float32 sums, in units of the largest value
CUDA = torch.device("cuda")
BURST = 20  # calls between two events
NO_GPU = "bench/gpu.py: no GPU: torch sees no CUDA or ROCm device, nothing was checked or timed"
Run = Callable[[], object]


class Case(NamedTuple):
    """An operator and its arguments; `exact`: bits equal the CPU's."""

    name: str
    args: tuple
    exact: bool = True


def cases() -> Iterator[Case]:
    """Every operator with a GPU kernel, on tensors of the CPU."""
    g = torch.Generator().manual_seed(0)
    x, grad, residual = torch.randn(3, 4, 32, 14, 14, generator=g)
    weight, bias, mean = torch.randn(3, 32, generator=g)
    norm = (weight, bias, mean, torch.rand(32, generator=g) + 0.1, EPS)
    labels = torch.tensor([0, 1, 1, 0])
    low, high = torch.tensor(-1.5), torch.tensor(1.7)
    scale, zero_point = torch.rand(32, generator=g) / 8 + 0.01, torch.full((32,), 7.0)
    yield Case("fake_quantize", (x, scale, zero_point, 0, 15, 1))
    arguments = (grad, x, scale, zero_point, 0, 15, 1, True, True)
    yield Case("fake_quantize_backward", arguments, exact=False)
    yield Case("fake_quantize_range", (x, low, high, 4))
    arguments = (grad, x, low, high, 4, None, True, True)
    yield Case("fake_quantize_range_backward", arguments, exact=False)
    yield Case("fake_quantize_minmax", (x, 4, 0))
    yield Case("observe_range", (x, low, high, 0.9, True))
    quantizer = (low, high, 4, 0.0, 6.0, residual)
    yield Case("bn_relu_fake_quantize", (x, *norm, *quantizer))
    arguments = (grad, x, *norm, *quantizer, True, True)
    yield Case("bn_relu_fake_quantize_backward", arguments, exact=False)
    moments = ops.class_moments(x, labels, 2)
    gradients = torch.randn(2, 2, 32, generator=g)
    yield Case("class_moments", (x, labels, 2), exact=False)
    arguments = (*gradients, x, labels, moments[0], moments[2])
    yield Case("class_moments_backward", arguments, exact=False)
    arguments = (x, *norm, labels, 2, 0.0, 6.0, residual)
    yield Case("bn_relu_class_moments", arguments, exact=False)
    arguments = (grad, *gradients, x, *norm, labels, moments[0], moments[2], 0.0, 6.0, residual)
    yield Case("bn_relu_class_moments_backward", arguments, exact=False)
    affine = torch.randn(2, 3, 32, generator=g)
    arguments = (x, labels, *affine, [2, 2], EPS, 0.2)
    yield Case("conditional_bn_lrelu", arguments, exact=False)
    statistics_ = torch.ops.fdda.conditional_bn_lrelu(*arguments)[1:]
    arguments = (grad, *arguments[:4], *statistics_, *arguments[4:])
    yield Case("conditional_bn_lrelu_backward", arguments, exact=False)
    few = torch.randn(3, 32, 3, 3, generator=g) / 17
    yield Case("conv3x3_few_outputs", (x, few, bias[:3]), exact=False)
    yield Case("conv3x3_few_outputs_backward", (grad[:, :3], x, few), exact=False)
    filters = torch.randn(32, 32, 3, 3, generator=g) / 17
    yield Case("upsample_conv3x3", (x, filters, bias), exact=False)
    large = torch.randn(4, 32, 28, 28, generator=g)
    yield Case("upsample_conv3x3_backward", (large, x, filters), exact=False)
    yield from packed_cases(g)
    yield from reordered_cases(g)
    yield from code_cases(g)


def packed_cases(g: torch.Generator) -> Iterator[Case]:
    """Every width; channels that vectors divide or not, strides, groups, few rows, int32 inputs."""
    for bits in range(2, 9):
        for channels, filters, groups, kernel, stride in (
            (64, 128, 1, 3, 1),
            (3, 40, 1, 7, 2),
            (48, 48, 48, 3, 1),
            (40, 60, 2, 1, 1),
        ):
            x = _codes((2, 15, 13, channels), 8, g)
            depth = kernel * kernel * channels // groups
            packed = _packed(filters, depth, bits, g)
            geometry = ([kernel] * 2, [stride] * 2, [kernel // 2] * 2, [1, 1], groups, 17)
            tail = (*_parameters(filters, depth, g), None, 0.0, [0, 2**bits - 1])
            yield Case("packed_conv2d", (x, packed, bits, filters, *geometry, *tail))
        for rows, depth, filters, high in ((3, 512, 1000, 2**20), (300, 100, 70, 256)):
            x = torch.randint(0, high, (rows, depth), generator=g, dtype=torch.int32)
            x = x if high > 256 else x.to(torch.uint8)
            packed = _packed(filters, depth, bits, g)
            parameters = _parameters(filters, depth, g)
            yield Case("packed_linear", (x, packed, bits, filters, 9, *parameters))
            yield Case("unpack_weight", (packed, bits, filters, depth))


def reordered_cases(g: torch.Generator) -> Iterator[Case]:
    """Weights in the kernels' order: few and many pixels, depthwise, linear; residuals of both
    kinds; inputs that are multiplied as bytes, as halves, and that lie packed, as outputs may.
    """
    for bits in range(2, 9):
        for size, channels, filters, groups, kernel in (
            (7, 64, 96, 1, 3),
            (48, 96, 128, 1, 1),
            (15, 48, 48, 48, 3),
            (1, 224, 160, 1, 1),
        ):
            depth = kernel * kernel * channels // groups
            packed = _packed(filters, depth, bits, g)
            yield Case("reorder_weight", (packed, bits, filters, depth, groups > 1))
            weight = ops.reorder_weight(packed, bits, filters, depth, groups > 1)
            geometry = ([kernel] * 2, [1, 1], [kernel // 2] * 2, [1, 1], groups, 5)
            parameters = _parameters(filters, depth, g)
            shape = (4, size, size)
            added = torch.randint(0, 256, (*shape, filters), generator=g, dtype=torch.uint8)
            for x_bits, residual in ((8, None), (4, added), (4, added.float())):
                x = _codes((*shape, channels), x_bits, g)
                tail = (*parameters, residual, 0.01, [0, 15], x_bits)
                arguments = (weight, bits, filters, *geometry, *tail)
                yield Case("reordered_conv2d", (x, *arguments))
                if x_bits == 4 and bits <= 4 and groups == 1:
                    for out_packed in (False, True):
                        packed_tail = (*arguments, True, out_packed)
                        yield Case("reordered_conv2d", (ops.pack_codes(x), *packed_tail))


def code_cases(g: torch.Generator) -> Iterator[Case]:
    """Into, out of and between codes; sizes that vectors divide or not."""
    meaning = (0.4, 130, 0.05, -3.0)
    for shape in ((4, 14, 14, 64), (3, 9, 7, 5)):
        x = _codes(shape, 8, g)
        image = torch.randn(*shape, generator=g) * 4
        yield Case("quantize", (image, 3.3, -2.0, 5))
        yield Case("quantize", (image.contiguous(memory_format=torch.channels_last), 3.3, -2.0, 8))
        yield Case("requantize_codes", (x, *meaning, 4))
        yield Case("dequantize_codes", (x, 30.1, 128))
        yield Case("dequantize_sums", (x.int() * 1000, 49, 30.1, 128))
        yield Case("sum_pool_codes", (x,))
        yield Case("max_pool2d_codes", (x, [3, 3], [2, 2], [1, 1], [1, 1], True))
    yield Case("requantize_codes_packed", (_codes((4, 14, 14, 64), 8, g), *meaning, 4))


def _codes(shape: tuple[int, ...], bits: int, g: torch.Generator) -> Tensor:
    return torch.randint(0, 2**bits, shape, generator=g, dtype=torch.uint8)


def _packed(filters: int, depth: int, bits: int, g: torch.Generator) -> Tensor:
    half = 2 ** (bits - 1)
    q = torch.randint(-half, half, (filters, depth), generator=g, dtype=torch.int8)
    return ops.pack_weight(q, bits)


def _parameters(filters: int, depth: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets, multipliers and bias that spread the outputs over their range."""
    offset = torch.randint(-3, 4, (filters,), generator=g)
    multiplier = torch.rand(filters, generator=g) / (depth * 40)
    return offset, multiplier, torch.randn(filters, generator=g) + 4


def compare(case: Case, device: str) -> float:
    """The largest difference from the CPU's result in units of its largest value; 0: equal bits.

    Infinite where shapes, dtypes or the places of NaN differ.
    """
    operator = getattr(torch.ops.fdda, case.name)
    moved = [a.to(device) if isinstance(a, Tensor) else a for a in case.args]
    return difference(operator(*moved), operator(*case.args))


def difference(actual: object, expected: object) -> float:
    """See `compare`; of the tensors of a sequence the largest."""
    if not isinstance(expected, Tensor):
        pairs = zip(actual, expected, strict=True)
        return max(difference(a, e) for a, e in pairs)
    actual = actual.cpu()
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        return float("inf")
    if torch.equal(actual, expected) or not expected.numel():
        return 0.0
    a, e = actual.double(), expected.double()
    if not torch.equal(a.isnan(), e.isnan()):
        return float("inf")
    largest = e.abs().nan_to_num(0).max().item()
    return (a - e).abs().nan_to_num(0).max().item() / (largest or 1.0)


def check(device: str) -> bool:
    """Prints a row per operator; whether all are right."""
    worst: dict[tuple[str, bool], float] = {}
    for case in cases():
        key = case.name, case.exact
        worst[key] = max(worst.get(key, 0.0), compare(case, device))
    table = Table("operator", "expected", title="GPU against CPU")
    table.add_column("largest difference", justify="right")
    table.add_column("")
    right = True
    for (name, exact), found in worst.items():
        good = found <= (0.0 if exact else TOLERANCE)
        right &= good
        shown = "equal bits" if found == 0 else f"{found:.1e}"
        expected = "equal bits" if exact else f"below {TOLERANCE:.0e}"
        table.add_row(name, expected, shown, "right" if good else "WRONG")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return right


def packed_layer(
    layer: Layer, batch: int, bits: int, reordered: bool, g: torch.Generator
) -> tuple[str, tuple]:
    """Operator and arguments of a layer as `PackedModel` runs it, on the CPU, without an addition.

    reordered: as with the CUDA kernels, else on the file's order of the weights.
    """
    filters, depth = layer.out_channels, layer.in_channels * layer.kernel**2
    x = _codes((batch, layer.size, layer.size, layer.in_channels), bits, g)
    weight = _packed(filters, depth, bits, g)
    geometry = ([layer.kernel] * 2, [layer.stride] * 2, [layer.kernel // 2] * 2, [1, 1], 1, 0)
    tail = (*_parameters(filters, depth, g), None, 0.0, [0, 2**bits - 1])
    if not reordered:
        return "packed_conv2d", (x, weight, bits, filters, *geometry, *tail)
    weight = ops.reorder_weight(weight, bits, filters, depth)
    x_packed, out_packed = (bits == 4 and flag for flag in (layer.packed_in, layer.packed_out))
    x = ops.pack_codes(x) if x_packed else x
    arguments = (x, weight, bits, filters, *geometry, *tail, bits, x_packed, out_packed)
    return "reordered_conv2d", arguments


def layer_runs(layer: Layer, batch: int) -> dict[str, Run]:
    """The providers of a layer, on the GPU; torch._int_mm where it takes the shape."""
    g = torch.Generator().manual_seed(0)
    runs: dict[str, Run] = {}
    depth = layer.in_channels * layer.kernel**2
    kernel, stride, padding = [layer.kernel] * 2, [layer.stride] * 2, [layer.kernel // 2] * 2
    for bits in (4, 8):
        operator, args = packed_layer(layer, batch, bits, has_cuda_kernels(CUDA), g)
        args = [a.cuda() if isinstance(a, Tensor) else a for a in args]
        runs[f"W{bits}A{bits}"] = partial(getattr(torch.ops.fdda, operator), *args)
    rows = batch * layer.out_size**2
    a, b = torch.randn(rows, depth), torch.randn(depth, layer.out_channels)
    a, b = a.half().cuda(), b.half().cuda()
    runs["cuBLAS fp16"] = lambda: a @ b
    if rows > 16 and depth % 8 == 0 and layer.out_channels % 8 == 0:
        qa, qb = a.to(torch.int8), b.t().contiguous().to(torch.int8).t()
        runs["torch._int_mm"] = lambda: torch._int_mm(qa, qb)
    image = torch.randn(batch, layer.in_channels, layer.size, layer.size).half().cuda()
    image = image.contiguous(memory_format=torch.channels_last)
    filters = torch.randn(layer.out_channels, layer.in_channels, *kernel).half().cuda()
    filters = filters.contiguous(memory_format=torch.channels_last)
    torch._dynamo.reset()  # else the next shapes are compiled as one, of any size, or not at all
    compiled = torch.compile(
        lambda x, w: F.conv2d(x, w, None, stride, padding).relu(), dynamic=False
    )
    runs["torch.compile fp16"] = lambda: compiled(image, filters)
    return runs


def code_runs(batch: int, device: str) -> dict[str, tuple[int, Run]]:
    """Operators on codes at their sizes in ResNet-18: the bytes each must move, and how to run it.

    The first is a copy, the most that memory gives.
    """
    g = torch.Generator().manual_seed(0)
    maps, stem, last = (
        _codes((batch, size, size, channels), 8, g).to(device)
        for size, channels in ((56, 64), (112, 64), (7, 512))
    )
    image = torch.randn(batch, 3, 224, 224, generator=g).to(device)
    meaning = (0.4, 130, 0.05, -3.0)
    n, window = maps.numel(), (3, 2, 1, 1, False)
    return {
        "copy": (2 * n, maps.clone),
        "quantize": (5 * image.numel(), partial(ops.quantize, image, 30.0, 3.0, 8)),
        "requantize_codes": (2 * n, partial(ops.requantize_codes, maps, *meaning, 4)),
        "... packed": (n + n // 2, partial(ops.requantize_codes_packed, maps, *meaning, 4)),
        "max_pool2d_codes": (stem.numel() + n, partial(ops.max_pool2d_codes, stem, *window)),
        "sum_pool_codes": (last.numel() * 53 // 49, partial(ops.sum_pool_codes, last)),
        "dequantize_codes": (5 * n, partial(ops.dequantize_codes, maps, 0.4, 130)),
    }


def event_seconds(run: Run) -> float:
    """Of one call in a burst, between two events on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(BURST):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / BURST


def medians(
    runs: Mapping[str, Run], rounds: int, seconds: Callable[[Run], float]
) -> dict[str, float]:
    """Median seconds of every run: all in turn, `rounds` times, after an untimed round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            value = seconds(run)
            if turn:
                times[name].append(value)
    return {name: statistics.median(values) for name, values in times.items()}


PROVIDERS = ("W4A4", "W8A8", "cuBLAS fp16", "torch._int_mm", "torch.compile fp16")


def row(layer: str, batch: int, times: Mapping[str, float]) -> list[str]:
    """Layer, batch, microseconds of all providers, and what W4A4 is faster than the fastest other
    library by.
    """
    cells = [f"{1e6 * times[name]:.1f}" if name in times else "" for name in PROVIDERS]
    others = min(times[name] for name in PROVIDERS[2:] if name in times)
    return [layer, str(batch), *cells, f"{others / times['W4A4']:.2f}"]


def parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=11)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0; 1: a wrong result; 2: no GPU."""
    options = parser().parse_args(arguments)
    if min(options.rounds, *options.batch) < 1:
        parser().error("--rounds and --batch: expected 1 or more")
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {ops.backend_info()}")
    if not check("cuda"):
        return 1
    table = Table("layer", "batch", title="microseconds")
    for name in (*PROVIDERS, "W4A4: x faster"):
        table.add_column(name, justify="right")
    shapes = {layer._replace(name="", residual=0, out_bytes=1): layer for layer in resnet18()}
    for layer in shapes.values():
        for batch in options.batch:
            times = medians(layer_runs(layer, batch), options.rounds, event_seconds)
            table.add_row(*row(layer.name, batch, times))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    table = Table("operator on codes", "batch")
    for name in ("microseconds", "GB/s"):
        table.add_column(name, justify="right")
    for batch in options.batch:
        runs = code_runs(batch, "cuda")
        times = medians({k: run for k, (_, run) in runs.items()}, options.rounds, event_seconds)
        for name, seconds in times.items():
            rate = runs[name][0] / seconds / 1e9
            table.add_row(name, str(batch), f"{1e6 * seconds:.1f}", f"{rate:.0f}")
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
