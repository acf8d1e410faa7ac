"""Shapes and layouts that the reference operators share."""

from __future__ import annotations

import torch
from torch import Tensor


def along(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """`values` shaped to broadcast against x along `axis`."""
    if axis is None:
        return values.reshape(())
    shape = [1] * x.dim()
    shape[axis] = -1
    return values.reshape(shape)


def like(y: Tensor, x: Tensor) -> Tensor:
    """y with dtype and strides of empty_like(x)."""
    return torch.empty_like(x).copy_(y)
