"""Single layers on low-bit weights against PyTorch's 8-bit ones, all with prepacked weights.

Every layer reads and writes 8-bit storage and rescales by channel; torch._int_mm alone gives int32.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from timing import Run, bursts

from fdda_fast import ops

OURS = "fdda-fast"
SHAPES = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels, size: of ResNet-18 at 224 px
FEATURES = 4096
SCALE = 0.01  # of inputs, weights and outputs: no speed depends on it

warnings.filterwarnings("ignore", "torch.quantize_per_tensor")  # deprecated, like its peers


class Case(NamedTuple):
    """One layer. largest: code that all can give, our narrower outputs end there."""

    name: str
    macs: float
    largest: int
    runs: Mapping[str, Run]

    def check(self) -> None:
        """Raises RuntimeError if codes differ by more than what rounding may explain."""
        expected = _codes(self.runs[OURS]()).clamp(max=self.largest)
        for name, run in self.runs.items():
            y = run()
            if y.dtype == torch.int32:
                continue  # sums, not rescaled
            difference = (_codes(y).clamp(max=self.largest) - expected).abs().max()
            if difference > 1:
                raise RuntimeError(f"{self.name}: {name} differs by {difference}")


def _codes(y: torch.Tensor) -> torch.Tensor:
    return (y.int_repr() if y.is_quantized else y).int()


def report_convolutions(console: Console, args: argparse.Namespace) -> None:
    title = "3x3 convolutions, stride 1, W4A4, against 8 bits"
    _report(console, args, title, lambda: (_convolution(*s, n) for s in SHAPES for n in args.batch))


def report_products(console: Console, args: argparse.Namespace) -> None:
    title = f"matrix products, N = K = {FEATURES}, W4A8, against 8 bits"
    _report(console, args, title, lambda: (_product(rows) for rows in args.rows))


@torch.inference_mode()
def _report(console: Console, args: argparse.Namespace, title: str, cases) -> None:
    for threads in args.threads:
        torch.set_num_threads(threads)
        table = None
        for case in cases():
            case.check()
            seconds = bursts(case.runs, args.rounds, args.clock)
            if table is None:
                table = Table(title=f"{title}, {threads} thread(s)")
                table.add_column("ms", no_wrap=True)
                for name in seconds:
                    table.add_column(name, justify="right", no_wrap=True)
                for column in ("x best peer", "GMAC/s", "best peer's"):
                    table.add_column(column, justify="right")
            ours = seconds[OURS]
            best = min(value for name, value in seconds.items() if name != OURS)
            table.add_row(
                case.name,
                *(f"{1e3 * value:.3f}" for value in seconds.values()),
                f"{best / ours:.2f}",
                f"{case.macs / ours / 1e9:.0f}",
                f"{case.macs / best / 1e9:.0f}",
            )
        console.print(table)


def _epilogue(channels: int) -> tuple[torch.Tensor, ...]:
    """weight_offset, multiplier, bias."""
    offset = torch.zeros(channels, dtype=torch.int64)
    return offset, torch.full((channels,), SCALE), torch.zeros(channels)


def _convolution(channels: int, size: int, batch: int) -> Case:
    codes = torch.randint(0, 16, (batch, size, size, channels), dtype=torch.uint8)
    q = torch.randint(-7, 8, (channels, channels, 3, 3), dtype=torch.int8)
    weight = ops.pack_weight(q.permute(0, 2, 3, 1).reshape(channels, -1), 4)
    epilogue = _epilogue(channels)

    def ours() -> torch.Tensor:
        geometry = 3, 1, 1, 1, 1, 0  # kernel, stride, padding, dilation, groups, zero point
        y = ops.packed_conv2d(
            codes, weight, 4, channels, *geometry, *epilogue, output_range=(0, 15)
        )
        return y.permute(0, 3, 1, 2)

    nchw = codes.permute(0, 3, 1, 2)  # channels_last
    runs = {OURS: ours, "qconv_pointwise": _qconv_pointwise(nchw, q)}
    runs |= dict(_quantized_convolutions(nchw, q))
    return Case(f"{channels} at {size}, batch {batch}", 9 * channels**2 * size**2 * batch, 15, runs)


def _qconv_pointwise(x: torch.Tensor, q: torch.Tensor) -> Run:
    """What torch.compile runs, on oneDNN."""
    onednn = torch.ops.onednn
    scales = torch.full((len(q),), SCALE)
    zero_points, bias = torch.zeros(len(q), dtype=torch.int64), torch.zeros(len(q))
    geometry = [1, 1], [1, 1], [1, 1], 1
    packed = onednn.qconv_prepack(q, scales, SCALE, 0, *geometry, list(x.shape))
    output = SCALE, 0, torch.uint8, "none", [], ""
    return lambda: onednn.qconv2d_pointwise(
        x, SCALE, 0, packed, scales, zero_points, bias, *geometry, *output
    )


def _quantized_weight(q: torch.Tensor) -> torch.Tensor:
    zero_points = torch.zeros(len(q), dtype=torch.int64)
    return torch._make_per_channel_quantized_tensor(
        q, torch.full((len(q),), SCALE), zero_points, axis=0
    )


def _engines(*names: str) -> Iterator[str]:
    """Those that this PyTorch has, each made the one that packs weights."""
    for name in names:
        if name in torch.backends.quantized.supported_engines:
            torch.backends.quantized.engine = name
            yield name


def _quantized_convolutions(x: torch.Tensor, q: torch.Tensor) -> Iterator[tuple[str, Run]]:
    x = torch._make_per_tensor_quantized_tensor(x, SCALE, 0)
    for engine in _engines("onednn", "fbgemm"):
        packed = torch.ops.quantized.conv2d_prepack(
            _quantized_weight(q), torch.zeros(len(q)), [1, 1], [1, 1], [1, 1], 1
        )
        yield engine, lambda p=packed: torch.ops.quantized.conv2d(x, p, SCALE, 0)


def _product(rows: int) -> Case:
    codes = torch.randint(0, 256, (rows, FEATURES), dtype=torch.uint8)
    q = torch.randint(-7, 8, (FEATURES, FEATURES), dtype=torch.int8)
    weight, epilogue = ops.pack_weight(q, 4), _epilogue(FEATURES)
    signed, transposed = codes.to(torch.int8), q.T
    runs = {
        OURS: lambda: ops.packed_linear(
            codes, weight, 4, FEATURES, 0, *epilogue, output_range=(0, 255)
        ),
        "qlinear_pointwise": _qlinear_pointwise(codes, q),
        **dict(_quantized_linears(codes, q)),
        "_int_mm": lambda: torch._int_mm(signed, transposed),
    }
    return Case(f"M = {rows}", rows * FEATURES**2, 255, runs)


def _qlinear_pointwise(x: torch.Tensor, q: torch.Tensor) -> Run:
    """What torch.compile runs, on oneDNN."""
    onednn = torch.ops.onednn
    scales = torch.full((len(q),), SCALE)
    zero_points, bias = torch.zeros(len(q), dtype=torch.int64), torch.zeros(len(q))
    packed = onednn.qlinear_prepack(q, list(x.shape))
    output = SCALE, 0, torch.uint8, "none", [], ""
    return lambda: onednn.qlinear_pointwise(x, SCALE, 0, packed, scales, zero_points, bias, *output)


def _quantized_linears(x: torch.Tensor, q: torch.Tensor) -> Iterator[tuple[str, Run]]:
    x = torch._make_per_tensor_quantized_tensor(x, SCALE, 0)
    for engine in _engines("onednn", "x86", "fbgemm"):
        packed = torch.ops.quantized.linear_prepack(_quantized_weight(q), torch.zeros(len(q)))
        yield engine, lambda p=packed: torch.ops.quantized.linear(x, p, SCALE, 0)
