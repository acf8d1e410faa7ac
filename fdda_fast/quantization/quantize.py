"""Quantisation from a few real images: `quantize`."""

from __future__ import annotations

from pathlib import Path

from torch import fx, nn

from ..config import QuantizeConfig
from ..distributed import Ranks
from ..fingerprints import fingerprint
from ..generator import Generator
from ..refinement import Refiner, check_generator
from ..statistics import BNSCenters, check_labelled_images, collect_centers, teacher_of
from ..synthesis import GeneratorTrainer
from ..training import Progress, run_steps
from .bits import Bits
from .clipping import clip_weights
from .equalization import equalized
from .finetune import CORRECTION_IMAGES, Batch, Finetuner
from .prepare import prepare
from .stages import (
    JointTraining,
    Source,
    StagedTuning,
    drawn_from,
    generated,
    no_images,
    range_batches,
)


def quantize(
    model: nn.Module,
    calibration: Batch,
    bits: Bits | None = None,
    config: QuantizeConfig | None = None,
    generator: Generator | None = None,
    *,
    method: str | None = None,
    synthetic: Batch | None = None,
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
        config: default the preset `fast`.
        generator: synthetic images are made of its images; None: see `config.refine`.
        method: instead of `config.method`, see there.
        synthetic: images like the calibration images and their classes, from `refine` or
            elsewhere, which are taken as they are; no others are made.
        centers: of the calibration images, when they are known already.
        checkpoint: file to keep training in, finished training, too, until whoever has the result
            safe removes it. resume: go on from it.
        progress: called as progress(steps done, total, metrics), on the first rank.

    Returns:
        The student, a GraphModule in eval mode with fake quantisation; differentiable.

    Raises:
        ValueError: inputs that do not fit each other, a layer that cannot be quantised, no class
            with a reliable center, a checkpoint of other settings.
        KeyboardInterrupt: interrupted; the checkpoint holds all steps done.
    """
    bits, config = bits or Bits(), config or QuantizeConfig()
    if method is not None:
        config = config.replace(method=method)
    method = config.method
    _check_images(method, generator, synthetic)
    if method == "reconstruct":
        batch = config.real_batch + config.synthetic_batch
        config = config.replace(steps=0, real_batch=batch, synthetic_batch=0)
    images, labels = calibration
    teacher, num_classes = teacher_of(model, images, labels)
    if generator is not None:
        check_generator(generator, num_classes, tuple(images.shape[1:]), teacher)
    if synthetic is not None:
        check_labelled_images("synthetic images", *synthetic, num_classes)
        if synthetic[0].shape[1:] != images.shape[1:]:
            raise ValueError(
                f"synthetic images must be like the calibration images, {list(images.shape[1:])}, "
                f"got {list(synthetic[0].shape[1:])}"
            )
    exact = equalized(model, images) if config.equalize else model
    student = prepare(
        exact,
        bits,
        placement=config.placement,
        keep_float=config.keep_float,
        from_zero=config.ranges == "reference" and config.steps > 0,
        image_shape=tuple(images.shape[1:]),
    )
    if config.weight_ranges != "auto" or config.ranges == "mse":
        clip_weights(student, config.weight_ranges, config.percentile)
    ranks = Ranks.world()
    tuner = Finetuner(student, exact, (images, labels), config, ranks)
    source: Source = no_images
    held_out: Source = no_images
    if config.synthetic_batch and synthetic is not None:
        source, held_out = drawn_from(lambda: synthetic, config)
    elif config.synthetic_batch and generator is not None:
        source = held_out = generated(generator, config, ranks)
    if config.steps == 0 and method != "reconstruct":
        if synthetic is not None or generator is not None:
            tuner.calibrate(range_batches(tuner, source))
            return tuner.finish()
        if config.range_images == "synthetic":
            raise ValueError("QuantizeConfig.range_images='synthetic' needs a generator or steps")
        tuner.calibrate(images.split(CORRECTION_IMAGES))
        return tuner.finish()
    maker: GeneratorTrainer | Refiner | None = None
    wanted = config.synthetic_batch > 0 and synthetic is None
    if wanted and config.refine.images:
        maker = Refiner(
            teacher, (images, labels), num_classes, config.refine,
            seed=config.seed, flip=config.flip, generator=generator, ranks=ranks,
        )  # fmt: skip
    elif wanted and generator is None:
        centers = centers or collect_centers(model, images, labels, num_classes)
        maker = GeneratorTrainer(model, centers, config.synthesis, ranks)
    if method == "fdda" and isinstance(maker, GeneratorTrainer):
        stages: JointTraining | StagedTuning = JointTraining(tuner, maker)
    else:
        stages = StagedTuning(tuner, source, held_out, maker, reconstruct=method != "fdda")
    run_steps(
        stages.step,
        stages.total,
        stages,
        fingerprint=fingerprint(
            (bits, config),
            images,
            labels,
            model,
            *([] if generator is None else [generator]),
            *(synthetic or ()),
        ),
        checkpoint=checkpoint,
        resume=resume,
        progress=progress,
        ended=lambda: tuner.selection.exhausted,
        ranks=ranks,
    )
    if method == "reconstruct":
        tuner.begin()
    return tuner.finish()


def _check_images(method: str, generator: Generator | None, synthetic: Batch | None) -> None:
    if generator is not None and synthetic is not None:
        raise ValueError("generator and synthetic: expected at most one of them, got both")
    if method == "reconstruct" and (generator is not None or synthetic is not None):
        given = "generator" if synthetic is None else "synthetic images"
        raise ValueError(f"method 'reconstruct' takes no {given}, its images are real ones")
