"""A picture of synthetic images, one row per class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from .data.preprocessing import Preprocessing
from .files import written_whole
from .generator import Generator, sample

_CELL, _GAP, _LABEL_WIDTH = 64, 4, 96


def save_gallery(
    path: str | Path,
    generator: Generator,
    preprocessing: Preprocessing,
    class_names: Sequence[str] | None = None,
    *,
    per_class: int = 10,
    max_classes: int = 20,
    seed: int = 0,
) -> None:
    """Draws `per_class` images of the first `max_classes` classes and writes them as PNG.

    Args:
        preprocessing: of the teacher; its inverse makes pixels of the generator's output.
        class_names: to write beside the rows; numbers otherwise.
    """
    classes = min(max_classes, generator.num_classes)
    labels = torch.arange(classes).repeat_interleave(per_class)
    pixels = preprocessing.denormalize(sample(generator, labels, seed)[0])
    pitch = _CELL + _GAP
    sheet = Image.new("RGB", (_LABEL_WIDTH + per_class * pitch, classes * pitch + _GAP), "white")
    writer = ImageDraw.Draw(sheet)
    for row in range(classes):
        top = _GAP + row * pitch
        name = class_names[row] if class_names else str(row)
        # The built-in font has no more than Latin letters.
        writer.text((_GAP, top), name[:14].encode("ascii", "replace").decode(), fill="black")
        for column in range(per_class):
            cell = _cell(pixels[row * per_class + column])
            sheet.paste(cell, (_LABEL_WIDTH + column * pitch, top))
    with written_whole(path) as temporary:
        sheet.save(temporary, format="PNG")


def _cell(pixels: torch.Tensor) -> Image.Image:
    """One image, scaled to a cell; small ones keep their sharp pixels."""
    image = Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).contiguous().numpy())
    small = max(image.size) <= _CELL
    resampling = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return image.convert("RGB").resize((_CELL, _CELL), resampling)
