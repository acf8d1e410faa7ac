"""BatchNorm statistics (BNS): the per-class centers, and the units they are compared in."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .checkpoint import load_tensors, save_tensors
from .distributed import Ranks, merged, merged_over_ranks
from .teacher import FrozenTeacher, Moments

_FORMAT = "fdda-fast centers 1"
_GATHERED_CLASSES = 256  # at a time, so that memory does not grow with the ranks
EPS = 1e-5  # as in BatchNorm2d: a dead channel must not dominate


def whitened(moments: Sequence[Moments], running: Sequence[Moments]) -> list[Moments]:
    """Moments in units of the teacher's running statistics: (mean - m) / sqrt(v) and var / v.

    Every layer and channel then counts alike, however large its activations are; the running
    statistics themselves become 0 and 1.

    Args:
        moments: per layer (mean, var), each [G, C_l].
        running: per layer (m, v), each [1, C_l].
    """
    return [
        Moments((mean - m) / (v + EPS).sqrt(), var / (v + EPS))
        for (mean, var), (m, v) in zip(moments, running, strict=True)
    ]


@dataclass(frozen=True)
class BNSCenters:
    """Per-class BatchNorm statistics of the calibration images.

    Attributes:
        mean, var: per BN layer, float32 [K, C_l]; rows of classes without images are zero.
        count: int64 [K], calibration images per class.
        logits: float32 [K, num_classes], the teacher's logits averaged per class.
        reliable: bool [K], whether the class has images and the teacher's arg-max over its
            logits is the class.
        image_shape: (channels, height, width) of the teacher's input.
        teacher: fingerprint of the teacher.
        first_class: the teacher's class that row 0 stands for.
    """

    mean: list[torch.Tensor]
    var: list[torch.Tensor]
    count: torch.Tensor
    logits: torch.Tensor
    reliable: torch.Tensor
    image_shape: tuple[int, int, int]
    teacher: str
    first_class: int = 0

    @property
    def num_classes(self) -> int:
        return len(self.count)

    @property
    def num_layers(self) -> int:
        return len(self.mean)

    def of(self, classes: torch.Tensor) -> list[Moments]:
        """Layer by layer, the centers of `classes` (int64 [G]) as [G, C_l] moments."""
        return [Moments(m[classes], v[classes]) for m, v in zip(self.mean, self.var, strict=True)]

    def between(self, first: int, stop: int) -> BNSCenters:
        """Those of classes first..stop-1, for a generator of these alone; views."""
        if not 0 <= first < stop <= self.num_classes:
            raise ValueError(
                f"first, stop: expected 0 <= first < stop <= {self.num_classes}, "
                f"got {first}, {stop}"
            )
        rows = slice(first, stop)
        return BNSCenters(
            [m[rows] for m in self.mean],
            [v[rows] for v in self.var],
            self.count[rows],
            self.logits[rows],
            self.reliable[rows],
            self.image_shape,
            self.teacher,
            self.first_class + first,
        )

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file."""
        tensors = {"count": self.count, "logits": self.logits, "reliable": self.reliable}
        for layer, (mean, var) in enumerate(zip(self.mean, self.var, strict=True)):
            tensors[f"mean.{layer}"], tensors[f"var.{layer}"] = mean, var
        shape = {"layers": self.num_layers, "image_shape": self.image_shape}
        if self.first_class:
            shape["first_class"] = self.first_class
        metadata = {"format": _FORMAT, "shape": json.dumps(shape), "teacher": self.teacher}
        save_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> BNSCenters:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a file of centers, or inconsistent.
        """
        tensors, metadata = load_tensors(path)
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{path}: not a file of BNS centers ({_FORMAT!r})")
        try:
            shape = json.loads(metadata["shape"])
            layers = range(int(shape["layers"]))
            channels, height, width = (int(v) for v in shape["image_shape"])
            centers = cls(
                [tensors[f"mean.{i}"] for i in layers],
                [tensors[f"var.{i}"] for i in layers],
                tensors["count"],
                tensors["logits"],
                tensors["reliable"],
                (channels, height, width),
                metadata["teacher"],
                int(shape.get("first_class", 0)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: incomplete file of BNS centers ({error})") from error
        classes = centers.count.numel()
        for mean, var in zip(centers.mean, centers.var, strict=True):
            if mean.ndim != 2 or mean.shape != var.shape or len(mean) != classes:
                raise ValueError(f"{path}: layer shapes disagree with {classes} classes")
        if centers.logits.shape[:1] != (classes,) or centers.reliable.shape != (classes,):
            raise ValueError(f"{path}: logits or reliable disagree with {classes} classes")
        return centers


@torch.no_grad()
def collect_centers(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    *,
    batch_size: int = 64,
) -> BNSCenters:
    """The BNS center of every class: moments of each BN input over that class's images alone.

    Args:
        model: teacher, a CNN that torch.fx can trace; not changed.
        images: float32 [N, C, H, W].
        labels: int64 [N] in 0..num_classes-1; classes may be missing.
        num_classes: K.
        batch_size: images per forward; the classes of a batch are never split.

    Raises:
        ValueError: shapes or labels out of range; no BatchNorm2d in the model, or one without
            running statistics; a model that cannot be traced.
    """
    check_labelled_images("images", images, labels, num_classes)
    count = torch.bincount(labels, minlength=num_classes)
    teacher = teacher_with_norms(model, tuple(images.shape[1:]))
    sums = [Moments(*torch.zeros(2, num_classes, m.mean.shape[1])) for m in teacher.running]
    logits = torch.zeros(num_classes, teacher(images[:1]).shape[1])
    for rows in _whole_classes(labels, batch_size):
        present, groups = labels[rows].unique(return_inverse=True)
        out, moments = teacher.with_moments(images[rows], groups, len(present))
        logits.index_add_(0, labels[rows], out)
        for total, batch in zip(sums, moments, strict=True):
            total.mean[present], total.var[present] = batch.mean, batch.var
    return _centers(teacher, sums, count, logits, tuple(images.shape[1:]))


@torch.no_grad()
def stream_centers(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    num_classes: int,
    *,
    ranks: Ranks | None = None,
) -> BNSCenters:
    """What `collect_centers` gives for all the images together, but for rounding.

    Memory holds one batch and the moments in float64, whatever the number of images. Where
    torch.distributed is initialised, all processes must call this, each with its share of the
    images (as by DistributedSampler), and all get the same centers.

    Args:
        model: teacher, a CNN that torch.fx can trace; not changed.
        batches: of images float32 [N, C, H, W] and labels int64 [N], in any order and size; a
            DataLoader, say. A rank may have none.
        num_classes: K.
        ranks: which processes have the images; default all.

    Raises:
        ValueError: no images, or shapes that differ; else see `collect_centers`.
    """
    ranks, batches = ranks or Ranks.world(), iter(batches)
    first = next(batches, None)
    image_shape = _common_shape(None if first is None else first[0], ranks)
    teacher = teacher_with_norms(model, image_shape)
    sums = ClassSums(teacher, num_classes, image_shape)
    for images, labels in itertools.chain([] if first is None else [first], batches):
        check_labelled_images("images", images, labels, num_classes)
        sums.observe(images, labels)
    for rows in torch.arange(num_classes).split(_GATHERED_CLASSES):
        own = [Moments(m.mean[rows], m.var[rows]) for m in sums.moments]
        everyone, sums.count[rows] = merged_over_ranks(own, sums.count[rows], ranks)
        for total, union in zip(sums.moments, everyone, strict=True):
            total.mean[rows], total.var[rows] = union
    ranks.sum_([sums.logits])
    return sums.centers()


class ClassSums:
    """What a teacher's images of each class have come to so far.

    Args:
        teacher: of images of `image_shape`.
        num_classes: K.

    Attributes:
        count: int64 [K], images. moments: of their BN inputs, per layer float64 [K, C_l].
        logits: their sums, float64 [K, num_logits].
    """

    def __init__(
        self, teacher: FrozenTeacher, num_classes: int, image_shape: tuple[int, int, int]
    ) -> None:
        def zeros(width: int) -> torch.Tensor:
            return torch.zeros(num_classes, width, dtype=torch.float64)

        self.image_shape, self._teacher = image_shape, teacher
        self.count = torch.zeros(num_classes, dtype=torch.int64)
        widths = [layer.mean.shape[1] for layer in teacher.running]
        self.moments = [Moments(zeros(width), zeros(width)) for width in widths]
        self.logits = zeros(teacher(torch.zeros(1, *image_shape)).shape[1])

    def observe(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Adds images float32 [N, C, H, W] of classes int64 [N]."""
        present, groups, count = labels.unique(return_inverse=True, return_counts=True)
        out, moments = self._teacher.with_moments(images, groups, len(present))
        logits = self.logits.new_zeros(len(present), out.shape[1])
        self.add(present, count, moments, logits.index_add_(0, groups, out.double()))

    def add(
        self,
        classes: torch.Tensor,
        count: torch.Tensor,
        moments: Sequence[Moments],
        logits: torch.Tensor,
    ) -> None:
        """Adds what other images came to, of `classes` int64 [G], which differ."""
        counts = torch.stack([self.count[classes], count])
        for total, more in zip(self.moments, moments, strict=True):
            pairs = (torch.stack([t[classes], m]) for t, m in zip(total, more, strict=True))
            total.mean[classes], total.var[classes] = merged(counts, *pairs)
        self.count[classes] += count
        self.logits[classes] += logits

    def centers(self) -> BNSCenters:
        """The centers of the classes. `logits` then hold averages."""
        moments = [Moments(m.mean.float(), m.var.float()) for m in self.moments]
        return _centers(self._teacher, moments, self.count, self.logits, self.image_shape)


