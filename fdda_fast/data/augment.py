"""Random resized crops and mirroring of image batches (PyTorch's RandomResizedCrop, batched)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

_LOG_RATIO = math.log(4 / 3)


def random_resized_crop(
    images: torch.Tensor, area: tuple[float, float], flip: bool, rng: torch.Generator
) -> torch.Tensor:
    """Cuts a random box out of every image and scales it back to full size, bilinearly.

    Args:
        images: float [N, C, H, W].
        area: range of the box's share of the image; its aspect ratio is 3/4 to 4/3.
        flip: mirror half of the images.

    Returns:
        The shape of `images`.
    """
    n = len(images)
    share, ratio, x, y, mirror = torch.rand(5, n, generator=rng)
    share = area[0] + (area[1] - area[0]) * share
    root = torch.exp(0.5 * _LOG_RATIO * (2 * ratio - 1))
    width = (share.sqrt() * root).clamp(max=1)
    height = (share.sqrt() / root).clamp(max=1)
    # Coordinates run from -1 to 1: a box of relative width w has its centre within 1 - w of 0.
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = torch.where(mirror < 0.5, -width, width) if flip else width
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (1 - width) * (2 * x - 1)
    theta[:, 1, 2] = (1 - height) * (2 * y - 1)
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid.to(images.dtype), padding_mode="border", align_corners=False)
