"""Ends of a quantiser's range, searched on a histogram of the values."""

from __future__ import annotations

import torch

from .. import ops

# Of an end of the range, tried in search of the least squared error.
SHRINKS = tuple(i / 20 for i in range(20, 4, -1))
# A sixteenth of a step of 7 bits; where 8 bits are, min and max are as good as anything.
BINS = 2048


def histogram(x: torch.Tensor, x_min: float, x_max: float) -> torch.Tensor:
    """How many values are nearest to each of `BINS` points that divide x_min .. x_max evenly.

    Values outside count at the ends.

    Args:
        x: floats of any shape. x_min < x_max.

    Returns:
        float64 [BINS].
    """
    half = (x_max - x_min) / (BINS - 1) / 2
    counts = torch.histc(x.float().clamp(x_min, x_max), BINS, x_min - half, x_max + half)
    return counts.double()


def of_least_error(
    counts: torch.Tensor, x_min: torch.Tensor, x_max: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both ends, each shrunk by one of `SHRINKS`: those that round with the least squared error.

    Args:
        counts: from `histogram` of that range.
        x_min, x_max: float32 scalars.
    """
    shrinks = torch.tensor(SHRINKS, device=x_min.device)
    low, high = torch.cartesian_prod(shrinks if x_min != 0 else shrinks[:1], shrinks).unbind(1)
    low, high = low * x_min, high * x_max
    points = _points(x_min, x_max).expand(len(low), BINS)
    rounded = ops.fake_quantize_range(points.contiguous(), low, high, bits, axis=0)
    best = ((rounded - points).double().square() @ counts).argmin()
    return low[best], high[best]


def of_percentile(
    counts: torch.Tensor, x_min: torch.Tensor, x_max: torch.Tensor, percentile: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The percentiles 100 - p and p of the values, to a distance of two points.

    Args:
        counts, x_min, x_max: as in `of_least_error`. percentile: p, 50..100.
    """
    points, share = _points(x_min, x_max), counts.cumsum(0) / counts.sum()
    p = percentile / 100
    ends = torch.tensor([1 - p, p], dtype=share.dtype, device=share.device)
    # Rounding must not carry the last of them past the end.
    low, high = points[torch.searchsorted(share, ends).clamp(max=BINS - 1)]
    return low, high


def _points(x_min: torch.Tensor, x_max: torch.Tensor) -> torch.Tensor:
    return torch.lerp(x_min, x_max, torch.linspace(0, 1, BINS, device=x_min.device))