def _common_shape(images: torch.Tensor | None, ranks: Ranks) -> tuple[int, int, int]:
    """That of one image, of all ranks that have any."""
    if images is not None and images.ndim != 4:
        raise ValueError(f"images must be float [N, C, H, W], got {list(images.shape)}")
    own = torch.tensor([0, 0, 0] if images is None else images.shape[1:])
    found = {tuple(shape) for shape in ranks.gather(own).tolist() if any(shape)}
    if len(found) != 1:
        raise ValueError(f"images must be of one shape on all processes, got {sorted(found)}")
    return found.pop()


def teacher_with_norms(model: nn.Module, image_shape: tuple[int, int, int]) -> FrozenTeacher:
    """Raises ValueError for a model without BatchNorm2d, or one that cannot be traced."""
    teacher = FrozenTeacher(model, image_shape)
    check_norms(teacher)
    return teacher


def teacher_of(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor
) -> tuple[FrozenTeacher, int]:
    """The teacher for calibration images and its number of classes, the images being checked.

    Raises ValueError or TypeError for what `check_labelled_images` refuses, labels past the
    teacher's classes included, or a model that cannot be traced or returns no logits [N, K].
    """
    name = "calibration images"
    check_labelled_images(name, images, labels, 1 << 31)
    teacher = FrozenTeacher(model, tuple(images.shape[1:]))
    with torch.no_grad():
        shape = tuple(teacher(images[:1]).shape)
    if len(shape) != 2 or shape[0] != 1:
        raise ValueError(
            f"the model must return logits [images, classes], got {shape} for one image; a "
            "squeeze() without a dimension drops that of a single image: use flatten(1)"
        )
    num_classes = shape[1]
    check_labelled_images(name, images, labels, num_classes)
    return teacher, num_classes


