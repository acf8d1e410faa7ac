"""Fine-tuning with distillation: the student, its ranges, and the step that trains both."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..config import QuantizeConfig
from ..data.augment import blended, random_resized_crop, random_shift
from ..distributed import ALONE, Ranks
from ..layers import LAYERS, use_layers
from ..losses import distillation
from ..seeding import stream
from ..teacher import FrozenTeacher
from ..training import Metrics, below, load_optimizer_tensors, optimizer_tensors, prefixed
from .correction import correct_batch_norms
from .fusion import cast_convolutions, fuse_norms
from .modules import activation_quantizers, quantizer_mode, take_ranges
from .selection import Selection

Batch = tuple[torch.Tensor, torch.Tensor]
CORRECTION_IMAGES = 256
_REAL_STREAM, _SYNTHETIC_STREAM, _BLEND_STREAM = 30, 31, 33


class Finetuner:
    """The fake-quantised student and the step that distils the teacher into it.

    Args:
        student: from `prepare`, ranges not yet known.
        model: teacher; not changed.
        calibration: real images float32 [N, C, H, W] and labels int64 [N].
        ranks: do the steps together, each with its share of every batch. Ranges and batch norms
            are calibrated by every one alike, on whole batches.
    """

    def __init__(
        self,
        student: fx.GraphModule,
        model: nn.Module,
        calibration: Batch,
        config: QuantizeConfig,
        ranks: Ranks = ALONE,
    ) -> None:
        images = config.real_batch + config.synthetic_batch
        ranks.check_batch("QuantizeConfig.real_batch + synthetic_batch", images)
        self.ranks = ranks
        self.student = student.eval()
        self.images, self.labels = calibration
        self.model, self.config = model, config
        image_shape, dtype = tuple(self.images.shape[1:]), getattr(torch, config.dtype)
        self.teacher = FrozenTeacher(model, image_shape, dtype)
        # For the steps alone, with the same parameters.
        self.fused = fuse_norms(student, image_shape)
        use_layers(self.fused, LAYERS)
        if dtype != torch.float32:
            cast_convolutions(self.fused, dtype)
        quantizers = activation_quantizers(student)
        ranges = [q.log_range.requires_grad_(config.range_lr > 0) for q in quantizers]
        parameters = student.parameters() if config.average_decay else ()
        self.average = [p.detach().clone() for p in parameters]
        # Where it has images to look at, from `hold_out`.
        self.selection = Selection(student, config.patience, config.temperature, ranks)
        known = {id(parameter) for parameter in ranges}
        self.weights = [p for p in student.parameters() if id(p) not in known]
        self.optimizer = torch.optim.SGD(
            self.weights,
            config.lr,
            config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.momentum > 0,
            fused=True,
        )
        # As a group, since there may be no ranges at all.
        self.range_optimizer = torch.optim.Adam([{"params": ranges}], config.range_lr, fused=True)

    @torch.no_grad()
    def observe(self, images: torch.Tensor) -> None:
        """Moves the activation ranges by one batch."""
        with quantizer_mode(self.student, "observe"):
            self.student(images)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[torch.Tensor]) -> None:
        """Takes the activation ranges from `batches`, then corrects the batch norms on them."""
        batches = list(batches)
        take_ranges(self.student, batches, self.config.ranges, self.config.percentile)
        if self.config.correct_batch_norms:
            images = torch.cat(batches)[:CORRECTION_IMAGES]
            exact = FrozenTeacher(self.model, tuple(images.shape[1:]))
            correct_batch_norms(self.student, exact, images)

    def hold_out(self, batches: Iterable[torch.Tensor]) -> None:
        """Lets the steps look, every `check_every`, at images that they do not learn from."""
        self.selection.hold_out(batches, self.teacher)

    def batch(self, index: int, synthetic: Batch | None) -> Batch:
        """Real images and the given synthetic ones, both freshly augmented."""
        config, parts = self.config, []
        if config.real_batch:
            rng = stream(config.seed, _REAL_STREAM, index)
            rows = torch.randint(len(self.images), (config.real_batch,), generator=rng)
            real = self._augmented(self.images[rows], config.real_crop, rng)
            parts.append((real, self.labels[rows]))
        if synthetic is not None:
            rng = stream(config.seed, _SYNTHETIC_STREAM, index)
            images, labels = synthetic
            parts.append((self._augmented(images, config.synthetic_crop, rng), labels))
        images, labels = zip(*parts, strict=True)
        return torch.cat(images), torch.cat(labels)

    def blended_batch(self, index: int, synthetic: Batch | None) -> Batch:
        """`batch`, its images blended with each other."""
        config = self.config
        images, labels = self.batch(index, synthetic)
        if config.blend:
            images = blended(images, config.blend, stream(config.seed, _BLEND_STREAM, index))
        return images, labels

    def _augmented(
        self, images: torch.Tensor, crop: tuple[float, float], rng: torch.Generator
    ) -> torch.Tensor:
        config = self.config
        if config.augmentation == "crop":
            return random_resized_crop(images, crop, config.flip, rng)
        pixels = round(config.max_shift * min(images.shape[2:]))
        return random_shift(images, pixels, config.flip, rng)

    def step(self, index: int, synthetic: Batch | None) -> Metrics:
        """Fine-tuning step `index`."""
        config = self.config
        if index == 0 and self.selection.ready:
            self._look()
        images, labels = self.blended_batch(index, synthetic)
        # Not before: images are blended with any other of the batch.
        rows = self.ranks.share(len(images))
        share = len(images[rows]) / len(images)
        images, labels = images[rows], labels[rows]
        phase = index / (config.cosine_steps or config.steps)
        factor = 0.5 * (1 + math.cos(math.pi * phase))
        self.optimizer.param_groups[0]["lr"] = config.lr * factor
        self.range_optimizer.param_groups[0]["lr"] = config.range_lr * factor
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            teacher_logits = self.teacher(images)
        logits = self.fused(images)
        divergence = distillation(logits, teacher_logits, config.temperature)
        loss = config.distillation_weight * divergence
        if config.label_weight:
            loss = loss + config.label_weight * F.cross_entropy(logits, labels)
        agreement = (logits.argmax(1) == teacher_logits.argmax(1)).float().mean()
        self.student.zero_grad()
        (share * loss).backward()
        figures = share * torch.stack([loss.detach(), agreement])
        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        self.ranks.sum_([*gradients, figures])
        student_loss, agreement = figures.tolist()
        if not math.isfinite(student_loss):
            raise ValueError(f"fine-tuning diverged at step {index}: lower the learning rate")
        if math.isfinite(config.max_grad_norm):
            nn.utils.clip_grad_norm_(self.weights, config.max_grad_norm)
        self.optimizer.step()
        self.range_optimizer.step()
        if self.average:
            self._move_average(index)
        done = index + 1
        if self.selection.ready and (done % config.check_every == 0 or done == config.steps):
            self._look()
        return {"student_loss": student_loss, "agreement": agreement}

    @torch.no_grad()
    def _move_average(self, index: int) -> None:
        decay = min(self.config.average_decay, (1 + index) / (10 + index))
        for average, parameter in zip(self.average, self.student.parameters(), strict=True):
            average.lerp_(parameter, 1 - decay)

    def _look(self) -> None:
        self.selection.look(self.average or list(self.student.parameters()))

    @torch.no_grad()
    def finish(self) -> fx.GraphModule:
        """The best or averaged student, its ranges made final; ValueError if a step diverged."""
        parameters = list(self.student.parameters())
        results = self.selection.best or self.average or parameters
        for result, parameter in zip(results, parameters, strict=True):
            if not bool(result.isfinite().all()):
                raise ValueError("fine-tuning diverged in its last step: lower the learning rate")
            parameter.copy_(result)
        for quantizer in activation_quantizers(self.student):
            quantizer.keep_learned_range()
        return self.student

    @torch.no_grad()
    def begin(self) -> None:
        """Starts from what the student has become: its ranges can be learned again."""
        for average, parameter in zip(self.average, self.student.parameters(), strict=False):
            average.copy_(parameter)
        for quantizer in activation_quantizers(self.student):
            quantizer.log_range.requires_grad_(self.config.range_lr > 0)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        return {
            **prefixed("student", self.student.state_dict()),
            **prefixed("average", {str(i): t for i, t in enumerate(self.average)}),
            **prefixed("selection", self.selection.state_tensors()),
            **prefixed("student_optimizer", optimizer_tensors(self.optimizer)),
            **prefixed("range_optimizer", optimizer_tensors(self.range_optimizer)),
        }

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.student.load_state_dict(below("student", tensors))
        for index, average in enumerate(self.average):
            average.copy_(tensors[f"average.{index}"])
        self.selection.load_state_tensors(below("selection", tensors))
        load_optimizer_tensors(self.optimizer, below("student_optimizer", tensors))
        load_optimizer_tensors(self.range_optimizer, below("range_optimizer", tensors))
