"""Generator training (FDDA section 3, Algorithm 1)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .config import SynthesisConfig, to_dict
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


class GeneratorTrainer:
    """The generator, its optimizer and the step that trains it.

    Args:
        model: teacher; not changed.
        centers: of the calibration images.

    Raises:
        ValueError: no class has a reliable center.
    """

    def __init__(
        self,
        model: nn.Module,
        centers: BNSCenters,
        config: SynthesisConfig,
    ) -> None:
        if not bool(centers.reliable.any()):
            raise ValueError(
                "the teacher misclassifies the calibration images of every class; "
                "check their labels and preprocessing"
            )
        self.teacher = FrozenTeacher(model, centers.image_shape, getattr(torch, config.dtype))
        self.centers = centers
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(config.seed, _INIT_STREAM).initial_seed())
            self.generator = Generator(centers.num_classes, centers.image_shape)
        self.generator.train()
        self.optimizer = torch.optim.Adam(
            self.generator.parameters(), config.lr, config.betas, fused=True
        )

    def step(self, index: int) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
        """One step; returns batch A (images detached, labels) and the losses."""
        config, rng = self.config, stream(self.config.seed, _STEP_STREAM, index)
        labels_a = torch.randint(self.centers.num_classes, (config.batch_size,), generator=rng)
        classes = self._choose_classes(index, rng)
        labels_b = classes.repeat_interleave(config.images_per_class)
        labels = torch.cat([labels_a, labels_b])
        z = latents(len(labels), rng)

        passed = sum(index >= milestone for milestone in config.lr_milestones)
        self.optimizer.param_groups[0]["lr"] = config.lr * config.lr_decay**passed
        self.optimizer.zero_grad()
        images = self._generate(z, labels)
        groups = torch.cat(
            [
                torch.zeros_like(labels_a),
                torch.arange(1, len(classes) + 1).repeat_interleave(config.images_per_class),
            ]
        )
        logits, moments = self.teacher.with_moments(images, groups, 1 + len(classes))
        running = self.teacher.running
        targets, centers = running, self.centers.of(classes)
        if config.whiten:
            moments, targets, centers = (whitened(m, running) for m in (moments, targets, centers))
        random_batch = [Moments(m.mean[:1], m.var[:1]) for m in moments]
        class_batches = [Moments(m.mean[1:], m.var[1:]) for m in moments]

        bns = moment_distance(random_batch, targets, range(len(moments))).mean()
        distorted_loss, centralized_loss = self._class_losses(classes, class_batches, centers, rng)
        ce = F.cross_entropy(logits[: config.batch_size], labels_a)
        class_ce = F.cross_entropy(logits[config.batch_size :], labels_b)
        loss = (
            config.ce_weight * ce
            + config.bns_weight * bns
            + config.class_ce_weight * class_ce
            + config.distorted_weight * distorted_loss
            + config.centralized_weight * centralized_loss
        )
        loss.backward()
        self.optimizer.step()
        named = {
            "loss": loss, "ce": ce, "bns": bns, "class_ce": class_ce,
            "distorted": distorted_loss, "centralized": centralized_loss,
        }  # fmt: skip
        metrics = {name: float(value.detach()) for name, value in named.items()}
        return images[: config.batch_size].detach(), labels_a, metrics

    def _choose_classes(self, index: int, rng: torch.Generator) -> torch.Tensor:
        if index < self.config.any_class_steps:
            pool = torch.arange(self.centers.num_classes)
        else:
            pool = self.centers.reliable.nonzero()[:, 0]
        count = min(self.config.classes_per_step, len(pool))
        return pool[torch.randperm(len(pool), generator=rng)[:count]]

    def _generate(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        split = self.config.batch_size
        groups = [len(z)] if self.config.joint_pass else [split, len(z) - split]
        dtype = getattr(torch, self.config.dtype)
        return self.generator(z, labels, groups, dtype).float()

    def _class_losses(
        self,
        classes: torch.Tensor,
        moments: list[Moments],
        centers: list[Moments],
        rng: torch.Generator,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """L_D and L_C, averaged over the classes of batch B.

        A class without a reliable center gets N(0, 1) targets on every layer at twice the weight
        in place of L_D, and no L_C.
        """
        deep = range(first_deep_layer(len(moments)), len(moments))
        reliable = self.centers.reliable[classes]
        config = self.config
        noisy = distorted(centers, config.distortion_std, rng, clamp=config.clamp_variance)
        distorted_loss = moment_distance(moments, noisy, deep)
        if not bool(reliable.all()):
            noise = standard_normal_targets(moments, rng)
            unreliable_loss = 2 * moment_distance(moments, noise, range(len(moments)))
            distorted_loss = torch.where(reliable, distorted_loss, unreliable_loss)
        centralized_loss = moment_distance(moments, centers, deep) * reliable
        return distorted_loss.mean(), centralized_loss.mean()

    def state_tensors(self) -> dict[str, torch.Tensor]:
        return {
            **prefixed("generator", self.generator.state_dict()),
            **prefixed("optimizer", optimizer_tensors(self.optimizer)),
        }

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.generator.load_state_dict(below("generator", tensors))
        load_optimizer_tensors(self.optimizer, below("optimizer", tensors))


def fingerprint(config: object, *tensors: torch.Tensor) -> str:
    """Names settings and inputs, so that a checkpoint is not continued under others."""
    digest = hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def train_generator(
    model: nn.Module,
    centers: BNSCenters,
    config: SynthesisConfig | None = None,
    *,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Generator:
    """Trains a class-conditional generator whose images reproduce the teacher's BNS class by class.

    Args:
        model: teacher with BatchNorm2d layers that torch.fx can trace; not changed.
        centers: from `collect_centers`.
        checkpoint: file to keep unfinished training in. resume: go on from it.
        progress: called as progress(steps done, total, metrics).

    Returns:
        The generator in eval mode.

    Raises:
        ValueError: no class has a reliable center; a checkpoint of other settings.
        KeyboardInterrupt: interrupted; the checkpoint holds all steps done.
    """
    config = config or SynthesisConfig()
    trainer = GeneratorTrainer(model, centers, config)
    run_steps(
        lambda index: trainer.step(index)[2],
        config.steps,
        trainer,
        fingerprint=fingerprint(config, *centers.mean, *centers.var, *model.state_dict().values()),
        checkpoint=Path(checkpoint) if checkpoint is not None else None,
        resume=resume,
        progress=progress,
    )
    return trainer.generator.eval()
