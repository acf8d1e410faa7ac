"""How an image file becomes a network input; travels with centers and packed models as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_SIDE = 1 << 14  # of an image, in pixels: more would ask for gigabytes
_MAX_RATIO = 64  # of an image's sides: beyond it, most of what resizing makes would be cut off
_DEEPEST = 65_535  # the white of 16 bits
# PIL raises all of them.
_UNREADABLE = (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Preprocessing:
    """Resize (shorter side, bilinear), centre crop, scale to [0, 1], normalise per channel.

    Args:
        image_size: side of the square network input, in pixels.
        resize: length of the shorter side before the crop, in pixels.
        mean, std: per channel, for values in [0, 1]; their length (1 or 3) is the channel count.
    """

    image_size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if not 1 <= self.image_size <= self.resize <= MAX_SIDE:
            raise ValueError(
                f"resize must be >= image_size >= 1 and <= {MAX_SIDE}, got resize={self.resize}, "
                f"image_size={self.image_size}"
            )
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean):
            raise ValueError(
                f"mean and std need 1 or 3 values each, got {len(self.mean)} and {len(self.std)}"
            )
        if not all(map(math.isfinite, self.mean)):
            raise ValueError(f"mean must be finite, got {self.mean}")
        if not all(0 < s < math.inf for s in self.std):
            raise ValueError(f"std must be positive and finite, got {self.std}")

    @property
    def channels(self) -> int:
        return len(self.mean)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """A PIL image -> float32 [C, image_size, image_size]."""
        image = _in_8_bits(image).convert("L" if self.channels == 1 else "RGB")
        longest = _MAX_RATIO * min(image.size)
        if max(image.size) > longest:
            image = tvf.center_crop(image, [min(side, longest) for side in reversed(image.size)])
        if min(image.size) != self.resize:
            image = tvf.resize(image, [self.resize], interpolation=InterpolationMode.BILINEAR)
        image = tvf.center_crop(image, [self.image_size, self.image_size])
        return self.normalize(tvf.pil_to_tensor(image)[None])[0]

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [N, C, H, W] -> float32 of the same shape."""
        mean = torch.tensor(self.mean).view(1, -1, 1, 1)
        std = torch.tensor(self.std).view(1, -1, 1, 1)
        return (pixels.float() / 255 - mean) / std

    def denormalize(self, images: torch.Tensor) -> torch.Tensor:
        """float32 [N, C, H, W] as the network sees it -> uint8 pixels, clamped to [0, 255]."""
        mean = torch.tensor(self.mean).view(1, -1, 1, 1)
        std = torch.tensor(self.std).view(1, -1, 1, 1)
        pixels = images.mul(std).add_(mean).mul_(255)
        return pixels.round_().clamp_(0, 255).to(torch.uint8)

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> Preprocessing:
        """Raises ValueError when keys are missing or values out of range."""
        try:
            return cls(
                image_size=int(values["image_size"]),
                resize=int(values["resize"]),
                mean=tuple(float(v) for v in values["mean"]),
                std=tuple(float(v) for v in values["std"]),
            )
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"not a preprocessing record: {values!r} ({error})") from error


def read_image(path: str | Path, preprocessing: Preprocessing) -> torch.Tensor:
    """An image file -> float32 [C, image_size, image_size].

    Raises:
        ValueError: damaged, no image, too large, or of pixels that have no 8-bit counterpart.
    """
    try:
        with Image.open(path) as image:
            return preprocessing(image)
    except _UNREADABLE as error:
        raise ValueError(f"{path}: not a readable image ({error})") from error


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Grey images of 16 bits scaled to 8, which PIL's `convert` would clip; others as they are."""
    if image.mode == "F":
        raise ValueError("expected pixels of 8 or 16 bits, got floating-point ones (mode F)")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    pixels = np.asarray(image)
    if not 0 <= pixels.min() <= pixels.max() <= _DEEPEST:
        raise ValueError(
            f"expected pixels of 8 or 16 bits, got values {pixels.min()}..{pixels.max()}"
        )
    return Image.fromarray(np.rint(pixels / (_DEEPEST / 255)).astype(np.uint8))
