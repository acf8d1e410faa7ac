"""Fake-quantised layers: what preparation puts in the place of conv, linear, activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops


class QuantConv2d(nn.Conv2d):
    """Conv2d whose weight is fake-quantised per output channel at every forward.

    The range is the min and max of the current weights (method of the FDDA paper, asymmetric).
    """

    weight_bits: int

    def quantized_weight(self) -> torch.Tensor:
        return ops.fake_quantize_minmax(self.weight, self.weight_bits, axis=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.quantized_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight_bits={self.weight_bits}"


class QuantLinear(nn.Linear):
    """Linear whose weight is fake-quantised per output feature at every forward."""

    weight_bits: int

    def quantized_weight(self) -> torch.Tensor:
        return ops.fake_quantize_minmax(self.weight, self.weight_bits, axis=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.quantized_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight_bits={self.weight_bits}"


def quantized_layer(layer: nn.Conv2d | nn.Linear, bits: int) -> QuantConv2d | QuantLinear:
    """A fake-quantised layer that takes over `layer`'s parameters and settings."""
    cls = QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear
    quantized = cls.__new__(cls)
    quantized.__dict__.update(layer.__dict__)
    quantized.weight_bits = bits
    return quantized


class ActivationQuantizer(nn.Module):
    """Per-tensor fake quantisation of an activation.

    While `observing`, every forward moves the range: an exponential moving average of the
    batch's min and max with factor `MOMENTUM`. It starts from zero (`from_zero`, the paper's
    way) or from the first batch seen.

    Args:
        bits: 2..8.
        include_zero: widen the range to hold 0, so that zero padding is exact in integers.
        from_zero: start the moving average from 0 instead of the first batch.

    Attributes:
        x_min, x_max: the range, float32 scalars. observed: batches seen, int64 scalar.
        observing: whether forward moves the range.
    """

    MOMENTUM = 0.9

    def __init__(self, bits: int, *, include_zero: bool, from_zero: bool) -> None:
        super().__init__()
        self.bits = bits
        self.include_zero = include_zero
        self.from_zero = from_zero
        self.observing = False
        self.register_buffer("x_min", torch.zeros(()))
        self.register_buffer("x_max", torch.zeros(()))
        self.register_buffer("observed", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def observe(self, x: torch.Tensor) -> None:
        x_min, x_max = torch.aminmax(x.detach())
        if self.include_zero:
            x_min, x_max = x_min.clamp(max=0), x_max.clamp(min=0)
        keep = self.MOMENTUM if self.from_zero or self.observed > 0 else 0.0
        self.x_min.mul_(keep).add_(x_min.float(), alpha=1 - keep)
        self.x_max.mul_(keep).add_(x_max.float(), alpha=1 - keep)
        self.observed += 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.observing:
            self.observe(x)
        return ops.fake_quantize_range(x, self.x_min, self.x_max, self.bits)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, range=[{self.x_min.item():.4g}, {self.x_max.item():.4g}]"


def set_observing(model: nn.Module, observing: bool) -> None:
    """Starts or stops range updates in every ActivationQuantizer of `model`."""
    for module in model.modules():
        if isinstance(module, ActivationQuantizer):
            module.observing = observing
