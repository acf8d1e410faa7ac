"""A data set of 128 classes from Debian's fonts: `python bench/glyphs.py [FOLDER]`.

Letters (Latin, Greek, Cyrillic), digits and signs, grey, 28 x 28, white on black: those of DejaVu
and Liberation to train on, those of FreeFont, whose faces no training image shows, to test on.
Every image is moved, turned, scaled, dimmed and gets noise, as the seed decides. What a font may
draw like another class is left out (0 beside O, Greek capitals beside Latin ones), and so is the
lower case where it is the capital made smaller.

Writes IDX files that `--data FOLDER` and `fdda_fast.data.open_source` read. The teacher
`glyphs-resnet20` was trained on them: `python -m fdda_fast.models.train glyphs-resnet20`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from fdda_fast.files import written_whole
from fdda_fast.seeding import stream

CLASSES = (
    "123456789"
    "ABCDEFGHJKLMNOPQRSTUVWXYZabdefghijmnqrt"
    "ÆŒØŁÞĐÄÅÉÑÖÜÇŠ"
    "ΓΔΘΛΞΠΣΦΨΩβγδεζλμξσω"
    "БДЖИЙЛЦЧШЩЪЫЭЮЯЄЂЊЉЏ"
    "&@#$%?+=*/\\()<>§¶€£¥©±÷«»≠"
)
FOLDER = Path("runs/glyphs")
FONTS = Path("/usr/share/fonts/truetype")
SIDE = 28
PER_FACE = 8  # images of a class from every face
_FINE = 4  # glyphs are drawn so many times as large
_FONT_SIZE = 20  # pixels
_STREAM = 40


@dataclass(frozen=True)
class Package:
    """Fonts of one Debian package: every family in every style."""

    name: str
    folder: str
    families: tuple[str, ...]
    styles: tuple[str, ...]

    def files(self, root: Path) -> list[Path]:
        pairs = product(self.families, self.styles)
        return [root / self.folder / f"{family}{style}.ttf" for family, style in pairs]


_DEJAVU, _FREEFONT = ("fonts-dejavu", "dejavu"), ("fonts-freefont-ttf", "freefont")
PACKAGES = {
    "train": (
        Package(
            *_DEJAVU,
            ("DejaVuSans", "DejaVuSansCondensed", "DejaVuSansMono"),
            ("", "-Bold", "-Oblique", "-BoldOblique"),
        ),
        Package(
            *_DEJAVU,
            ("DejaVuSerif", "DejaVuSerifCondensed"),
            ("", "-Bold", "-Italic", "-BoldItalic"),
        ),
        Package(
            "fonts-liberation",
            "liberation",
            ("LiberationSans", "LiberationSerif", "LiberationMono"),
            ("-Regular", "-Bold", "-Italic", "-BoldItalic"),
        ),
    ),
    "test": (
        Package(*_FREEFONT, ("FreeSans", "FreeMono"), ("", "Bold", "Oblique", "BoldOblique")),
        Package(*_FREEFONT, ("FreeSerif",), ("", "Bold", "Italic", "BoldItalic")),
    ),
}


def faces(split: str, fonts: Path = FONTS) -> list[Path]:
    """The font files of a split.

    Raises:
        FileNotFoundError: fonts that are not installed; names the Debian package.
    """
    files = []
    for package in PACKAGES[split]:
        wanted = package.files(fonts)
        absent = [file for file in wanted if not file.is_file()]
        if absent:
            raise FileNotFoundError(f"{absent[0]}: no such font (apt-get install {package.name})")
        files += wanted
    return files


def drawn(face: Path) -> torch.Tensor:
    """Every class in one face, large and in the middle: float32 [classes, 1, S, S] in 0..1."""
    font = ImageFont.truetype(str(face), _FONT_SIZE * _FINE, layout_engine=ImageFont.Layout.BASIC)
    side = SIDE * _FINE
    glyphs = np.zeros((len(CLASSES), 1, side, side), np.uint8)
    for glyph, character in zip(glyphs, CLASSES, strict=True):
        image = Image.new("L", (side, side))
        left, top, right, bottom = font.getbbox(character)
        corner = ((side - left - right) / 2, (side - top - bottom) / 2)
        ImageDraw.Draw(image).text(corner, character, fill=255, font=font)
        glyph[0] = image
    return torch.from_numpy(glyphs).float() / 255


def varied(glyphs: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """One image of every glyph, disturbed at random: uint8 [classes, SIDE, SIDE]."""

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(len(glyphs), generator=rng)

    angle = uniform(-0.15, 0.15)  # radians
    zoom = uniform(-0.15, 0.15).exp()
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    x, y = (uniform(-2, 2) * 2 / SIDE for _ in range(2))  # two pixels of an image from -1 to 1
    maps = torch.stack([cos, -sin, x, sin, cos, y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(maps, list(glyphs.shape), align_corners=False)
    moved = F.grid_sample(glyphs, grid, align_corners=False)
    images = F.avg_pool2d(moved, _FINE)[:, 0] * uniform(0.6, 1.0)[:, None, None]
    images = images + 0.06 * torch.randn(images.shape, generator=rng)
    return (255 * images).round().clamp(0, 255).to(torch.uint8)


def images_of(split: str, seed: int) -> Iterator[torch.Tensor]:
    """uint8 [classes, SIDE, SIDE], in the order of `CLASSES`, PER_FACE times for every face."""
    for number, face in enumerate(faces(split)):
        glyphs = drawn(face)
        for index in range(PER_FACE):
            yield varied(glyphs, stream(seed, _STREAM, list(PACKAGES).index(split), number, index))


def write_idx(path: Path, values: np.ndarray) -> None:
    """Writes uint8 values of any shape in the format that `fdda_fast.data.idx` reads."""
    header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes()
    with written_whole(path) as temporary:
        temporary.write_bytes(header + values.tobytes())


def make(folder: Path = FOLDER, seed: int = 0) -> None:
    """Writes both splits, the test images last.

    Raises:
        FileNotFoundError: fonts that are not installed; nothing is written.
    """
    splits = {split: torch.cat(list(images_of(split, seed))).numpy() for split in PACKAGES}
    folder.mkdir(parents=True, exist_ok=True)
    for split, images in splits.items():
        stem = {"train": "train", "test": "t10k"}[split]
        labels = np.resize(np.arange(len(CLASSES), dtype=np.uint8), len(images))
        write_idx(folder / f"{stem}-labels-idx1-ubyte", labels)
        write_idx(folder / f"{stem}-images-idx3-ubyte", images)


def make_once(folder: Path = FOLDER) -> None:
    """`make`, unless the folder has the data set."""
    if not (folder / "t10k-images-idx3-ubyte").is_file():
        make(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        make(args.folder, args.seed)
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
