"""The images of a block and what is measured on them: a function of the block's number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..data.preprocessing import Preprocessing
from ..fingerprints import check_teacher
from ..generator import Generator, sample
from ..losses import moment_distance
from ..statistics import BNSCenters, whitened
from ..teacher import FrozenTeacher
from .plan import BLOCK, LabelPlan, ShardConfig

_TEACHER_BATCH = 16  # always whole: libraries pick their algorithm by batch size
_HASH_SIDE = 8
_AT_ONCE = 4  # images that become pixels


@dataclass(frozen=True)
class Block:
    """Images of consecutive indices. What a teacher measures is empty without one.

    Attributes:
        first: index of the first.
        generator: number of their generator.
        labels: int64 [N].
        pixels: uint8 [N, H, W, C].
        hashes: bool [N, 64], nearly the same for images that look alike.
        logits: float32 [N, K] or None. confidence: float32 [N] or None, the probability of the
            label. agreeing: bool [N] or None, whether the label is the most probable class.
        bns_distance: float32 [N] or None, see `BlockMaker`.
        kept: bool [N], whether the filter lets them pass.
    """

    first: int
    generator: int
    labels: np.ndarray
    pixels: np.ndarray
    hashes: np.ndarray
    logits: np.ndarray | None
    confidence: np.ndarray | None
    agreeing: np.ndarray | None
    bns_distance: np.ndarray | None
    kept: np.ndarray


class BlockMaker:
    """Makes any block, each by itself.

    Args:
        generators: all with the same image shape; classes are numbered through.
        preprocessing: of the teacher; its inverse makes pixels.
        teacher: gives logits, computed on the images as they are stored.
        centers: gives the distance of every image's BNS from the center of its class: mean over
            layers of MSE(mean) + MSE(var), in units of the teacher's running statistics.

    Raises:
        ValueError: generators, preprocessing, teacher and centers that do not fit one another.
    """

    @torch.no_grad()
    def __init__(
        self,
        generators: Sequence[Generator],
        config: ShardConfig,
        preprocessing: Preprocessing,
        teacher: nn.Module | None,
        centers: BNSCenters | None,
    ) -> None:
        check_generators(generators, preprocessing)
        shape = generators[0].image_shape
        self._plan = LabelPlan([g.num_classes for g in generators], config.class_weights)
        if teacher is None and (centers is not None or config.min_confidence > 0):
            raise ValueError("centers and min_confidence need a teacher, got none")
        if centers is not None and (
            centers.num_classes != self._plan.num_classes or centers.image_shape != shape
        ):
            raise ValueError(
                f"centers are of {centers.num_classes} classes of {centers.image_shape} images, "
                f"the generators make {self._plan.num_classes} of {shape}"
            )
        self._teacher = None
        if teacher is not None:
            self._teacher = FrozenTeacher(teacher, shape)
            for generator in generators:
                check_teacher("generator", generator.teacher, self._teacher.fingerprint)
            if centers is not None:
                check_teacher("centers", centers.teacher, self._teacher.fingerprint)
            known = self._teacher(torch.zeros(1, *shape)).shape[1]
            if known < self._plan.num_classes:
                raise ValueError(
                    f"the teacher knows {known} classes, "
                    f"the generators make {self._plan.num_classes}"
                )
        self._generators, self._config, self._preprocessing = generators, config, preprocessing
        self._offsets = np.cumsum([0, *(g.num_classes for g in generators)])
        self._centers = centers

    @torch.no_grad()
    def __call__(self, number: int) -> Block:
        config, first = self._config, number * BLOCK
        count = min(BLOCK, config.num_images - first)
        generator, own_labels = self._plan.block(number)
        images, _ = sample(
            self._generators[generator], own_labels, config.seed, first=first, batch=BLOCK
        )
        labels = own_labels + int(self._offsets[generator])
        pixels, hashes = self._stored(images)
        measured: dict[str, torch.Tensor | None] = dict.fromkeys(
            ("logits", "confidence", "agreeing", "bns_distance")
        )
        kept = torch.ones(BLOCK, dtype=torch.bool)
        if self._teacher is not None:
            with _one_thread():
                measured |= self._judge(pixels, labels)
            kept = measured["confidence"] >= config.min_confidence

        def array(tensor: torch.Tensor | None) -> np.ndarray | None:
            return None if tensor is None else tensor[:count].contiguous().numpy()

        return Block(
            first=first,
            generator=generator,
            labels=array(labels),
            pixels=array(pixels.permute(0, 2, 3, 1)),
            hashes=array(hashes),
            kept=array(kept),
            **{name: array(values) for name, values in measured.items()},
        )

    def _stored(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels, channels_last, and hashes: some images at a time, which a cache has."""
        layout = torch.channels_last
        pixels, hashes = torch.empty(images.shape, dtype=torch.uint8, memory_format=layout), []
        for part, stored in zip(images.split(_AT_ONCE), pixels.split(_AT_ONCE), strict=True):
            planes = self._preprocessing.denormalize(part)
            stored.copy_(planes)
            hashes.append(difference_hash(planes))
        return pixels, torch.cat(hashes)

    def _judge(self, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        groups = torch.arange(_TEACHER_BATCH)
        all_logits, distances = [], []
        for part, classes in zip(
            pixels.split(_TEACHER_BATCH), labels.split(_TEACHER_BATCH), strict=True
        ):
            part = self._preprocessing.normalize(part.contiguous())
            if self._centers is None:
                all_logits.append(self._teacher(part))
                continue
            logits, moments = self._teacher.with_moments(part, groups, _TEACHER_BATCH)
            all_logits.append(logits)
            running = self._teacher.running
            targets = whitened(self._centers.of(classes), running)
            moments = whitened(moments, running)
            distances.append(moment_distance(moments, targets, range(len(moments))))
        logits = torch.cat(all_logits)
        confidence = F.softmax(logits, 1).gather(1, labels[:, None])[:, 0]
        result = {
            "logits": logits, "confidence": confidence, "agreeing": logits.argmax(1) == labels
        }  # fmt: skip
        return result | ({"bns_distance": torch.cat(distances)} if distances else {})


@contextmanager
def _one_thread() -> Iterator[None]:
    """Libraries were seen to split the sums of a teacher's last layer by the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_generators(generators: Sequence[Generator], preprocessing: Preprocessing) -> None:
    """Raises ValueError unless all make the images that `preprocessing` describes."""
    if not generators:
        raise ValueError("generators: expected one or more, got none")
    size = preprocessing.image_size
    expected = (preprocessing.channels, size, size)
    for generator in generators:
        if generator.image_shape != expected:
            raise ValueError(
                f"the generator makes {generator.image_shape} images, preprocessing is for "
                f"{expected}"
            )


def difference_hash(pixels: torch.Tensor) -> torch.Tensor:
    """Whether each of 8 x 8 areas is brighter than the one left of it.

    Args:
        pixels: uint8 [N, C, H, W].

    Returns:
        bool [N, 64]
    """
    areas = F.adaptive_avg_pool2d(pixels.double().mean(1), (_HASH_SIDE, _HASH_SIDE + 1))
    return (areas[:, :, 1:] > areas[:, :, :-1]).flatten(1)
