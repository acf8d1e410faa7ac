"""The float operations of a packed graph: what lies between quantisers, with torch's semantics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .schema import (
    Conv2dOp,
    Op,
    TensorSpec,
    ValueType,
    choice,
    flag,
    number,
    optional,
    pair,
    record,
    whole,
    wholes,
)

FLOAT32 = (torch.float32,)

UNARY = {
    "relu": F.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "elu": F.elu,
    "mish": F.mish,
    "softplus": F.softplus,
}
BINARY = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
}

Tensors = dict[str, torch.Tensor]


@record
class Unary(Op):
    function: str = choice(*UNARY)

    def run(self, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
        return UNARY[self.function](x)


@record
class Hardtanh(Op):
    low: float = number()
    high: float = number()

    def run(self, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
        return F.hardtanh(x, self.low, self.high)


@record
class LeakyRelu(Op):
    slope: float = number()

    def run(self, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(x, self.slope)


@record
class PRelu(Op):
    slopes: int = whole(1)  # one, or one for every channel

    def tensors(self) -> dict[str, TensorSpec]:
        return {"weight": TensorSpec(FLOAT32, (self.slopes,))}

    def run(self, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
        return F.prelu(x, tensors["weight"])


@record
class Softmax(Op):
    dim: int = whole(-8, 7)

    def run(self, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
        return F.softmax(x, self.dim)


@record
class LogSoftmax(Op):
    dim: int = whole(-8, 7)

    def run(self, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(x, self.dim)


@record
class Binary(Op):
    """Of two tensors, with broadcasting."""

    reads = (("float",), ("float",))
    function: str = choice(*BINARY)

    def run(self, tensors: Tensors, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return BINARY[self.function](x, y)


@record
class ExpandAs(Op):
    reads = (("float",), ("float",))

    def run(self, tensors: Tensors, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.expand_as(y)


@record
class WithScalar(Op):
    """function(x, value), or function(value, x) when `reversed`."""

    function: str = choice("add", "sub", "mul", "div")
    value: float = number()
    reversed: bool = flag()

    def run(self, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
        if self.reversed:
            # Filled on the device: a copy to it could not be captured in a CUDA graph.
            value = torch.full((), self.value, dtype=torch.float32, device=x.device)
            return BINARY[self.function](value, x)
        return BINARY[self.function](x, self.value)


@record
class Constant(Op):
    reads = ()
    shape: tuple[int, ...] = wholes(1, lengths=range(0, 8))

    def tensors(self) -> dict[str, TensorSpec]:
        return {"value": TensorSpec(FLOAT32, self.shape)}

    def run(self, tensors: Tensors) -> torch.Tensor:
        return tensors["value"]


@record
class BatchNorm(Op):
    channels: int = whole(1)
    eps: float = number()

    def tensors(self) -> dict[str, TensorSpec]:
        spec = TensorSpec(FLOAT32, (self.channels,))
        return dict.fromkeys(("running_mean", "running_var", "weight", "bias"), spec)

    def run(self, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, **tensors, eps=self.eps)


@record
class Cat(Op):
    dim: int = whole(-8, 7)

    def result(self, inputs: Sequence[ValueType]) -> ValueType:
        self.expect(inputs, (("float",),) * max(len(inputs), 1))
        return ValueType("float")

    def run(self, tensors: Tensors, *inputs: torch.Tensor) -> torch.Tensor:
        return torch.cat(inputs, self.dim)


@record
class Chunk(Op):
    makes = "floats"
    chunks: int = whole(1, 4096)
    dim: int = whole(-8, 7)

    def run(self, tensors: Tensors, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.chunk(x, self.chunks, self.dim)


@record
class Split(Op):
    """Into pieces of the given sizes."""

    makes = "floats"
    sizes: tuple[int, ...] = wholes(0, lengths=range(1, 4097))
    dim: int = whole(-8, 7)

    def run(self, tensors: Tensors, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.split(x, list(self.sizes), self.dim)


@record
class Item(Op):
    reads = (("floats",),)
    index: int = whole(-4096, 4095)

    def run(self, tensors: Tensors, x: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return x[self.index]


@record
class Permute(Op):
    dims: tuple[int, ...] = wholes(-8, 7, lengths=range(1, 9))

    def run(self, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
        return x.permute(self.dims)


@record
class Mean(Op):
    dims: tuple[int, ...] = wholes(-8, 7, lengths=range(1, 9))
    keepdim: bool = flag()

    def run(self, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
        return x.mean(self.dims, self.keepdim)


@record
class AvgPool2d(Op):
    kernel_size: tuple[int, int] = pair(1)
    stride: tuple[int, int] = pair(1)
    padding: tuple[int, int] = pair(0)
    ceil_mode: bool = flag()
    count_include_pad: bool = flag()
    divisor_override: int | None = optional(whole(1))

    def run(self, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x, *self.attributes().values())


@record
class AdaptiveAvgPool2d(Op):
    height: int | None = optional(whole(1, 4096))
    width: int | None = optional(whole(1, 4096))

    def run(self, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(x, (self.height, self.width))


@record
class AdaptiveMaxPool2d(Op):
    height: int | None = optional(whole(1, 4096))
    width: int | None = optional(whole(1, 4096))

    def run(self, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
        return F.adaptive_max_pool2d(x, (self.height, self.width))


@record
class FloatConv2d(Conv2dOp):
    """A layer kept in float."""

    def tensors(self) -> dict[str, TensorSpec]:
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        return {
            "weight": TensorSpec(FLOAT32, shape),
            "bias": TensorSpec(FLOAT32, (self.out_channels,)),
        }

    def run(self, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return F.conv2d(x, tensors["weight"], tensors["bias"], *geometry)


@record
class FloatLinear(Op):
    """A layer kept in float."""

    in_features: int = whole(1)
    out_features: int = whole(1)

    def tensors(self) -> dict[str, TensorSpec]:
        return {
            "weight": TensorSpec(FLOAT32, (self.out_features, self.in_features)),
            "bias": TensorSpec(FLOAT32, (self.out_features,)),
        }

    def macs(self, output_shape: Sequence[int]) -> int:
        return torch.Size(output_shape).numel() * self.in_features

    def run(self, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, tensors["weight"], tensors["bias"])