def check_norms(teacher: FrozenTeacher) -> None:
    """Raises ValueError for a teacher without BatchNorm2d."""
    if not teacher.running:
        raise ValueError(
            "the model has no BatchNorm2d layer, so there are no statistics to align; "
            "quantize it with method 'reconstruct', which needs none"
        )


def _centers(
    teacher: FrozenTeacher,
    moments: Sequence[Moments],
    count: torch.Tensor,
    logits: torch.Tensor,
    image_shape: tuple[int, int, int],
) -> BNSCenters:
    """Of per-class moments [K, C_l], and logits added up per class, which are averaged in place."""
    logits /= count.clamp(min=1)[:, None]
    reliable = (count > 0) & (logits.argmax(1) == torch.arange(len(count)))
    return BNSCenters(
        [m.mean for m in moments],
        [m.var for m in moments],
        count,
        logits.float(),
        reliable,
        image_shape,
        teacher.fingerprint,
    )


def check_labelled_images(
    name: str, images: torch.Tensor, labels: torch.Tensor, num_classes: int
) -> None:
    """Raises ValueError or TypeError unless images are float [N, C, H, W] and labels int64 [N]."""
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"{name} must be float [N, C, H, W], got {images.dtype} {list(images.shape)}"
        )
    if len(images) == 0:
        raise ValueError(f"{name} is empty")
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels of {name} must be int64 [{len(images)}], "
            f"got {labels.dtype} {list(labels.shape)}"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(
            f"labels of {name} must lie in 0..{num_classes - 1}, "
            f"got {int(labels.min())}..{int(labels.max())}"
        )


def _whole_classes(labels: torch.Tensor, batch_size: int) -> Iterable[torch.Tensor]:
    """Rows in batches of about `batch_size`, all rows of a class in one batch."""
    batch: list[torch.Tensor] = []
    size = 0
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        if batch and size + len(rows) > batch_size:
            yield torch.cat(batch)
            batch, size = [], 0
        batch.append(rows)
        size += len(rows)
    yield torch.cat(batch)
