"""The arithmetic of lowering: codes, scales, and what batch norm folds into."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..quantization.modules import ActivationQuantizer

# Up to here, float32 holds every integer.
FLOAT32_INTEGERS = 2**24


@dataclass(frozen=True)
class Codes:
    """The meaning of an activation's codes: value = (u - zero_point) / scale.

    Args:
        bits: codes are below 2**bits.
        scale: codes per unit, a float32 value.
        zero_point: the code of 0.
    """

    bits: int
    scale: float
    zero_point: int

    @property
    def paper_zero_point(self) -> float:
        """Of the paper's codes q = u - 2**(bits-1): value = (q + paper_zero_point) / scale."""
        return float(2 ** (self.bits - 1) - self.zero_point)

    def code(self, value: float) -> int:
        """The code of a value, computed as the fake quantiser does."""
        scaled = torch.tensor(self.scale, dtype=torch.float32) * value
        code = torch.round(scaled - self.paper_zero_point) + 2 ** (self.bits - 1)
        return int(code.clamp(0, 2**self.bits - 1))

    def code_range(self, clip: tuple[float, float] | None) -> tuple[int, int]:
        """The codes that values clipped to [low, high] can have."""
        if clip is None:
            return 0, 2**self.bits - 1
        return self.code(clip[0]), self.code(clip[1])


def activation_codes(name: str, quantizer: ActivationQuantizer) -> Codes:
    """Raises ValueError when no range was observed, or one that does not hold 0."""
    if quantizer.observed == 0:
        raise ValueError(f"{name}: its range was never observed; calibrate before packing")
    x_min, x_max = quantizer.x_min.float().cpu(), quantizer.x_max.float().cpu()
    if not (torch.isfinite(x_min) and torch.isfinite(x_max) and x_min <= 0 <= x_max):
        raise ValueError(
            f"{name}: its range [{x_min.item():.4g}, {x_max.item():.4g}] does not hold 0; pack "
            "needs a model prepared with placement='full_integer'"
        )
    # number / tensor would multiply by the reciprocal, which rounds twice.
    scale = x_min.new_tensor(2.0**quantizer.bits - 1) / (x_max - x_min).clamp(min=1e-8)
    zero_point = -int(torch.round(scale * x_min))
    return Codes(quantizer.bits, scale.item(), min(zero_point, 2**quantizer.bits - 1))


def weight_codes(
    name: str, layer: nn.Conv2d | nn.Linear
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers behind `layer.quantized_weight()`: weight = (q + offset) * step.

    Returns:
        q: int32 [O, K] in -2**(bits-1)..2**(bits-1)-1; a convolution's K runs over (kernel row,
            kernel column, channel of the group). offset: int64 [O]. step: float64 [O].

    Raises:
        ValueError: weights that are not finite.
    """
    weight = layer.weight.detach().float().flatten(1)
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name}: weights hold infinities or NaN")
    values = layer.quantized_weight().detach().float()
    values = (values.permute(0, 2, 3, 1) if values.ndim == 4 else values).flatten(1).double()
    low, high = weight.aminmax(dim=1)
    levels = 2**layer.weight_bits
    scale = torch.full_like(low, levels - 1) / (high - low).clamp(min=1e-8)
    step = 1 / scale.double()

    # A channel without spread has a huge scale: it is one integer times its value.
    first = values[:, 0]
    constant = (values == first[:, None]).all(dim=1)
    step = torch.where(constant, torch.where(first == 0, 1.0, first.abs()), step)
    # One with next to none needs no finer steps than those between float32 numbers.
    step = torch.maximum(step, values.abs().amax(dim=1) / FLOAT32_INTEGERS)

    integers = values.div_(step[:, None]).round_()
    low, high = (v.long() for v in integers.aminmax(dim=1))
    fits = (low >= -levels // 2) & (high < levels // 2)
    offset = torch.where(fits, 0, low + levels // 2)
    q = (integers - offset[:, None]).clamp_(-levels // 2, levels // 2 - 1)
    return q.to(torch.int32), offset, step


def epilogue(
    layer: nn.Conv2d | nn.Linear,
    norm: nn.Module | None,
    step: torch.Tensor,
    read: Codes,
    made: Codes | None,
    residual: Codes | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What turns integer sums into output codes (`made`) or, without, into floats.

    Returns:
        multiplier, bias: float32 [O], each rounded once.
    """
    gain = torch.ones_like(step)
    shift = torch.zeros_like(step) if layer.bias is None else layer.bias.detach().double()
    if norm is not None:
        gain = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            gain = gain * norm.weight.detach().double()
        shift = (shift - norm.running_mean.double()) * gain
        if norm.bias is not None:
            shift = shift + norm.bias.detach().double()
    multiplier = gain * step / read.scale
    if residual is not None:
        shift = shift - residual.zero_point / residual.scale
    if made is not None:
        multiplier = multiplier * made.scale
        shift = shift * made.scale + made.zero_point
    return multiplier.float(), shift.float()


def smallest_integers(values: torch.Tensor) -> torch.Tensor:
    """int8, int16 or int32, whichever suffices."""
    for dtype in (torch.int8, torch.int16):
        limits = torch.iinfo(dtype)
        if limits.min <= values.min() and values.max() <= limits.max:
            return values.to(dtype)
    return values.to(torch.int32)
