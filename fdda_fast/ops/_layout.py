"""Layout of the convolutions' tensors."""

from __future__ import annotations

from torch import Tensor


def nhwc(x: Tensor) -> Tensor:
    """x [N, C, H, W] as a dense [N, H, W, C]: a view where x is channels_last."""
    return x.permute(0, 2, 3, 1).contiguous()


def empty_channels_last(x: Tensor, channels: int, scale: int = 1) -> Tensor:
    """[N, channels, scale * H, scale * W] of the dtype of x, channels_last."""
    batch, _, height, width = x.shape
    return x.new_empty(batch, scale * height, scale * width, channels).permute(0, 3, 1, 2)
