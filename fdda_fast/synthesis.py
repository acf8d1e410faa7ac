"""Generator training (FDDA section 3, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .config import SynthesisConfig
from .distributed import ALONE, Ranks, merged_over_ranks
from .fingerprints import check_teacher, fingerprint
from .generator import Generator, latents
from .losses import (
    distorted,
    first_deep_layer,
    moment_distance,
    standard_normal_targets,
)
from .seeding import stream
from .statistics import BNSCenters, whitened
from .teacher import FrozenTeacher, Moments
from .training import (
    Metrics,
    Progress,
    below,
    load_optimizer_tensors,
    optimizer_tensors,
    prefixed,
    run_steps,
)

_INIT_STREAM, _STEP_STREAM = 10, 11
_ENTROPIES = ("ce", "class_ce")


class _Part(NamedTuple):
    """A rank's rows of a batch."""

    z: torch.Tensor
    labels: torch.Tensor
    groups: torch.Tensor
    share: float = 1.0  # of the batch


def batch_sizes(config: SynthesisConfig, centers: BNSCenters) -> dict[str, int]:
    """Images of a step's two batches, of which every process needs one."""
    classes = min(config.classes_per_step, int(centers.reliable.sum()))
    return {
        "SynthesisConfig.batch_size": config.batch_size,
        "images_per_class * classes per step": config.images_per_class * classes,
    }


