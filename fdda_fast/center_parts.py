"""Centers of large calibration sets, by any number of processes that share a folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from .checkpoint import load_tensors, save_tensors
from .claims import Claims
from .data import Calibration
from .files import remove_temporaries
from .fingerprints import fingerprint
from .memory import resident_memory
from .statistics import BNSCenters, ClassSums, teacher_with_norms
from .teacher import Moments
from .training import Progress, deferred_interrupt

_FORMAT = "fdda-fast part of centers 1"
_PART = 1024  # images: no process that ends loses more
_BATCH = 16


class CenterParts:
    """The center of every class, from images that are read a batch at a time.

    The images are cut into parts of 1024. Each is done by one of the processes, whichever comes
    first, and kept in a file; whoever finds all of them done merges them in their order. The result
    therefore has the same bits whatever the number of processes, and whatever became of some
    (with the same number of threads each: libraries may split their sums by it).

    Memory holds one batch, what a part came to, and at the end all classes' moments in float64.

    Args:
        model: teacher, a CNN that torch.fx can trace; not changed.
        calibration: the images, sorted by class: parts then have few classes and small files.
        num_classes: K.

    Attributes:
        fingerprint: names teacher and images; parts under another one do not fit.

    Raises:
        ValueError: no BatchNorm2d in the model, or one without running statistics; a model that
            cannot be traced.
    """

    def __init__(self, model: nn.Module, calibration: Calibration, num_classes: int) -> None:
        preprocessing = calibration.source.preprocessing
        size = preprocessing.image_size
        self._shape = (preprocessing.channels, size, size)
        self._teacher = teacher_with_norms(model, self._shape)
        self._calibration, self._num_classes = calibration, num_classes
        self._parts = torch.arange(len(calibration.indices)).split(_PART)
        rows = torch.tensor(calibration.indices)
        self.fingerprint = fingerprint({}, rows, calibration.labels, model)

    @torch.no_grad()
    def collect(self, path: Path, progress: Progress | None = None) -> BNSCenters:
        """Writes the centers to `path`, with the other processes that do so.

        Started again after whatever ended it, the same goes on. Parts are kept in the folder
        `.parts` beside `path` until the file is there.

        Args:
            progress: called as progress(images done, their number, {}), those of others included.

        Raises:
            ValueError: an image that cannot be read, or a damaged part.
            KeyboardInterrupt: Ctrl-C or SIGTERM came; the part in work is given up.
        """
        folder = path.parent / ".parts"
        folder.mkdir(parents=True, exist_ok=True)

        files = [folder / f"{part:06d}.safetensors" for part in range(len(self._parts))]
        done, total = 0, len(self._calibration.indices)

        def leave_if_asked() -> None:
            if interrupted.is_set():
                raise KeyboardInterrupt

        def between_batches(seen: int) -> None:
            leave_if_asked()
            if progress is not None:
                progress(done + seen, total, {})

        def work(part: int) -> None:
            remove_temporaries(files[part])
            _save(files[part], *self._observe(self._parts[part], between_batches))

        with (
            Claims(path.parent / ".claims") as claims,
            deferred_interrupt() as interrupted,
            resident_memory(),
        ):
            # In this order: parts go once the result is there.
            for part in claims.work_through(
                len(self._parts),
                lambda part: files[part].is_file() or path.is_file(),
                work,
                pause=leave_if_asked,
            ):
                done += len(self._parts[part])
                if progress is not None:
                    progress(done, total, {})
            with claims.held(Claims.WHOLE):
                if not path.is_file():
                    remove_temporaries(path)
                    self._merge(files).save(path)
                shutil.rmtree(folder, ignore_errors=True)
        return BNSCenters.load(path)

    def _observe(
        self, rows: torch.Tensor, between_batches: Callable[[int], None]
    ) -> tuple[torch.Tensor, ClassSums]:
        """Classes of a part's images, and what they come to."""
        classes, labels = self._calibration.labels[rows].unique(return_inverse=True)
        sums = ClassSums(self._teacher, len(classes), self._shape)
        for start in range(0, len(rows), _BATCH):
            if start:
                between_batches(start)
            batch = slice(start, start + _BATCH)
            indices = [self._calibration.indices[row] for row in rows[batch].tolist()]
            sums.observe(self._calibration.source.images(indices), labels[batch])
        return classes, sums

    def _merge(self, files: Sequence[Path]) -> BNSCenters:
        sums = ClassSums(self._teacher, self._num_classes, self._shape)
        for file in files:
            sums.add(*_load(file, len(sums.moments)))
        return sums.centers()


def _save(path: Path, classes: torch.Tensor, sums: ClassSums) -> None:
    tensors = {"classes": classes, "count": sums.count, "logits": sums.logits}
    for layer, (mean, var) in enumerate(sums.moments):
        tensors[f"mean.{layer}"], tensors[f"var.{layer}"] = mean, var
    save_tensors(path, tensors, {"format": _FORMAT})


def _load(
    path: Path, layers: int
) -> tuple[torch.Tensor, torch.Tensor, list[Moments], torch.Tensor]:
    """What `ClassSums.add` takes."""
    tensors, metadata = load_tensors(path)
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path}: not a {_FORMAT!r}")
    moments = [Moments(tensors[f"mean.{i}"], tensors[f"var.{i}"]) for i in range(layers)]
    return tensors["classes"], tensors["count"], moments, tensors["logits"]
