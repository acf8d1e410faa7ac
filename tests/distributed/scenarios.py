"""What the ranks do in the tests: each returns tensors to compare."""

import dataclasses
import functools
import os
import signal

import torch

from fdda_fast import center_parts
from fdda_fast.config import QuantizeConfig, ReconstructConfig, RefineConfig, SynthesisConfig
from fdda_fast.data import draw, every, open_source
from fdda_fast.distributed import Ranks
from fdda_fast.generator import Generator
from fdda_fast.models import load_teacher
from fdda_fast.quantization.bits import Bits
from fdda_fast.quantization.prepare import prepare
from fdda_fast.quantization.quantize import quantize
from fdda_fast.quantization.reconstruction import Reconstruction
from fdda_fast.refinement import refine
from fdda_fast.statistics import collect_centers, stream_centers
from fdda_fast.synthesis import GeneratorTrainer, train_generator

# Shares differ: 9, 7 and 15 images. Adam's first steps are of the size of the learning rate where a
# gradient is nothing but rounding, so that must be small for rounding to stay small.
GENERATOR = SynthesisConfig(
    steps=5, any_class_steps=2, batch_size=9, classes_per_step=3, images_per_class=5, lr=1e-4
)
TWO_PASS = SynthesisConfig.reference().replace(
    steps=5, any_class_steps=2, batch_size=9, images_per_class=7, lr=1e-4
)
ALONG = QuantizeConfig(
    method="fdda",
    steps=4, warmup_steps=2, range_steps=2, real_batch=6, synthetic_batch=7,
    synthesis=GENERATOR.replace(lr=1e-7), refine=RefineConfig(images=0),
)  # fmt: skip
# Of the preset `fast`: refinement, reconstruction, fine-tuning that looks at images held out.
STAGES = QuantizeConfig(
    steps=3, range_steps=2, real_batch=6, synthetic_batch=7, check_every=2,
    refine=RefineConfig(images=14, group=9, steps=3, lr=1e-3),
    reconstruct=ReconstructConfig(steps=3, images=26, batch=9, lr=1e-4, affine_lr=1e-6),
)  # fmt: skip
PAPER = QuantizeConfig.reference().replace(
    steps=3, warmup_steps=2, range_steps=3, real_batch=6, synthetic_batch=5, synthesis=TWO_PASS
)


@functools.cache
def digits():
    calibration = draw(open_source("digits", "train"), 1, 0)
    return load_teacher("digits-resnet8"), calibration.images, calibration.labels


@functools.cache
def digit_centers():
    """Classes 2 and 7 are not reliable."""
    centers = collect_centers(*digits(), 10)
    reliable = centers.reliable.clone()
    reliable[[2, 7]] = False
    return dataclasses.replace(centers, reliable=reliable)


def losses(history):
    return {"losses": torch.tensor([list(metrics.values()) for metrics in history])}


def train(folder, config=GENERATOR, **options):
    history = []
    generator = train_generator(
        digits()[0], digit_centers(), config, progress=lambda i, n, m: history.append(m), **options
    )
    return {**generator.state_dict(), **losses(history)}


def gradients(folder, config):
    """Of the first step."""
    trainer = GeneratorTrainer(digits()[0], digit_centers(), config, Ranks.world())
    metrics = trainer.step(0)[2]
    found = {name: p.grad for name, p in trainer.generator.named_parameters()}
    return {**found, **dict(trainer.generator.named_buffers()), **losses([metrics])}


def stream(folder):
    """Every rank has other images; the last one has none where there are four."""
    ranks, source = Ranks.world(), open_source("digits", "train")
    rows = list(range(300))[ranks.rank :: ranks.size - (ranks.size == 4)]
    if ranks.rank == 3:
        rows = []
    batches = [rows[i : i + 40] for i in range(0, len(rows), 40)]
    centers = stream_centers(
        digits()[0], ((source.images(b), source.labels[b]) for b in batches), 10
    )
    return tensors_of(centers)


def tensors_of(centers):
    layers = {f"mean{i}": m for i, m in enumerate(centers.mean)}
    layers |= {f"var{i}": v for i, v in enumerate(centers.var)}
    return {**layers, "count": centers.count, "logits": centers.logits}


def parts(folder):
    """All training images, part by part."""
    center_parts._PART = 100
    calibration = every(open_source("digits", "train"))
    path = folder / f"centers-{Ranks.world().size}" / "centers.safetensors"
    return tensors_of(center_parts.CenterParts(digits()[0], calibration, 10).collect(path))


def tune(folder, config, generator=None):
    history = []
    teacher, *calibration = digits()
    student = quantize(
        teacher, calibration, config=config, generator=generator,
        progress=lambda i, n, m: history.append(m),
    )  # fmt: skip
    history = [m for m in history if "student_loss" in m]
    return {**student.state_dict(), **losses(history)}