class GeneratorTrainer:
    """The generator, its optimizer and the step that trains it.

    Args:
        model: teacher; not changed.
        centers: of the calibration images.
        ranks: train it together, each with its share of every batch.

    Raises:
        ValueError: no class has a reliable center, the centers are another teacher's, or a batch
            has too few images for the ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        centers: BNSCenters,
        config: SynthesisConfig,
        ranks: Ranks = ALONE,
    ) -> None:
        if not bool(centers.reliable.any()):
            raise ValueError(
                "the teacher misclassifies the calibration images of every class; "
                "check their labels and preprocessing"
            )
        for name, images in batch_sizes(config, centers).items():
            ranks.check_batch(name, images)
        self.ranks = ranks
        self.teacher = FrozenTeacher(model, centers.image_shape, getattr(torch, config.dtype))
        check_teacher("centers", centers.teacher, self.teacher.fingerprint)
        self.centers = centers
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(config.seed, _INIT_STREAM).initial_seed())
            self.generator = Generator(
                centers.num_classes, centers.image_shape, self.teacher.fingerprint
            )
        self.generator.train()
        self.weights = {
            "ce": config.ce_weight,
            "bns": config.bns_weight,
            "class_ce": config.class_ce_weight,
            "distorted": config.distorted_weight,
            "centralized": config.centralized_weight,
        }
        self.optimizer = torch.optim.Adam(
            self.generator.parameters(), config.lr, config.betas, fused=True
        )

    def step(self, index: int) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
        """One step; returns this rank's share of batch A (images detached), and the losses."""
        config, rng = self.config, stream(self.config.seed, _STEP_STREAM, index)
        labels_a = torch.randint(self.centers.num_classes, (config.batch_size,), generator=rng)
        classes = self._choose_classes(index, rng)
        labels_b = classes.repeat_interleave(config.images_per_class)
        groups_b = torch.arange(len(classes)).repeat_interleave(config.images_per_class)
        z = latents(len(labels_a) + len(labels_b), rng)
        a = self._part(z[: len(labels_a)], labels_a, torch.zeros_like(labels_a))
        b = self._part(z[len(labels_a) :], labels_b, groups_b)
        split = len(a.labels)

        passed = sum(index >= milestone for milestone in config.lr_milestones)
        self.optimizer.param_groups[0]["lr"] = config.lr * config.lr_decay**passed
        self.optimizer.zero_grad()
        if config.joint_pass:
            both = _Part(
                *map(torch.cat, ((a.z, b.z), (a.labels, b.labels), (a.groups, 1 + b.groups)))
            )
            images, logits, moments = self._observe(both, 1 + len(classes))
            images = images[:split]
            random = [Moments(m.mean[:1], m.var[:1]) for m in moments]
            by_class = [Moments(m.mean[1:], m.var[1:]) for m in moments]
            losses = self._random_losses(logits[:split], random, a)
            losses |= self._class_losses(logits[split:], by_class, b, classes, rng)
            losses = self._backward(losses)
        else:  # nothing is shared: one after the other, in half the memory
            images, *seen = self._observe(a, 1)
            losses = self._backward(self._random_losses(*seen, a))
            _, *seen = self._observe(b, len(classes))
            losses |= self._backward(self._class_losses(*seen, b, classes, rng))
        metrics = self._add_up(losses)
        self.optimizer.step()
        loss = sum(self.weights[name] * value for name, value in metrics.items())
        return images, a.labels, {"loss": loss, **metrics}

    def _part(self, z: torch.Tensor, labels: torch.Tensor, groups: torch.Tensor) -> _Part:
        rows = self.ranks.share(len(labels))
        return _Part(z[rows], labels[rows], groups[rows], len(labels[rows]) / len(labels))

    def _observe(
        self, part: _Part, num_groups: int
    ) -> tuple[torch.Tensor, torch.Tensor, list[Moments]]:
        """Images of one pass (detached), their logits, and moments as the losses take them.

        Images and logits are this rank's, moments those of all ranks' images.
        """
        dtype = getattr(torch, self.config.dtype)
        images = self.generator(part.z, part.labels, dtype, self.ranks).float()
        logits, moments = self.teacher.with_moments(images, part.groups, num_groups)
        count = torch.bincount(part.groups, minlength=num_groups)
        moments, _ = merged_over_ranks(moments, count, self.ranks)
        return images.detach(), logits, self._comparable(moments)

    def _comparable(self, moments: Sequence[Moments]) -> Sequence[Moments]:
        return whitened(moments, self.teacher.running) if self.config.whiten else moments

    def _backward(self, losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        sum(self.weights[name] * loss for name, loss in losses.items()).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def _add_up(self, losses: dict[str, torch.Tensor]) -> Metrics:
        """Adds up over the ranks what differs between them: gradients and cross entropies."""
        entropies = torch.stack([losses[name] for name in _ENTROPIES])
        self.ranks.sum_([*(p.grad for p in self.generator.parameters()), entropies])
        losses |= zip(_ENTROPIES, entropies, strict=True)
        return {name: float(loss) for name, loss in losses.items()}

    def _choose_classes(self, index: int, rng: torch.Generator) -> torch.Tensor:
        if index < self.config.any_class_steps:
            pool = torch.arange(self.centers.num_classes)
        else:
            pool = self.centers.reliable.nonzero()[:, 0]
        count = min(self.config.classes_per_step, len(pool))
        return pool[torch.randperm(len(pool), generator=rng)[:count]]

    def _cross_entropy(self, logits: torch.Tensor, part: _Part) -> torch.Tensor:
        """What these rows add to the batch's."""
        return part.share * F.cross_entropy(logits, self.centers.first_class + part.labels)

    def _random_losses(
        self, logits: torch.Tensor, moments: list[Moments], part: _Part
    ) -> dict[str, torch.Tensor]:
        """Cross entropy and L_BNS, of batch A."""
        running = self._comparable(self.teacher.running)
        bns = moment_distance(moments, running, range(len(moments))).mean()
        return {"ce": self._cross_entropy(logits, part), "bns": bns}

    def _class_losses(
        self,
        logits: torch.Tensor,
        moments: list[Moments],
        part: _Part,
        classes: torch.Tensor,
        rng: torch.Generator,
    ) -> dict[str, torch.Tensor]:
        """Cross entropy, L_D and L_C, averaged over the classes of batch B.

        A class without a reliable center gets N(0, 1) targets on every layer at twice the weight
        in place of L_D, and no L_C.
        """
        deep = range(first_deep_layer(len(moments)), len(moments))
        reliable = self.centers.reliable[classes]
        centers = self._comparable(self.centers.of(classes))
        config = self.config
        noisy = distorted(centers, config.distortion_std, rng, clamp=config.clamp_variance)
        distorted_loss = moment_distance(moments, noisy, deep)
        if not bool(reliable.all()):
            noise = standard_normal_targets(moments, rng)
            unreliable_loss = 2 * moment_distance(moments, noise, range(len(moments)))
            distorted_loss = torch.where(reliable, distorted_loss, unreliable_loss)
        centralized_loss = moment_distance(moments, centers, deep) * reliable
        return {
            "class_ce": self._cross_entropy(logits, part),
            "distorted": distorted_loss.mean(),
            "centralized": centralized_loss.mean(),
        }

    def state_tensors(self) -> dict[str, torch.Tensor]:
        return {
            **prefixed("generator", self.generator.state_dict()),
            **prefixed("optimizer", optimizer_tensors(self.optimizer)),
        }

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.generator.load_state_dict(below("generator", tensors))
        load_optimizer_tensors(self.optimizer, below("optimizer", tensors))


def train_generator(
    model: nn.Module,
    centers: BNSCenters,
    config: SynthesisConfig | None = None,
    *,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> Generator:
    """Trains a class-conditional generator whose images reproduce the teacher's BNS class by class.

    Where torch.distributed is initialised, all processes must call this: they train one generator,
    each computing its share of every batch, and get what one process would but for rounding.

    Args:
        model: teacher with BatchNorm2d layers that torch.fx can trace; not changed.
        centers: from `collect_centers`, perhaps `between` two classes.
        checkpoint: file to keep training in, finished training, too, until whoever has the result
            safe removes it. resume: go on from it.
        progress: called as progress(steps done, total, metrics), on the first rank.
        ranks: which processes train it; default all.

    Returns:
        The generator in eval mode.

    Raises:
        ValueError: no class has a reliable center; centers of another teacher; fewer images in a
            batch than processes; a checkpoint of other settings.
        KeyboardInterrupt: interrupted; the checkpoint holds all steps done.
    """
    config = config or SynthesisConfig()
    ranks = ranks or Ranks.world()
    trainer = GeneratorTrainer(model, centers, config, ranks)
    run_steps(
        lambda index: trainer.step(index)[2],
        config.steps,
        trainer,
        fingerprint=fingerprint(config, *centers.mean, *centers.var, model),
        checkpoint=checkpoint,
        resume=resume,
        progress=progress,
        ranks=ranks,
    )
    return trainer.generator.eval()
