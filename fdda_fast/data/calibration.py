"""The calibration draw: k labelled images per class, recorded so that it can be repeated."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ..files import written_whole
from ..seeding import stream
from .sources import ImageSource

_DRAW_STREAM = 20
_ERRORS = "surrogateescape"  # names of files need not be UTF-8


@dataclass(frozen=True)
class Calibration:
    """The real images.

    Attributes:
        source: where they come from. indices: its rows.
    """

    source: ImageSource
    indices: tuple[int, ...]

    @cached_property
    def images(self) -> torch.Tensor:
        """float32 [N, C, H, W], normalised; read when they are first asked for."""
        return self.source.images(self.indices)

    @cached_property
    def labels(self) -> torch.Tensor:
        """int64 [N]"""
        return self.source.labels[list(self.indices)]

    @cached_property
    def files(self) -> tuple[str, ...]:
        """Where each image is read from."""
        return tuple(self.source.file_of(i) for i in self.indices)

    def save_record(self, path: str | Path) -> None:
        """Writes label, index and file of every image as CSV."""
        with (
            written_whole(path) as temporary,
            temporary.open("w", newline="", encoding="utf-8", errors=_ERRORS) as file,
        ):
            rows = csv.writer(file)
            rows.writerow(["label", "index", "file"])
            rows.writerows(zip(self.labels.tolist(), self.indices, self.files, strict=True))


def draw(source: ImageSource, per_class: int, seed: int) -> Calibration:
    """Draws `per_class` images of every class that the source has, without replacement.

    Raises:
        ValueError: per_class < 1, or a class with fewer images.
    """
    if per_class < 1:
        raise ValueError(f"per_class must be >= 1, got {per_class}")
    indices: list[int] = []
    for label in source.labels.unique().tolist():
        rows = (source.labels == label).nonzero()[:, 0]
        if len(rows) < per_class:
            raise ValueError(
                f"class {label} ({source.class_names[label]}) of {source.name} has {len(rows)} "
                f"images, fewer than per_class={per_class}"
            )
        order = torch.randperm(len(rows), generator=stream(seed, _DRAW_STREAM, label))
        indices += rows[order[:per_class]].tolist()
    return at(source, indices)


def at(source: ImageSource, indices: list[int]) -> Calibration:
    """The images at given rows of the source.

    Raises:
        ValueError: a row that the source does not have.
    """
    wrong = [i for i in indices if not 0 <= i < len(source)]
    if wrong:
        raise ValueError(f"{source.name} has rows 0..{len(source) - 1}, not {wrong[:5]}")
    return Calibration(source, tuple(indices))


def every(source: ImageSource) -> Calibration:
    """All images of the source, class by class."""
    return at(source, source.labels.argsort(stable=True).tolist())


def from_record(source: ImageSource, path: str | Path) -> Calibration:
    """Repeats a recorded draw.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a record, or one of another data set.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open(newline="", encoding="utf-8", errors=_ERRORS) as file:
        try:
            rows = [(int(r["label"]), int(r["index"]), r["file"]) for r in csv.DictReader(file)]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a calibration record ({error!r})") from error
    if not rows:
        raise ValueError(f"{path}: names no image")
    calibration = at(source, [index for _, index, _ in rows])
    found = list(zip(calibration.labels.tolist(), calibration.files, strict=True))
    if found != [(label, name) for label, _, name in rows]:
        raise ValueError(f"{path}: was drawn from another data set than {source.name}")
    return calibration
