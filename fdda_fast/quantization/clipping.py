"""Weight clipping: ranges that waste no level on a single large weight."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from .. import ops
from .modules import QuantConv2d, QuantLinear
from .ranges import SHRINKS

# With 4 levels, min and max take two that hardly any weight needs. From 3 bits on, clipping lowers
# the weights' error, too, but no longer the network's once it is fine-tuned.
_NARROW = 2
# torch.quantile takes no more numbers at once.
_QUANTILE_NUMBERS = 1 << 24


@torch.no_grad()
def clip_weights(student: nn.Module, method: str = "auto", percentile: float = 99.9) -> None:
    """Clips every output channel of the weights to a range of its own.

    Args:
        student: from `prepare`; its weights change.
        method: `mse`: min and max shrink, each by one of `ranges.SHRINKS`, to the least squared
            error; `auto`: this for 2-bit weights, nothing for wider ones; `percentile`: to the
            percentiles 100 - p and p, interpolated between weights; `minmax`: nothing.
        percentile: p, 50..100.
    """
    for layer in student.modules():
        if not isinstance(layer, QuantConv2d | QuantLinear):
            continue
        if method == "percentile":
            layer.weight.copy_(_within_percentiles(layer.weight, percentile))
        elif method == "mse" or (method == "auto" and layer.weight_bits <= _NARROW):
            layer.weight.copy_(_clipped(layer.weight, layer.weight_bits))


def _within_percentiles(weight: torch.Tensor, percentile: float) -> torch.Tensor:
    rows = weight.flatten(1)
    ends = rows.new_tensor([1 - percentile / 100, percentile / 100])
    parts = rows.split(max(1, _QUANTILE_NUMBERS // rows.shape[1]))
    low, high = torch.cat([torch.quantile(part, ends, dim=1) for part in parts], dim=1)
    return rows.clamp(low[:, None], high[:, None]).view_as(weight)


def _clipped(weight: torch.Tensor, bits: int) -> torch.Tensor:
    rows = weight.flatten(1)
    low, high = rows.aminmax(dim=1, keepdim=True)
    best = rows.clone()
    least = torch.full_like(low, torch.inf)
    for a, b in itertools.product(SHRINKS, SHRINKS):
        clipped = rows.clamp(a * low, b * high)
        error = (ops.fake_quantize_minmax(clipped, bits, axis=0) - rows).square().sum(1, True)
        better = error < least
        best, least = torch.where(better, clipped, best), torch.where(better, error, least)
    return best.view_as(weight)
