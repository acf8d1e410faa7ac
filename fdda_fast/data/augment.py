"""Random changes to batches of images: shifts, resized crops, mirroring, blending, warps."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

_LOG_RATIO = math.log(4 / 3)


def random_shift(
    images: torch.Tensor, max_shift: int, flip: bool, rng: torch.Generator
) -> torch.Tensor:
    """Moves every image by up to `max_shift` pixels each way, repeating the border.

    Args:
        images: [N, C, H, W].
        flip: mirror half of the images.

    Returns:
        The shape of `images`.
    """
    n, _, h, w = images.shape
    if flip:
        mirrored = torch.rand(n, generator=rng) < 0.5
        images = torch.where(mirrored.view(-1, 1, 1, 1).to(images.device), images.flip(3), images)
    padded = F.pad(images, (max_shift,) * 4, mode="replicate")
    dy, dx = torch.randint(0, 2 * max_shift + 1, (2, n), generator=rng)
    rows = (dy[:, None] + torch.arange(h)).view(n, h, 1)
    cols = (dx[:, None] + torch.arange(w)).view(n, 1, w)
    return padded[torch.arange(n).view(n, 1, 1), :, rows, cols].permute(0, 3, 1, 2)


def blended(images: torch.Tensor, share: float, rng: torch.Generator) -> torch.Tensor:
    """Blends `share` of the images with another of the batch each.

    Half of these are averaged with the other, pixel by pixel, at a uniform weight (mixup, Zhang et
    al., ICLR 2018); half get a box of it, the box's share of the area uniform (CutMix, Yun et al.,
    ICCV 2019).

    Args:
        images: float [N, C, H, W].

    Returns:
        The shape of `images`.
    """
    n, _, h, w = images.shape
    other = torch.randperm(n, generator=rng)
    weight, chosen, kind, area, top, left = torch.rand(6, n, 1, 1, 1, generator=rng)
    side = area.sqrt()
    rows, cols = ((torch.arange(size) + 0.5) / size for size in (h, w))
    inside = _between(rows.view(h, 1), (1 - side) * top, side)
    inside = inside & _between(cols, (1 - side) * left, side)
    weight = torch.where(kind < 0.5, weight, (~inside).float())
    weight = torch.where(chosen < share, weight, 1.0).to(images)
    return weight * images + (1 - weight) * images[other.to(images.device)]


def _between(position: torch.Tensor, start: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    return (position >= start) & (position < start + length)


def random_resized_crop(
    images: torch.Tensor, area: tuple[float, float], flip: bool, rng: torch.Generator
) -> torch.Tensor:
    """Cuts a random box out of every image and scales it back to full size, bilinearly.

    PyTorch's RandomResizedCrop and RandomHorizontalFlip, a batch at a time.

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


def warped(
    images: torch.Tensor,
    limits: tuple[torch.Tensor, torch.Tensor],
    flip: bool,
    rng: torch.Generator,
) -> torch.Tensor:
    """Other instances that the images' classes may have: other shapes, poses and tones.

    Random affine maps (rotation up to 12 degrees; size, aspect ratio, shear and position by some
    tenths), smooth displacements (Simard et al., ICDAR 2003; up to a twentieth of the side), and a
    gamma curve and a contrast between the limits of pixels.

    Args:
        images: float32 [N, C, H, W] within the limits.
        limits: smallest and largest value of every channel, float32 [C, 1, 1] each.
        flip: mirror half of the images.

    Returns:
        The shape of `images`, within the limits.
    """
    n, _, h, w = images.shape
    uniform = 2 * torch.rand(9, n, generator=rng) - 1
    angle, size, aspect, shear, x, y, mirror, curve, contrast = uniform
    angle = math.pi / 15 * angle
    width, height = (torch.exp(0.2 * size + sign * 0.125 * aspect) for sign in (1, -1))
    if flip:
        width = torch.where(mirror < 0, -width, width)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = width * angle.cos(), 0.2 * shear - height * angle.sin()
    theta[:, 1, 0], theta[:, 1, 1] = width * angle.sin(), height * angle.cos()
    theta[:, :, 2] = 0.16 * torch.stack((x, y), 1)
    moved = 0.1 * (2 * torch.rand(n, 2, 5, 5, generator=rng) - 1)
    moved = F.interpolate(moved, size=(h, w), mode="bicubic", align_corners=True)
    grid = F.affine_grid(theta, [n, 1, h, w], align_corners=False) + moved.permute(0, 2, 3, 1)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    low, high = limits
    tones = ((images - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    tones = tones ** torch.exp(1.2 * curve).view(n, 1, 1, 1)
    return low + (high - low) * (0.75 + 0.25 * contrast).view(n, 1, 1, 1) * tones
