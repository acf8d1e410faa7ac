"""Quantisation from a few real images: ranges, the student, fine-tuning with distillation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..config import METHODS, QuantizeConfig
from ..data.augment import blended, random_resized_crop, random_shift
from ..distributed import ALONE, Ranks
from ..fingerprints import check_teacher, fingerprint
from ..generator import Generator, sample_together
from ..layers import layers_of, use_layers
from ..losses import distillation
from ..seeding import stream
from ..statistics import BNSCenters, check_labelled_images, collect_centers
from ..synthesis import GeneratorTrainer
from ..teacher import FrozenTeacher
from ..training import (
    Metrics,
    Progress,
    below,
    load_optimizer_tensors,
    optimizer_tensors,
    prefixed,
    run_steps,
)
from .bits import Bits
from .clipping import clip_weights
from .correction import correct_batch_norms
from .fusion import cast_convolutions, fuse_norms
from .modules import activation_quantizers, quantizer_mode, take_ranges
from .prepare import prepare
from .reconstruction import Reconstruction

Batch = tuple[torch.Tensor, torch.Tensor]
_CORRECTION_IMAGES = 256
_REAL_STREAM, _SYNTHETIC_STREAM, _LABEL_STREAM, _BLEND_STREAM = 30, 31, 32, 33


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
        use_layers(self.fused, layers_of(dtype))
        if dtype != torch.float32:
            cast_convolutions(self.fused, dtype)
        quantizers = activation_quantizers(student)
        ranges = [q.log_range.requires_grad_(config.range_lr > 0) for q in quantizers]
        parameters = student.parameters() if config.average_decay else ()
        self.average = [p.detach().clone() for p in parameters]
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
            images = torch.cat(batches)[:_CORRECTION_IMAGES]
            exact = FrozenTeacher(self.model, tuple(images.shape[1:]))
            correct_batch_norms(self.student, exact, images)

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
        return {"student_loss": student_loss, "agreement": agreement}

    @torch.no_grad()
    def _move_average(self, index: int) -> None:
        decay = min(self.config.average_decay, (1 + index) / (10 + index))
        for average, parameter in zip(self.average, self.student.parameters(), strict=True):
            average.lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def finish(self) -> fx.GraphModule:
        """The averaged student, its learned ranges made final; ValueError where a step diverged."""
        parameters = list(self.student.parameters())
        for result, parameter in zip(self.average or parameters, parameters, strict=True):
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
            **prefixed("student_optimizer", optimizer_tensors(self.optimizer)),
            **prefixed("range_optimizer", optimizer_tensors(self.range_optimizer)),
        }

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.student.load_state_dict(below("student", tensors))
        for index, average in enumerate(self.average):
            average.copy_(tensors[f"average.{index}"])
        load_optimizer_tensors(self.optimizer, below("student_optimizer", tensors))
        load_optimizer_tensors(self.range_optimizer, below("range_optimizer", tensors))


class JointTraining:
    """Generator and student trained in one loop, as FDDA does (sections 3.3 and 4.1)."""

    def __init__(self, tuner: Finetuner, trainer: GeneratorTrainer) -> None:
        if tuner.config.synthetic_batch > trainer.config.batch_size:
            raise ValueError(
                f"QuantizeConfig.synthetic_batch must be <= synthesis.batch_size "
                f"({trainer.config.batch_size}) where the generator is trained along, "
                f"got {tuner.config.synthetic_batch}"
            )
        self.tuner, self.trainer, self.config = tuner, trainer, tuner.config
        if trainer.config.dtype == tuner.config.dtype:
            trainer.teacher = tuner.teacher  # one copy

    def step(self, index: int) -> Metrics:
        config = self.config
        start = config.warmup_steps
        if index == start and config.ranges != "reference":
            source = _synthetic_source(self.trainer.generator, config, self.tuner.ranks)
            self.tuner.calibrate(_range_batches(self.tuner, source))
        self.tuner.student.zero_grad()  # the other's step may have the memory
        images, labels, metrics = self.trainer.step(index)
        ranks, count = self.tuner.ranks, self.trainer.config.batch_size
        images, labels = (ranks.gather_rows(rows, count) for rows in (images, labels))
        if index < config.range_steps and config.ranges == "reference":
            self.tuner.observe(images)
        if index < start:
            return metrics
        self.trainer.optimizer.zero_grad()
        synthetic = (images[: config.synthetic_batch], labels[: config.synthetic_batch])
        return {**metrics, **self.tuner.step(index - start, synthetic)}

    def state_tensors(self) -> dict[str, torch.Tensor]:
        return {**self.tuner.state_tensors(), **self.trainer.state_tensors()}

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tuner.load_state_tensors(tensors)
        self.trainer.load_state_tensors(tensors)


class ReconstructedTuning:
    """The generator where one is to be trained, then reconstruction, then fine-tuning."""

    def __init__(
        self, tuner: Finetuner, generator: Generator | None, trainer: GeneratorTrainer | None
    ) -> None:
        config = tuner.config
        self.tuner, self.trainer = tuner, trainer
        self.source = _synthetic_source(
            generator if trainer is None else trainer.generator, config, tuner.ranks
        )
        self.reconstruction = Reconstruction(
            tuner.student,
            tuner.model,
            self._images,
            tuple(tuner.images.shape[1:]),
            config,
            tuner.ranks,
        )
        self._made: torch.Tensor | None = None
        self.warmup = 0 if trainer is None else config.warmup_steps
        self.start = self.warmup + self.reconstruction.steps
        self.total = self.start + config.steps

    def _images(self) -> torch.Tensor:
        """Like those of the fine-tuning steps, but none of these."""
        if self._made is None:
            config, made = self.tuner.config, []
            batch = config.real_batch + config.synthetic_batch
            for index in range(-(-config.reconstruct.images // batch)):
                index += config.steps + config.range_steps
                made.append(self.tuner.blended_batch(index, self.source(index))[0])
            self._made = torch.cat(made)[: config.reconstruct.images]
        return self._made

    def step(self, index: int) -> Metrics:
        if index < self.warmup:
            return self.trainer.step(index)[2]
        if index < self.start:
            return self.reconstruction.step(index - self.warmup)
        index -= self.start
        if index == 0:
            self.tuner.begin()
        return self.tuner.step(index, self.source(index))

    def state_tensors(self) -> dict[str, torch.Tensor]:
        return {
            **self.tuner.state_tensors(),
            **prefixed("reconstruction", self.reconstruction.state_tensors()),
            **({} if self.trainer is None else self.trainer.state_tensors()),
        }

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tuner.load_state_tensors(tensors)
        self.reconstruction.load_state_tensors(below("reconstruction", tensors))
        if self.trainer is not None:
            self.trainer.load_state_tensors(tensors)


def quantize(
    model: nn.Module,
    calibration: Batch,
    bits: Bits | None = None,
    config: QuantizeConfig | None = None,
    generator: Generator | None = None,
    *,
    method: str = "fdda",
    centers: BNSCenters | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> fx.GraphModule:
    """Quantises a trained CNN with a few labelled images.

    Where torch.distributed is initialised, all processes must call this: they share every batch,
    and get what one process would but for rounding.

    Args:
        model: teacher; not changed.
        calibration: images float32 [N, C, H, W], normalised, and labels int64 [N]; classes may
            be missing.
        bits: default Bits(4, 4).
        config: default the preset `fast`. With steps=0 nothing is fine-tuned; `fdda` then takes
            only the activation ranges, from the calibration images or, with a generator, from
            batches like those of the steps.
        generator: synthetic images come from it; None: one is trained along the way, as in FDDA.
        method: `fdda` fine-tunes the student from end to end. `reconstruct` learns its rounding and
            ranges instead, unit by unit, from the calibration images alone. `fdda+reconstruct`
            does that from synthetic images, too, and then fine-tunes from end to end; where it
            trains the generator, it does so before, in `warmup_steps`.
        centers: of the calibration images, when they are known already.
        checkpoint: file to keep unfinished training in. resume: go on from it.
        progress: called as progress(steps done, total, metrics), on the first rank.

    Returns:
        The student, a GraphModule in eval mode with fake quantisation; differentiable.

    Raises:
        ValueError: inputs that do not fit each other, a layer that cannot be quantised, no class
            with a reliable center, a checkpoint of other settings.
        KeyboardInterrupt: interrupted; the checkpoint holds all steps done.
    """
    bits, config = bits or Bits(), config or QuantizeConfig()
    _check_method(method, config, generator)
    if method == "reconstruct":
        batch = config.real_batch + config.synthetic_batch
        config = config.replace(steps=0, real_batch=batch, synthetic_batch=0)
    images, labels = calibration
    check_labelled_images("calibration images", images, labels, 1 << 31)
    teacher = FrozenTeacher(model, tuple(images.shape[1:]))
    with torch.no_grad():
        num_classes = teacher(images[:1]).shape[1]
    check_labelled_images("calibration images", images, labels, num_classes)
    if generator is not None:
        made = (generator.num_classes, generator.image_shape)
        if made != (num_classes, tuple(images.shape[1:])):
            raise ValueError(
                f"generator makes {made[0]} classes of {list(made[1])} images, the model and the "
                f"calibration images have {num_classes} of {list(images.shape[1:])}"
            )
        check_teacher("generator", generator.teacher, teacher.fingerprint)
    student = prepare(
        model,
        bits,
        placement=config.placement,
        keep_float=config.keep_float,
        from_zero=config.ranges == "reference" and config.steps > 0,
    )
    if config.weight_ranges != "auto" or config.ranges == "mse":
        clip_weights(student, config.weight_ranges, config.percentile)
    ranks = Ranks.world()
    tuner = Finetuner(student, model, (images, labels), config, ranks)
    if config.steps == 0 and method == "fdda":
        if generator is not None:
            tuner.calibrate(_range_batches(tuner, _synthetic_source(generator, config, ranks)))
            return tuner.finish()
        if config.range_images == "synthetic":
            raise ValueError("QuantizeConfig.range_images='synthetic' needs a generator or steps")
        tuner.calibrate(images.split(_CORRECTION_IMAGES))
        return tuner.finish()
    trainer = None
    if generator is None and config.synthetic_batch:
        centers = centers or collect_centers(model, images, labels, num_classes)
        trainer = GeneratorTrainer(model, centers, config.synthesis, ranks)
    step: Callable[[int], Metrics]
    if method != "fdda":
        stages = ReconstructedTuning(tuner, generator, trainer)
        step, state, total = stages.step, stages, stages.total
    elif trainer is not None:
        both = JointTraining(tuner, trainer)
        step, state, total = both.step, both, config.warmup_steps + config.steps
    else:
        source = _synthetic_source(generator, config, ranks)
        tuner.calibrate(_range_batches(tuner, source))
        step, state, total = lambda i: tuner.step(i, source(i)), tuner, config.steps
    run_steps(
        step,
        total,
        state,
        fingerprint=fingerprint(
            (bits, config, method),
            images,
            labels,
            model,
            *([] if generator is None else [generator]),
        ),
        checkpoint=Path(checkpoint) if checkpoint is not None else None,
        resume=resume,
        progress=progress,
        ranks=ranks,
    )
    if method != "fdda" and config.steps == 0:
        tuner.begin()
    return tuner.finish()


def _check_method(method: str, config: QuantizeConfig, generator: Generator | None) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if method == "reconstruct" and generator is not None:
        raise ValueError("method 'reconstruct' takes no generator, its images are real ones")
    if method != "fdda" and config.ranges == "reference":
        raise ValueError(
            f"QuantizeConfig.ranges must not be 'reference' with method {method!r}, whose ranges "
            "come from the images that it learns on"
        )
    if method != "fdda" and config.range_images != "all":
        raise ValueError(
            f"QuantizeConfig.range_images must be 'all' with method {method!r}, "
            f"got {config.range_images!r}"
        )


def _range_batches(
    tuner: Finetuner, source: Callable[[int], Batch | None]
) -> Iterator[torch.Tensor]:
    """Batches like those of the fine-tuning steps, or a part of them, but none of these."""
    config, first = tuner.config, tuner.config.steps
    # A batch begins with the real images.
    rows = {
        "all": slice(None),
        "real": slice(config.real_batch),
        "synthetic": slice(config.real_batch, None),
    }[config.range_images]
    for index in range(first, first + config.range_steps):
        yield tuner.batch(index, source(index))[0][rows]


def _synthetic_source(
    generator: Generator | None, config: QuantizeConfig, ranks: Ranks
) -> Callable[[int], Batch | None]:
    """Batches of a finished generator by step; nothing where none is wanted."""
    if generator is None or config.synthetic_batch == 0:
        return lambda index: None

    def batch(index: int) -> Batch:
        rng = stream(config.seed, _LABEL_STREAM, index)
        labels = torch.randint(generator.num_classes, (config.synthetic_batch,), generator=rng)
        return sample_together(generator, labels, int(rng.initial_seed() >> 1), ranks), labels

    return batch
