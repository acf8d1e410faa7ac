"""The stages of quantisation: what makes images, reconstruction and fine-tuning in turn."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from ..config import QuantizeConfig
from ..distributed import Ranks
from ..generator import Generator, sample_together
from ..refinement import Refiner
from ..seeding import stream
from ..synthesis import GeneratorTrainer
from ..training import Metrics, Stateful, below, prefixed
from .finetune import Batch, Finetuner
from .reconstruction import Reconstruction

Source = Callable[[int], Batch | None]  # synthetic images by step
_LABEL_STREAM, _ROW_STREAM, _SPLIT_STREAM = 32, 34, 35
_HELD_OUT_BATCHES = 16
_HELD_OUT_SHARE = 8  # one of so many images


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
            source = generated(self.trainer.generator, config, self.tuner.ranks)
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
    """One stage after the other: generator or refinement, reconstruction, fine-tuning.

    Args:
        source, held_out: batches of synthetic images by step, where they are there already, for
            steps and for looks between them.
        maker: what makes them first, if anything does: a trainer of a generator, or a refiner.
        reconstruct: whether there is a reconstruction.
    """

    def __init__(
        self,
        tuner: Finetuner,
        source: Source,
        held_out: Source,
        maker: GeneratorTrainer | Refiner | None = None,
        *,
        reconstruct: bool,
    ) -> None:
        config, ranks = tuner.config, tuner.ranks
        self.tuner, self._source, self._held_out = tuner, source, held_out
        self._parts: dict[str, Stateful] = {}
        self._stages: list[tuple[int, Callable[[int], Metrics]]] = []
        if maker is not None:
            self._parts["maker"] = maker
        if isinstance(maker, GeneratorTrainer):
            self._source = self._held_out = generated(maker.generator, config, ranks)
            self._stages.append((config.warmup_steps, lambda index: maker.step(index)[2]))
        elif maker is not None:
            self._source, self._held_out = drawn_from(lambda: (maker.images, maker.labels), config)
            self._stages.append((maker.steps, maker.step))
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
        if self.tuner.config.check_every and not self.tuner.selection.ready:
            self.tuner.hold_out(held_out_batches(self.tuner, self._held_out))
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


def range_batches(tuner: Finetuner, source: Source) -> Iterator[torch.Tensor]:
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


def held_out_batches(tuner: Finetuner, source: Source) -> Iterator[torch.Tensor]:
    """Batches like those of the fine-tuning steps, their synthetic images if they have any."""
    config = tuner.config
    first = config.steps + config.range_steps + config.reconstruct.images  # after all others
    for index in range(first, first + _HELD_OUT_BATCHES):
        images = tuner.batch(index, source(index))[0]
        yield images[config.real_batch :] if config.synthetic_batch else images


def no_images(index: int) -> None:
    """The source of those that learn from real images alone."""


def generated(generator: Generator, config: QuantizeConfig, ranks: Ranks) -> Source:
    """Batches of a finished generator."""

    def batch(index: int) -> Batch:
        rng = stream(config.seed, _LABEL_STREAM, index)
        labels = torch.randint(generator.num_classes, (config.synthetic_batch,), generator=rng)
        return sample_together(generator, labels, int(rng.initial_seed() >> 1), ranks), labels

    return batch


def drawn_from(images: Callable[[], Batch], config: QuantizeConfig) -> tuple[Source, Source]:
    """Batches of what `images` returns when they are needed, for steps and for looks.

    The latter are of an eighth alone, drawn by the seed, which the steps leave out; where there are
    no looks, or too few images, both are of all.
    """

    @functools.cache
    def parts(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        order = torch.randperm(count, generator=stream(config.seed, _SPLIT_STREAM))
        kept = count // _HELD_OUT_SHARE if config.check_every else 0
        return order[kept:], order[:kept] if kept else order

    def batch(index: int, part: int) -> Batch:
        rng = stream(config.seed, _ROW_STREAM, index)
        every, labels = images()
        known = parts(len(every))[part]
        rows = known[torch.randint(len(known), (config.synthetic_batch,), generator=rng)]
        return every[rows], labels[rows]

    return functools.partial(batch, part=0), functools.partial(batch, part=1)
