"""Fake-quantised layers: what preparation puts in the place of conv, linear, activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from .ranges import histogram, of_least_error, of_percentile


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


def own_parameters(model: nn.Module) -> None:
    """Gives each module parameters of its own, to be learned, however shared or frozen they are."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))


class ActivationQuantizer(nn.Module):
    """Per-tensor fake quantisation of an activation.

    `mode` says what a forward does: "quantize"; "observe", which first moves the range by an
    exponential moving average of the batch's min and max with factor `MOMENTUM`; "measure", which
    passes x on unchanged and adds its histogram over the range to what `shrink_range` reads.

    Args:
        bits: 2..8.
        include_zero: widen the range to hold 0, so that zero padding is exact in integers.
        from_zero: start the moving average from 0 (the paper's way) instead of the first batch.

    Attributes:
        x_min, x_max: the range, float32 scalars. observed: batches seen, int64 scalar.
        log_range: logarithm of a factor on both ends. Where it requires a gradient, the range is
            being learned, and clipped values pass none on; else the gradient of x is the identity.
    """

    MOMENTUM = 0.9

    def __init__(self, bits: int, *, include_zero: bool, from_zero: bool) -> None:
        super().__init__()
        self.bits = bits
        self.include_zero = include_zero
        self.from_zero = from_zero
        self.mode = "quantize"
        self.register_buffer("x_min", torch.zeros(()))
        self.register_buffer("x_max", torch.zeros(()))
        self.register_buffer("observed", torch.zeros((), dtype=torch.int64))
        self.log_range = nn.Parameter(torch.zeros(()), requires_grad=False)
        self._histogram: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mode == "measure":
            self._measure(x)
            return x
        if self.mode == "observe":
            self._observe(x)
        x_min, x_max, ste = self.range()
        return ops.fake_quantize_range(x, x_min, x_max, self.bits, ste=ste)

    def range(self) -> tuple[torch.Tensor, torch.Tensor, str]:
        """Both ends, with a gradient where they are learned, and the straight-through gradient."""
        if not self.log_range.requires_grad:
            return self.x_min, self.x_max, "identity"
        factor = self.log_range.exp()
        return self.x_min * factor, self.x_max * factor, "clipped"

    @torch.no_grad()
    def _observe(self, x: torch.Tensor) -> None:
        keep = self.MOMENTUM if self.from_zero or self.observed > 0 else 0.0
        x_min, x_max = ops.observe_range(x, self.x_min, self.x_max, keep, self.include_zero)
        self.x_min.copy_(x_min)
        self.x_max.copy_(x_max)
        self.observed += 1

    @torch.no_grad()
    def _measure(self, x: torch.Tensor) -> None:
        x_min, x_max = self.x_min.item(), self.x_max.item()
        if x_min < x_max:
            counts = histogram(x, x_min, x_max)
            self._histogram = counts if self._histogram is None else self._histogram + counts

    def keep_learned_range(self) -> None:
        """Ends the learning of the range."""
        self.log_range.requires_grad_(False)
        self.x_min *= self.log_range.exp()
        self.x_max *= self.log_range.exp()
        self.log_range.zero_()

    @torch.no_grad()
    def shrink_range(self, percentile: float | None = None) -> None:
        """Narrows the range to what was measured, and forgets it.

        Args:
            percentile: the ends become the percentiles 100 - p and p (and hold 0 where they must);
                None: those of `ranges.SHRINKS` that make the least squared error.
        """
        counts, self._histogram = self._histogram, None
        if counts is None:
            return
        if percentile is None:
            low, high = of_least_error(counts, self.x_min, self.x_max, self.bits)
        else:
            low, high = of_percentile(counts, self.x_min, self.x_max, percentile)
            if self.include_zero:
                low, high = low.clamp(max=0), high.clamp(min=0)
        self.x_min.copy_(low)
        self.x_max.copy_(high)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, range=[{self.x_min.item():.4g}, {self.x_max.item():.4g}]"


def activation_quantizers(model: nn.Module) -> list[ActivationQuantizer]:
    return [m for m in model.modules() if isinstance(m, ActivationQuantizer)]


@contextmanager
def quantizer_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """Sets the mode of every ActivationQuantizer of `model` for the length of the block."""
    quantizers = activation_quantizers(model)
    for quantizer in quantizers:
        quantizer.mode = mode
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.mode = "quantize"


@torch.no_grad()
def take_ranges(
    network: nn.Module, batches: Sequence[torch.Tensor], ranges: str, percentile: float
) -> None:
    """Takes the activation ranges of a network from what it reads.

    Args:
        ranges: `mse`, `percentile` or another name, with which they are not shrunk.
        percentile: 50..100.
    """
    with quantizer_mode(network, "observe"):
        for batch in batches:
            network(batch)
    if ranges not in ("mse", "percentile"):
        return
    with quantizer_mode(network, "measure"):
        for batch in batches:
            network(batch)
    for quantizer in activation_quantizers(network):
        quantizer.shrink_range(percentile if ranges == "percentile" else None)