def frozen(folder):
    torch.manual_seed(0)
    return tune(folder, ALONG, Generator(10, (1, 8, 8)).eval())


def refined(folder):
    """Two groups of images, of which the second is smaller."""
    teacher, *calibration = digits()
    history = []
    images, labels = refine(
        teacher, calibration, RefineConfig(images=14, group=9, steps=3, lr=1e-3),
        progress=lambda i, n, m: history.append(m),
    )  # fmt: skip
    return {"images": images, "labels": labels, **losses(history)}


def reconstruct(folder):
    """Three steps of a unit: Adam's averages are those of the gradients."""
    teacher, images, _ = digits()
    config = ReconstructConfig(steps=4, images=10, batch=9, warmup=0.3, lr=1e-4, affine_lr=1e-6)
    made = Reconstruction(
        prepare(teacher, Bits(3, 3)), teacher, lambda: images, (1, 8, 8),
        QuantizeConfig(reconstruct=config), Ranks.world(),
    )  # fmt: skip
    history = [made.step(index) for index in range(3)]
    return {**made.state_tensors(), **losses(history)}


def interrupted(folder):
    """Stopped by SIGTERM to one rank that is not the first, while it is in step 2."""
    if Ranks.world().rank == 1:
        plain = GeneratorTrainer.step

        def step(self, index):
            if index == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return plain(self, index)

        GeneratorTrainer.step = step
    try:
        train(folder, checkpoint=folder / "shared.safetensors")
    except KeyboardInterrupt:
        return {"stopped": torch.ones(1)}


def resumed(folder):
    steps = []
    generator = train_generator(
        digits()[0], digit_centers(), GENERATOR,
        checkpoint=folder / "shared.safetensors", resume=True,
        progress=lambda i, n, m: steps.append(i),
    )  # fmt: skip
    return {**generator.state_dict(), "steps": torch.tensor(steps, dtype=torch.int64)}


def other_checkpoint(folder):
    """Only the first rank finds the checkpoint that `interrupted` left."""
    path = folder / ("shared.safetensors" if Ranks.world().first else "missing")
    try:
        train_generator(digits()[0], digit_centers(), GENERATOR, checkpoint=path, resume=True)
    except ValueError as error:
        return {"message": torch.tensor(list(str(error).encode()), dtype=torch.uint8)}


def collectives(folder):
    """Sums of every kind of tensor, rows put together, teams; rank r of n has r + 1."""
    ranks = Ranks.world()
    own = ranks.rank + 1
    tensors = [
        torch.full((1 << 20,), float(own)),
        torch.full((3, 1024, 20, 20), float(own)).to(memory_format=torch.channels_last),
        torch.full((2, 3, 4, 5), float(own)).to(memory_format=torch.channels_last),
        torch.tensor(float(own)),
        torch.zeros(0),
    ]
    ranks.sum_(tensors)
    # Two of one team or alone, whatever the number of ranks.
    team, tasks = ranks.teams(max(1, ranks.size // 2))
    sums = [torch.tensor(float(own))]
    team.sum_(sums)
    few_ranks, few_sums = ranks.some(2), [torch.tensor(float(own))]
    if few_ranks is not None:
        few_ranks.sum_(few_sums)
    rows = torch.arange(14).view(7, 2)
    own_rows = ranks.gather_rows(rows[ranks.share(7)], 7)
    few = rows[:2].clone()
    none = ranks.gather_rows(few[ranks.share(2)], 2)
    _, more_tasks = ranks.teams(7)
    return {
        **{f"sum{i}": t for i, t in enumerate(tensors)},
        "rows": own_rows,
        "few_rows": none,
        "team": torch.tensor([team.rank, team.size, *tasks]),
        "team_sum": sums[0],
        "some": torch.tensor([few_ranks.size if few_ranks else 0, few_sums[0]]),
        "tasks": torch.tensor(more_tasks),
        "any": torch.tensor([ranks.any(ranks.rank == 1), ranks.any(False)]),
    }


SCENARIOS = {
    "generator": train,
    "two_pass": functools.partial(train, config=TWO_PASS),
    "gradients": functools.partial(gradients, config=GENERATOR),
    "two_pass_gradients": functools.partial(gradients, config=TWO_PASS),
    "bfloat16_gradients": functools.partial(gradients, config=GENERATOR.replace(dtype="bfloat16")),
    "along": functools.partial(tune, config=ALONG),
    "paper": functools.partial(tune, config=PAPER),
    "frozen": frozen,
    "stages": functools.partial(tune, config=STAGES),
    "refined": refined,
    "reconstruct": reconstruct,
    "stream": stream,
    "parts": parts,
    "interrupted": interrupted,
    "resumed": resumed,
    "other_checkpoint": other_checkpoint,
    "collectives": collectives,
}
