"""Writing synthetic data sets: an ImageFolder tree of PNG files, resumable."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from .data.preprocessing import Preprocessing
from .files import written_whole
from .generator import Generator, sample
from .training import Progress

_BATCH = 64  # a multiple of the sampling chunk


def synthesize(
    generator: Generator,
    out_dir: str | Path,
    *,
    num_images: int,
    preprocessing: Preprocessing,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Writes `num_images` images as `out_dir/<class>/<index>.png`, classes in turn.

    Image i shows class i modulo K and depends on (generator, seed, i) only. Files that are there
    already are kept, so an interrupted run continues where it stopped.

    Args:
        preprocessing: of the teacher; its inverse makes pixels of the generator's output.
        progress: called as progress(images done, num_images, {}).

    Raises:
        ValueError: num_images < 1, or preprocessing for other images than the generator's.
    """
    if num_images < 1:
        raise ValueError(f"num_images must be >= 1, got {num_images}")
    channels, height, width = generator.image_shape
    if (preprocessing.channels, preprocessing.image_size) != (channels, height) or height != width:
        raise ValueError(
            f"the generator makes {generator.image_shape} images, preprocessing is for "
            f"{(preprocessing.channels, preprocessing.image_size, preprocessing.image_size)}"
        )
    out_dir = Path(out_dir)
    digits = len(str(generator.num_classes - 1))
    labels = torch.arange(num_images) % generator.num_classes
    paths = [
        out_dir / f"{label:0{digits}d}" / f"{index:08d}.png"
        for index, label in enumerate(labels.tolist())
    ]
    for folder in {path.parent for path in paths}:
        folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, num_images, _BATCH):
        stop = min(start + _BATCH, num_images)
        missing = [i for i in range(start, stop) if not paths[i].is_file()]
        if missing:
            images = sample(generator, labels[start:stop], seed, first=start)[0]
            pixels = preprocessing.denormalize(images)
            for index in missing:
                _write_png(paths[index], pixels[index - start])
        if progress is not None:
            progress(stop, num_images, {})


def _write_png(path: Path, pixels: torch.Tensor) -> None:
    array = pixels.permute(1, 2, 0).squeeze(2).contiguous().numpy()
    with written_whole(path) as temporary:
        Image.fromarray(array).save(temporary, format="PNG")
