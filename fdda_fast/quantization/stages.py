"""The stages of quantisation that have a generator or a reconstruction beside the fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ..config import QuantizeConfig
from ..data.augment import warped
from ..distributed import Ranks
from ..generator import Generator, sample_together
from ..refinement import Refiner, limits_of
from ..seeding import stream
from ..synthesis import GeneratorTrainer
from ..training import Metrics, Stateful, below, prefixed
from .finetune import Batch, Finetuner
from .reconstruction import Reconstruction

_LABEL_STREAM, _START_STREAM, _REFINED_STREAM = 32, 34, 35


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
        self.total = tuner.config.warmup_steps + tuner.config.steps
        if trainer.config.dtype == tuner.config.dtype:
            trainer.teacher = tuner.teacher  # one copy

    def step(self, index: int) -> Metrics:
        config = self.config
        start = config.warmup_steps
        if index == start and config.ranges != "reference":
            source = synthetic_source(self.trainer.generator, config, self.tuner.ranks)
            self.tuner.calibrate(range_batches(self.tuner, source))
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


class StagedTuning:
    """One stage after the other: generator, refinement, reconstruction, fine-tuning.

    Args:
        generator: finished; None: that of `trainer`, if any.
        trainer: of a generator that is not there yet.
        reconstruct: whether there is a reconstruction.
    """

    def __init__(
        self,
        tuner: Finetuner,
        generator: Generator | None,
        trainer: GeneratorTrainer | None,
        *,
        reconstruct: bool,
    ) -> None:
        config, ranks = tuner.config, tuner.ranks
        generator = generator if trainer is None else trainer.generator
        self.tuner = tuner
        self._source = synthetic_source(generator, config, ranks)
        self._parts: dict[str, Stateful] = {}
        self._stages: list[tuple[int, Callable[[int], Metrics]]] = []
        if trainer is not None:
            self._parts["trainer"] = trainer
            self._stages.append((config.warmup_steps, lambda index: trainer.step(index)[2]))
        if generator is not None and config.synthetic_batch and config.refine.images:
            refiner = _refiner(tuner, generator)
            self._parts["refiner"] = refiner
            self._stages.append((refiner.steps, refiner.step))
            self._source = _with_refined(self._source, refiner, config)
        self._made: torch.Tensor | None = None
        self._reconstructed = reconstruct
        if reconstruct:
            shape = tuple(tuner.images.shape[1:])
            reconstruction = Reconstruction(
                tuner.student, tuner.model, self._images, shape, config, ranks
            )
            self._parts["reconstruction"] = reconstruction
            self._stages.append((reconstruction.steps, reconstruction.step))
        self._stages.append((config.steps, self._tune))
        self.total = sum(steps for steps, _ in self._stages)

    def _images(self) -> torch.Tensor:
        """Like those of the fine-tuning steps, but none of these."""
        if self._made is None:
            config, made = self.tuner.config, []
            batch = config.real_batch + config.synthetic_batch
            for index in range(-(-config.reconstruct.images // batch)):
                index += config.steps + config.range_steps
                made.append(self.tuner.blended_batch(index, self._source(index))[0])
            self._made = torch.cat(made)[: config.reconstruct.images]
        return self._made

    def _tune(self, index: int) -> Metrics:
        if index == 0 and self._reconstructed:
            self.tuner.begin()
        elif index == 0:
            self.tuner.calibrate(range_batches(self.tuner, self._source))
        return self.tuner.step(index, self._source(index))

    def step(self, index: int) -> Metrics:
        """Step `index` of all stages' steps."""
        for steps, step in self._stages:
            if index < steps:
                return step(index)
            index -= steps
        raise IndexError(index)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        state = self.tuner.state_tensors()
        for name, part in self._parts.items():
            state |= prefixed(name, part.state_tensors())
        return state

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tuner.load_state_tensors(tensors)
        for name, part in self._parts.items():
            part.load_state_tensors(below(name, tensors))


def _refiner(tuner: Finetuner, generator: Generator) -> Refiner:
    """Of the tuner's calibration images, warped, or the generator's."""
    config, images, labels = tuner.config, tuner.images, tuner.labels
    limits = limits_of(images)

    def starts(group: int) -> Batch:
        rng = stream(config.seed, _START_STREAM, group)
        first = group * config.refine.group
        rows = torch.arange(first, min(first + config.refine.group, config.refine.images))
        if config.refine.start == "generator":
            made = rows % generator.num_classes
            start = sample_together(generator, made, int(rng.initial_seed() >> 1), tuner.ranks)
            return start.clamp(*limits), made
        rows %= len(images)
        return warped(images[rows], limits, config.flip, rng), labels[rows]

    return Refiner(tuner.teacher, starts, limits, config.refine, tuner.ranks)


def _with_refined(
    generated: Callable[[int], Batch], refiner: Refiner, config: QuantizeConfig
) -> Callable[[int], Batch]:
    """Batches by step: the first half generated, the others drawn from the refined images."""

    def batch(index: int) -> Batch:
        rng = stream(config.seed, _REFINED_STREAM, index)
        images, labels = generated(index)
        rows = torch.randint(len(refiner.images), (len(images) - len(images) // 2,), generator=rng)
        kept = slice(len(images) // 2)
        images = torch.cat([images[kept], refiner.images[rows]])
        return images, torch.cat([labels[kept], refiner.labels[rows]])

    return batch


def range_batches(
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


def synthetic_source(
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
