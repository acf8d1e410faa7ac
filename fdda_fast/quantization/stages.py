"""The stages of quantisation that have a generator or a reconstruction beside the fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ..config import QuantizeConfig
from ..distributed import Ranks
from ..generator import Generator, sample_together
from ..seeding import stream
from ..synthesis import GeneratorTrainer
from ..training import Metrics, below, prefixed
from .finetune import Batch, Finetuner
from .reconstruction import Reconstruction

_LABEL_STREAM = 32


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


class ReconstructedTuning:
    """The generator where one is to be trained, then reconstruction, then fine-tuning."""

    def __init__(
        self, tuner: Finetuner, generator: Generator | None, trainer: GeneratorTrainer | None
    ) -> None:
        config = tuner.config
        self.tuner, self.trainer = tuner, trainer
        self.source = synthetic_source(
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
