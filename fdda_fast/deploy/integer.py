"""The integer operations of a packed graph, and the steps into and out of codes.

A code u in 0..2**bits - 1 stands for the value (u - zero_point) / scale. 4-d codes are NHWC.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .. import ops
from ..quantization.bits import MAX_BITS, MIN_BITS
from .schema import (
    MAX_EXTENT,
    Conv2dOp,
    Op,
    TensorSpec,
    ValueType,
    flag,
    number,
    optional,
    pair,
    record,
    whole,
    wholes,
)

MAX_CODE = 2**MAX_BITS - 1
# The kernels add up products of 8-bit numbers in int32.
MAX_DEPTH = (2**31 - 1) // (MAX_CODE * 128)
# fold.weight_codes makes none beyond 2**24 + 128.
MAX_OFFSET = 1 << 25
OFFSET_DTYPES = (torch.int8, torch.int16, torch.int32)


class Sums(NamedTuple):
    """total: int32 [N, C], codes summed over the image; count: pixels in it."""

    total: torch.Tensor
    count: int


class PackedCodes(NamedTuple):
    """data: `ops.pack_codes` of codes [N, H, W, C]. The attributes are those of the codes."""

    data: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.data.shape[:3], self.data.shape[3] * 2))

    @property
    def ndim(self) -> int:
        return self.data.ndim


def to_nhwc(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1) if x.ndim == 4 else x


def to_nchw(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2) if x.ndim == 4 else x


@record
class Quantize(Op):
    """float -> codes clamp(rne(scale*x - zero_point)) + 2**(bits-1): the paper's zero point."""

    scale: float = number()
    zero_point: float = number()
    bits: int = whole(MIN_BITS, MAX_BITS)

    def result(self, inputs: Sequence[ValueType]) -> ValueType:
        self.expect(inputs, self.reads)
        return ValueType("codes", self.bits)

    def run(self, tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        if x.ndim in (2, 4):
            return ops.quantize(x, self.scale, self.zero_point, self.bits)
        flat = x.reshape(x.shape[0], -1)
        return ops.quantize(flat, self.scale, self.zero_point, self.bits).reshape(x.shape)


@record
class Dequantize(Op):
    """codes -> float, with the rounding of the fake-quantised network."""

    reads = (("codes",),)
    scale: float = number()
    zero_point: int = whole(0, MAX_CODE)

    def run(self, tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return to_nchw(ops.dequantize_codes(x, self.scale, self.zero_point))


@record
class Requantize(Op):
    """Codes of one width or scale -> codes of another, see `ops.requantize_codes`."""

    reads = (("codes",),)
    x_scale: float = number()
    x_zero_point: int = whole(0, MAX_CODE)
    scale: float = number()
    zero_point: float = number()
    bits: int = whole(MIN_BITS, MAX_BITS)

    def check(self) -> None:
        if self.x_scale <= 0:
            raise ValueError(f"Requantize.x_scale: expected > 0, got {self.x_scale}")

    def result(self, inputs: Sequence[ValueType]) -> ValueType:
        self.expect(inputs, self.reads)
        return ValueType("codes", self.bits)

    def run(
        self,
        tensors: dict[str, torch.Tensor],
        x: torch.Tensor,
        operator: Callable[..., torch.Tensor] | None = None,
    ) -> torch.Tensor:
        return (operator or ops.requantize_codes)(
            x, self.x_scale, self.x_zero_point, self.scale, self.zero_point, self.bits
        )


@record
class SumPool(Op):
    """Global pooling without the division: codes [N, H, W, C] -> sums [N, C]."""

    reads = (("codes",),)

    def result(self, inputs: Sequence[ValueType]) -> ValueType:
        self.expect(inputs, self.reads)
        return ValueType("sums", inputs[0].bits)

    def run(self, tensors: dict[str, torch.Tensor], x: torch.Tensor) -> Sums:
        if x.ndim != 4:
            raise ValueError(f"expected codes [N, H, W, C], got {tuple(x.shape)}")
        count = x.shape[1] * x.shape[2]
        if count * MAX_CODE >= 2**31:
            raise ValueError(f"pooling over {x.shape[1]} x {x.shape[2]} pixels overflows int32")
        return Sums(ops.sum_pool_codes(x), count)


@record
class DequantizeSums(Op):
    """sums -> the mean as float, [N, C, 1, 1] (`spatial`) or [N, C]."""

    reads = (("sums",),)
    scale: float = number()
    zero_point: int = whole(0, MAX_CODE)
    spatial: bool = flag()

    def run(self, tensors: dict[str, torch.Tensor], x: Sums) -> torch.Tensor:
        mean = ops.dequantize_sums(x.total, x.count, self.scale, self.zero_point)
        return mean[:, :, None, None] if self.spatial else mean


class _Moves(Op):
    """Base of what makes codes of codes, with the same meaning, and floats of floats."""

    reads = (("codes", "float"),)

    def result(self, inputs: Sequence[ValueType]) -> ValueType:
        self.expect(inputs, self.reads)
        return inputs[0]


@record
class MaxPool2d(_Moves):
    """Of codes or floats."""

    kernel_size: tuple[int, int] = pair(1)
    stride: tuple[int, int] = pair(1)
    padding: tuple[int, int] = pair(0)
    dilation: tuple[int, int] = pair(1)
    ceil_mode: bool = flag()

    def check(self) -> None:
        if any(2 * p > k for p, k in zip(self.padding, self.kernel_size, strict=True)):
            raise ValueError("MaxPool2d.padding: more than half the kernel")

    def run(self, tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        arguments = (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
        pool = ops.max_pool2d_codes if x.dtype == torch.uint8 else F.max_pool2d
        return pool(x, *arguments)


@record
class Reshape(_Moves):
    """Of codes or floats, as if they were NCHW.

    shape: all but the batch dimension, -1 at most once.
    """

    shape: tuple[int, ...] = wholes(-1, lengths=range(1, 8))

    def check(self) -> None:
        if self.shape.count(-1) > 1:
            raise ValueError(f"Reshape.shape: more than one -1 in {self.shape}")

    def run(self, tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return _as_nchw(x, lambda x: x.reshape(x.shape[0], *self.shape))


@record
class Slice(_Moves):
    """Of codes or floats, as if they were NCHW.

    begin, end, step: of Python's slices, one for every dimension behind the batch.
    """

    begin: tuple[int, ...] = wholes(-MAX_EXTENT, lengths=range(1, 8))
    end: tuple[int, ...] = wholes(-MAX_EXTENT, lengths=range(1, 8))
    step: tuple[int, ...] = wholes(1, lengths=range(1, 8))

    def check(self) -> None:
        if not len(self.begin) == len(self.end) == len(self.step):
            raise ValueError("Slice: begin, end and step differ in length")

    def run(self, tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        index = map(slice, self.begin, self.end, self.step)
        return _as_nchw(x, lambda x: x[(slice(None), *index)])


@record
class Pad(_Moves):
    """Of codes or floats, as if they were NCHW, by a constant.

    before, after: how many, one for every dimension behind the batch. value: a code where codes are
    padded.
    """

    before: tuple[int, ...] = wholes(0, 1024, lengths=range(1, 8))
    after: tuple[int, ...] = wholes(0, 1024, lengths=range(1, 8))
    value: float = number()

    def check(self) -> None:
        if len(self.before) != len(self.after):
            raise ValueError("Pad: before and after differ in length")

    def result(self, inputs: Sequence[ValueType]) -> ValueType:
        made = super().result(inputs)
        if made.kind == "codes" and self.value not in range(2**made.bits):
            raise ValueError(f"pads codes of {made.bits} bits with {self.value}")
        return made

    def run(self, tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        pairs = zip(reversed(self.before), reversed(self.after), strict=True)
        return _as_nchw(
            x, lambda x: F.pad(x, [n for pair in pairs for n in pair], value=self.value)
        )


def _as_nchw(x: torch.Tensor, run: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """run(x), of floats and of codes alike."""
    return to_nhwc(run(to_nchw(x))).contiguous() if x.dtype == torch.uint8 else run(x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Packed(Op):
    """Common to layers on packed weights: what happens behind the integer sums.

    v = sum * multiplier + bias [+ residual * residual_scale]; the output is v itself or, given
    output_bits, the code clamp(rne(v), *output_range).

    Tensors: weight, packed bit planes; weight_offset [O], added to the codes of a channel's
    weights; multiplier, bias, float32 [O].

    `run` may be given another operator on codes than that of packed weights, see `reordered`.
    """

    weight_bits: int = whole(MIN_BITS, MAX_BITS)
    x_zero_point: int = whole(0, MAX_CODE)
    residual_scale: float | None = optional(number())
    output_bits: int | None = optional(whole(MIN_BITS, MAX_BITS))
    output_range: tuple[int, int] | None = optional(pair(0, MAX_CODE))

    def rows_and_depth(self) -> tuple[int, int]:
        """Outputs, and weights per output."""
        raise NotImplementedError

    def check(self) -> None:
        name = type(self).__name__
        if (self.output_bits is None) != (self.output_range is None):
            raise ValueError(f"{name}.output_range: expected with output_bits, and only then")
        if self.output_range is not None:
            low, high = self.output_range
            if not low <= high < 2**self.output_bits:
                raise ValueError(f"{name}.output_range: {self.output_range} is out of bounds")
        depth = self.rows_and_depth()[1]
        if depth > MAX_DEPTH:
            raise ValueError(
                f"{name}: {depth} weights per output could overflow int32, at most {MAX_DEPTH} fit"
            )

    def tensors(self) -> dict[str, TensorSpec]:
        rows, depth = self.rows_and_depth()
        packed = (math.ceil(rows / 16), math.ceil(depth / 4), self.weight_bits, 8)
        return {
            "weight": TensorSpec((torch.uint8,), packed),
            "weight_offset": TensorSpec(OFFSET_DTYPES, (rows,)),
            "multiplier": TensorSpec((torch.float32,), (rows,)),
            "bias": TensorSpec((torch.float32,), (rows,)),
        }

    def result(self, inputs: Sequence[ValueType]) -> ValueType:
        residual = self.residual_scale is not None
        self.expect(inputs, (*self.reads, ("codes", "float"))[: 2 if residual else 1])
        if self.output_bits is None:
            return ValueType("float")
        return ValueType("codes", self.output_bits)


@record
class PackedConv2d(Conv2dOp, _Packed):
    reads = (("codes",),)

    def rows_and_depth(self) -> tuple[int, int]:
        return self.out_channels, self.depth

    def run(
        self,
        tensors: dict[str, torch.Tensor],
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        operator: Callable[..., torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if x.ndim != 4 or x.shape[3] != self.in_channels:
            raise ValueError(
                f"expected codes with {self.in_channels} channels, got shape "
                f"{tuple(to_nchw(x).shape)}"
            )
        if residual is not None and residual.dtype != torch.uint8:
            residual = to_nhwc(residual).contiguous()
        y = (operator or ops.packed_conv2d)(
            x,
            tensors["weight"],
            self.weight_bits,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.x_zero_point,
            tensors["weight_offset"],
            tensors["multiplier"],
            tensors["bias"],
            residual,
            self.residual_scale or 0.0,
            self.output_range,
        )
        return y if self.output_bits is not None else to_nchw(y)


@record
class PackedLinear(_Packed):
    reads = (("codes", "sums"),)
    in_features: int = whole(1)
    out_features: int = whole(1)

    def rows_and_depth(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def macs(self, output_shape: Sequence[int]) -> int:
        return math.prod(output_shape) * self.in_features

    def run(
        self,
        tensors: dict[str, torch.Tensor],
        x: torch.Tensor | Sums,
        residual: torch.Tensor | None = None,
        operator: Callable[..., torch.Tensor] | None = None,
    ) -> torch.Tensor:
        zero_point, multiplier = self.x_zero_point, tensors["multiplier"]
        if isinstance(x, Sums):
            # Sums of codes are the codes of the mean, `count` times finer.
            x, count = x
            zero_point *= count
            # Not by a number: GPUs multiply by its inverse.
            multiplier = multiplier / torch.full_like(multiplier, count)
            self._check_sums(count)
        if x.ndim != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"expected [N, {self.in_features}] codes, got shape {tuple(x.shape)}")
        return (operator or ops.packed_linear)(
            x,
            tensors["weight"],
            self.weight_bits,
            self.out_features,
            zero_point,
            tensors["weight_offset"],
            multiplier,
            tensors["bias"],
            residual,
            self.residual_scale or 0.0,
            self.output_range,
        )

    def _check_sums(self, count: int) -> None:
        if count * MAX_CODE * self.in_features * MAX_OFFSET >= 2**62:
            raise ValueError(f"sums over {count} pixels could overflow int64")


def domain(op: Op, inputs: Sequence[ValueType]) -> str:
    """Where the operation computes: `integer`, `float`, or `convert`, from one to the other."""
    if isinstance(op, Quantize | Dequantize | DequantizeSums):
        return "convert"
    return "integer" if inputs and inputs[0].kind in ("codes", "sums") else "float"


def weight_bits(op: Op) -> int | None:
    return op.weight_bits if isinstance(op, _Packed) else None
