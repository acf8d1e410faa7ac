"""Weight clipping: ranges that waste no level on a single large weight."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from .. import ops
from .modules import SHRINKS, QuantConv2d, QuantLinear

# With 4 levels, min and max take two that hardly any weight needs. From 3 bits on, clipping lowers
# the weights' error, too, but no longer the network's once it is fine-tuned.
_WIDEST = 2


@torch.no_grad()
def clip_weights(student: nn.Module) -> None:
    """Clips every output channel of the 2-bit weights to its range of least squared error.

    Min and max shrink independently, each by one of `SHRINKS`.

    Args:
        student: from `prepare`; its weights change.
    """
    for layer in student.modules():
        if isinstance(layer, QuantConv2d | QuantLinear) and layer.weight_bits <= _WIDEST:
            layer.weight.copy_(_clipped(layer.weight, layer.weight_bits))


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
