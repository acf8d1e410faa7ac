"""A picture of synthetic images, one row per class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from .data.preprocessing import Preprocessing
from .files import written_whole

GALLERY_IMAGES, GALLERY_CLASSES = 10, 20  # a class, and in all
_CELL, _GAP, _LABEL_WIDTH = 64, 4, 96


def save_gallery(
    path: str | Path,
    images: torch.Tensor,
    labels: torch.Tensor,
    preprocessing: Preprocessing,
    class_names: Sequence[str] | None = None,
) -> None:
    """Writes the first images of the first classes as PNG.

    Args:
        images: float32 [N, C, H, W]. labels: int64 [N].
        preprocessing: of the teacher; its inverse makes pixels of the images.
        class_names: to write beside the rows; numbers otherwise.
    """
    classes, pitch = labels.unique()[:GALLERY_CLASSES].tolist(), _CELL + _GAP
    size = (_LABEL_WIDTH + GALLERY_IMAGES * pitch, len(classes) * pitch + _GAP)
    sheet = Image.new("RGB", size, "white")
    writer = ImageDraw.Draw(sheet)
    for row, label in enumerate(classes):
        top = _GAP + row * pitch
        name = class_names[label] if class_names else str(label)
        # The built-in font has no more than Latin letters.
        writer.text((_GAP, top), name[:14].encode("ascii", "replace").decode(), fill="black")
        shown = images[labels == label][:GALLERY_IMAGES]
        for column, pixels in enumerate(preprocessing.denormalize(shown)):
            sheet.paste(_cell(pixels), (_LABEL_WIDTH + column * pitch, top))
    with written_whole(path) as temporary:
        sheet.save(temporary, format="PNG")


def _cell(pixels: torch.Tensor) -> Image.Image:
    """One image, scaled to a cell; small ones keep their sharp pixels."""
    image = Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).contiguous().numpy())
    small = max(image.size) <= _CELL
    resampling = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return image.convert("RGB").resize((_CELL, _CELL), resampling)
