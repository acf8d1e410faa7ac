"""Refinement: images moved, pixel by pixel, until their BatchNorm statistics are the teacher's."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .config import RefineConfig
from .data.augment import warped
from .distributed import ALONE, Ranks, merged_over_ranks
from .fingerprints import check_teacher, fingerprint
from .generator import Generator, sample_together
from .losses import moment_distance
from .seeding import stream
from .statistics import check_norms, teacher_of, whitened
from .teacher import FrozenTeacher
from .training import (
    Metrics,
    Progress,
    below,
    load_optimizer_tensors,
    optimizer_tensors,
    prefixed,
    run_steps,
)

Batch = tuple[torch.Tensor, torch.Tensor]
_BETAS = (0.5, 0.99)  # of Adam
_STREAM = 50


class Refiner:
    """Refines the images of one group after the other, see `refine`.

    Args:
        teacher: differentiable in its images.
        calibration: images float32 [N, C, H, W], N > 0, and labels int64 [N].
        num_classes: of the teacher.
        seed: decides every draw. flip: mirror half of the calibration images.
        generator: of the images to begin with; None: the calibration images.
        ranks: refine every group together, each its share of the images.

    Attributes:
        images, labels: of the groups that are finished.
    """

    def __init__(
        self,
        teacher: FrozenTeacher,
        calibration: Batch,
        num_classes: int,
        config: RefineConfig,
        *,
        seed: int,
        flip: bool,
        generator: Generator | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        check_norms(teacher)
        smallest = config.images % config.group or config.group
        ranks.check_batch("RefineConfig: images of the last group", smallest)
        self.teacher, self.generator, self.calibration = teacher, generator, calibration
        self.num_classes, self.seed, self.flip = num_classes, seed, flip
        self.config, self.ranks = config, ranks
        images, _ = calibration
        low, high = torch.aminmax(images.transpose(0, 1).flatten(1), dim=1)
        self._limits = low.view(-1, 1, 1), high.view(-1, 1, 1)
        self.images, self.labels = images[:0], torch.empty(0, dtype=torch.int64)
        self._optimizer: torch.optim.Adam | None = None

    @property
    def steps(self) -> int:
        """In all."""
        return -(-self.config.images // self.config.group) * self.config.steps

    def step(self, index: int) -> Metrics:
        """Step `index` of all groups' steps."""
        config, ranks = self.config, self.ranks
        group, step = divmod(index, config.steps)
        if self._optimizer is None:
            self._begin(*self.starts(group))
        x, y = self._current, self._classes
        rows = ranks.share(len(y))
        own = x.detach()[rows].requires_grad_()
        logits, moments = self.teacher.with_moments(own, torch.zeros_like(y[rows]), 1)
        moments, _ = merged_over_ranks(moments, torch.tensor([len(own)]), ranks)
        running = self.teacher.running
        seen, aim = whitened(moments, running), whitened(running, running)
        bns = moment_distance(seen, aim, range(len(running))).sum()
        entropy = F.cross_entropy(logits, y[rows], reduction="sum") / len(y)
        (config.bns_weight * bns + config.ce_weight * entropy).backward()
        # Every pixel has its own gradient, and all ranks make the same step.
        x.grad = ranks.gather_rows(own.grad, len(y))
        shown = entropy.detach()
        ranks.sum_([shown])
        self._optimizer.param_groups[0]["lr"] = config.lr * (1 - step / config.steps)
        self._optimizer.step()
        with torch.no_grad():
            x.clamp_(*self._limits)
        if step + 1 == config.steps:
            self.images = torch.cat([self.images, x.detach()])
            self.labels = torch.cat([self.labels, y])
            self._optimizer = None
        return {"refine_bns": bns.item(), "refine_ce": shown.item()}

    def starts(self, group: int) -> Batch:
        """The images of a group before their refinement, and their classes, which take turns."""
        config, rng = self.config, stream(self.seed, _STREAM, group)
        first = group * config.group
        count = min(config.group, config.images - first)
        labels = torch.arange(first, first + count) % self.num_classes
        if self.generator is not None:
            drawn = sample_together(self.generator, labels, rng.initial_seed() >> 1, self.ranks)
            return drawn.clamp(*self._limits), labels
        images, known = self.calibration
        # One of the class, or any where it has none: the cross entropy makes it one of the class.
        fits = (known == labels[:, None]).float()
        fits = torch.where(fits.any(1, keepdim=True), fits, 1.0)
        rows = torch.multinomial(fits, 1, generator=rng)[:, 0]
        return warped(images[rows], self._limits, self.flip, rng), labels

    def _begin(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Makes these the group that is refined."""
        self._current, self._classes = nn.Parameter(images.clone()), labels
        self._optimizer = torch.optim.Adam([self._current], self.config.lr, _BETAS, fused=True)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        state = {"images": self.images, "labels": self.labels}
        if self._optimizer is not None:
            state |= {"current": self._current.detach(), "classes": self._classes}
            state |= prefixed("optimizer", optimizer_tensors(self._optimizer))
        return state

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.images, self.labels = tensors["images"], tensors["labels"]
        if "current" in tensors:
            self._begin(tensors["current"], tensors["classes"])
            load_optimizer_tensors(self._optimizer, below("optimizer", tensors))


def refine(
    model: nn.Module,
    calibration: Batch,
    config: RefineConfig | None = None,
    generator: Generator | None = None,
    *,
    seed: int = 0,
    flip: bool = True,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> Batch:
    """Makes images whose BatchNorm statistics are the teacher's own, for `quantize(synthetic=...)`.

    They begin as calibration images, warped (`fdda_fast.data.warped`), or as a generator's, and are
    moved pixel by pixel, group by group, as in DeepInversion (Yin et al., CVPR 2020): by L_BNS over
    the group, in units of the teacher's running statistics, and the cross entropy with the classes.
    They keep within the values of the calibration images.

    A generator that has seen one image of a class makes that image over and over; these differ.

    Args:
        model: teacher with BatchNorm2d layers that torch.fx can trace; not changed.
        calibration: images float32 [N, C, H, W], normalised, and labels int64 [N]; of classes that
            are missing, images begin as those of others.
        generator: of the images to begin with; None: the calibration images.
        seed: decides every draw. flip: mirror half of the calibration images.
        checkpoint: file to keep work in, finished work, too, until whoever has the result
            safe removes it. resume: go on from it.
        progress: called as progress(steps done, total, metrics), on the first rank.
        ranks: which processes share every group; default all.

    Returns:
        images float32 [config.images, C, H, W], and their classes int64, which take turns; where
        there are more classes than images, the last ones have none.

    Raises:
        ValueError: a model without BatchNorm2d, calibration images that do not fit it, a generator
            of other classes or images or of another teacher, a checkpoint of other settings.
        KeyboardInterrupt: interrupted; the checkpoint holds all steps done.
    """
    config, ranks = config or RefineConfig(), ranks or Ranks.world()
    images, labels = calibration
    teacher, num_classes = teacher_of(model, images, labels)
    if generator is not None:
        check_generator(generator, num_classes, tuple(images.shape[1:]), teacher)
    refiner = Refiner(
        teacher, calibration, num_classes, config,
        seed=seed, flip=flip, generator=generator, ranks=ranks,
    )  # fmt: skip
    run_steps(
        refiner.step,
        refiner.steps,
        refiner,
        fingerprint=fingerprint(
            (config, seed, flip),
            images,
            labels,
            model,
            *([] if generator is None else [generator]),
        ),
        checkpoint=checkpoint,
        resume=resume,
        progress=progress,
        ranks=ranks,
    )
    return refiner.images, refiner.labels


def check_generator(
    generator: Generator, num_classes: int, image_shape: tuple[int, ...], teacher: FrozenTeacher
) -> None:
    """Raises ValueError unless the generator's classes, images and teacher are these."""
    made = (generator.num_classes, generator.image_shape)
    if made != (num_classes, image_shape):
        raise ValueError(
            f"generator makes {made[0]} classes of {list(made[1])} images, the model and the "
            f"calibration images have {num_classes} of {list(image_shape)}"
        )
    check_teacher("generator", generator.teacher, teacher.fingerprint)
