"""quantize(method=...): reconstruction unit by unit, its draws, its cache, resuming."""

import os
import signal

import pytest
import torch
import torch.nn.functional as F
from digits import accuracy, equal, state

from fdda_fast.config import (
    QuantizeConfig,
    ReconstructConfig,
    RefineConfig,
    SynthesisConfig,
)
from fdda_fast.data import draw, open_source
from fdda_fast.distributed import Ranks
from fdda_fast.generator import Generator
from fdda_fast.quantization.bits import Bits
from fdda_fast.quantization.modules import activation_quantizers
from fdda_fast.quantization.prepare import prepare
from fdda_fast.quantization.quantize import quantize
from fdda_fast.quantization.reconstruction import Reconstruction, _Dropping
from fdda_fast.quantization.rounding import LearnedRounding
from fdda_fast.seeding import stream

UNITS = 5
RECONSTRUCT = ReconstructConfig(steps=4, images=40, batch=8)
CONFIG = QuantizeConfig(
    steps=3, warmup_steps=2, range_steps=2, real_batch=5, synthetic_batch=6, flip=False,
    synthesis=SynthesisConfig(
        batch_size=6, classes_per_step=2, images_per_class=2, any_class_steps=1
    ),
    refine=RefineConfig(images=12, group=8, steps=2), reconstruct=RECONSTRUCT,
)  # fmt: skip


@pytest.fixture(scope="module")
def calibration():
    drawn = draw(open_source("digits", "train"), 1, seed=0)
    return drawn.images, drawn.labels


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    return Generator(10, (1, 8, 8)).eval()


def test_two_bits_from_one_image_per_class(teacher, calibration):
    config = CONFIG.replace(reconstruct=ReconstructConfig(steps=60, images=128))
    told = []
    student = quantize(
        teacher, calibration, Bits(2, 2), config, method="reconstruct",
        progress=lambda *a: told.append(a),
    )  # fmt: skip
    assert [t[:2] for t in told] == [(i + 1, UNITS * 60) for i in range(UNITS * 60)]
    assert [t[2]["unit"] for t in told] == [i // 60 for i in range(UNITS * 60)]
    untuned = quantize(teacher, calibration, Bits(2, 2), config.replace(steps=0))
    assert accuracy(untuned) < 0.9
    assert accuracy(student) > accuracy(untuned) + 0.03
    assert all(q.observed > 0 and q.log_range == 0 for q in activation_quantizers(student))
    assert not student.training


@pytest.mark.parametrize("method", ["reconstruct", "fdda+reconstruct"])
def test_seed_and_method_decide(teacher, calibration, generator, method):
    given = None if method == "reconstruct" else generator
    before = state(teacher)
    first = state(quantize(teacher, calibration, Bits(), CONFIG, given, method=method))
    torch.rand(3)  # the global stream plays no part
    again = quantize(teacher, calibration, Bits(), CONFIG, given, method=method)
    assert equal(first, state(again))
    other = quantize(teacher, calibration, Bits(), CONFIG.replace(seed=1), given, method=method)
    assert not equal(first, state(other))
    fine = quantize(teacher, calibration, Bits(), CONFIG.replace(steps=0), given, method=method)
    assert equal(first, state(fine)) == (method == "reconstruct")  # which is not fine-tuned
    assert equal(before, state(teacher))


def test_ranges_are_taken_as_the_settings_say(teacher):
    images = torch.randn(100, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    ends = {}
    for ranges in ("minmax", "mse", "percentile"):
        config = CONFIG.replace(
            ranges=ranges, percentile=90, reconstruct=RECONSTRUCT.replace(range_lr=0.0)
        )
        student = prepare(teacher, Bits(4, 4))
        made = Reconstruction(student, teacher, lambda: images, (1, 8, 8), config)
        for index in range(8):
            made.step(index)
        ends[ranges] = [q.x_max.item() for q in activation_quantizers(student)]
        assert [bool(q.observed) for q in activation_quantizers(student)[:4]] == [True] * 4
    batches = torch.tensor([batch.max().item() for batch in images.split(64)])
    assert ends["minmax"][0] == pytest.approx((0.9 * batches[0] + 0.1 * batches[1]).item())
    assert ends["percentile"][0] == pytest.approx(images.quantile(0.9).item(), abs=0.02)
    assert ends["percentile"][1] < ends["mse"][1] < ends["minmax"][1]


def interrupt_at(stop):
    def progress(done, total, metrics):
        if done == stop:
            os.kill(os.getpid(), signal.SIGINT)

    return progress


# Of a generator 2 steps, or of 2 groups of images 2 each; 5 units of 4, and 3 of fine-tuning.
@pytest.mark.parametrize(
    ("images", "stop"),
    [(0, stop) for stop in (1, 2, 3, 21, 24)] + [(12, stop) for stop in (1, 2, 3, 4, 5, 8, 23, 26)],
)
def test_resuming_is_bit_identical(teacher, calibration, tmp_path, images, stop):
    path = tmp_path / "checkpoint.safetensors"
    config = CONFIG.replace(refine=CONFIG.refine.replace(images=images))
    arguments, total = (teacher, calibration, Bits(2, 3), config), 27 if images else 25

    def run(**options):
        return quantize(*arguments, method="fdda+reconstruct", checkpoint=path, **options)

    straight = run()
    with pytest.raises(KeyboardInterrupt):
        run(progress=interrupt_at(stop))
    with pytest.raises(ValueError, match="other settings"):
        quantize(*arguments, method="reconstruct", checkpoint=path, resume=True)
    done = []
    resumed = run(resume=True, progress=lambda i, n, m: done.append(i))
    assert done == list(range(stop + 1, total + 1))
    assert equal(state(straight), state(resumed))
    again = run(resume=True, progress=lambda i, n, m: done.append(i))
    assert done[-1] == total  # no step is left
    assert len(done) == total - stop
    assert equal(state(straight), state(again))


def reconstruction(teacher, images, config, **options):
    student = prepare(teacher, Bits(2, 3))
    config = CONFIG.replace(reconstruct=config)
    made = Reconstruction(student, teacher, lambda: images, (1, 8, 8), config, **options)
    return student, made


def test_a_step_written_out(teacher):
    """The second one of the second unit: inputs, targets, loss, what Adam makes of it."""
    images = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    config = RECONSTRUCT.replace(warmup=0.0, drop=0.0, batch=40, steps=3)
    student, made = reconstruction(teacher, images, config)
    for index in range(3):
        made.step(index)
    hard = state(student)
    made.step(3)
    assert not equal(hard, state(student))  # ranges and norms of the second unit
    rounding = made._learner.roundings[0]
    start = LearnedRounding(student.get_submodule("stage1.0.conv1"))
    variable = start.variable.detach().clone()
    moved = (rounding.variable.detach() - variable).abs() / config.lr
    assert (moved <= 1.001).all()  # Adam's first step, less where there is hardly a gradient
    assert (moved[start.free] > 0.9).float().mean() > 0.8
    rows = torch.randint(40, (40,), generator=stream(0, 40, 4))
    with torch.no_grad():
        x = F.relu(student.bn1(student.conv1(student.x_quantizer(images))))
        block = teacher.stage1[0]
        y = block(F.relu(teacher.bn1(teacher.conv1(images))))
        spread = y.var((0, 2, 3), correction=0).mean()
        expected = F.mse_loss(made._learner.network(x[rows]), y[rows]) / spread
    assert made.step(4)["reconstruction_loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_drops_are_drawn_by_the_seed_for_the_whole_batch():
    x = torch.zeros(6, 5, 9, 7)
    whole = _Dropping(0.25)
    whole.rng, whole.batch, whole.rows = stream(3, 1), 6, slice(0, 6)
    mask = whole.mask(x)
    assert mask.shape == x.shape
    assert 0.2 < mask.float().mean() < 0.3
    second = whole.mask(x)
    assert not torch.equal(mask, second)
    rank = _Dropping(0.25)
    rank.rng, rank.batch, rank.rows = stream(3, 1), 6, slice(2, 5)
    assert torch.equal(rank.mask(x[2:5]), mask[2:5])
    assert torch.equal(rank.mask(x[2:5]), second[2:5])


def test_a_small_cache_holds_one_part_of_the_images_at_a_time(teacher):
    images = torch.randn(250, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    config = RECONSTRUCT.replace(images=250, steps=6, cache_mib=1)
    _, made = reconstruction(teacher, images, config)
    # Floats of a unit's two inputs and its output; 2**18 fit.
    floats = [2 * 64 + 1024, 3 * 1024, 2 * 1024 + 512, 2 * 512 + 256, 2 * 256 + 10]
    assert made.parts == [-(-250 // (2**18 // n)) for n in floats]
    assert made.parts[1] == 3
    held = []
    for index in range(12):
        made.step(index)
        held.append((made._held, len(made._cache[0].target)))
    assert [h[0] for h in held] == [(0, p) for p in [0, 0, 0, 1, 1, 1]] + [
        (1, p) for p in [0, 0, 1, 1, 2, 2]
    ]
    assert sum(n for (unit, _), n in held[::2] if unit == 1) == 250
    with pytest.raises(ValueError, match=r"cache_mib must hold a batch of 100 images, 0.0 MiB"):
        reconstruction(teacher, images, config.replace(batch=100))


def test_divergence_is_reported(teacher):
    config = RECONSTRUCT.replace(affine_lr=1e38)
    _, made = reconstruction(teacher, torch.randn(40, 1, 8, 8), config)
    with pytest.raises(ValueError, match=r"reconstruction diverged at 'relu': lower"):
        [made.step(index) for index in range(4)]


def test_more_ranks_than_images(teacher):
    with pytest.raises(ValueError, match=r"ReconstructConfig.batch must be >= the number"):
        reconstruction(teacher, torch.zeros(40, 1, 8, 8), RECONSTRUCT, ranks=Ranks(0, 9))


def test_refused(teacher, calibration, generator):
    with pytest.raises(ValueError, match="method must be one of"):
        quantize(teacher, calibration, method="brecq")
    with pytest.raises(ValueError, match="'reconstruct' takes no generator"):
        quantize(teacher, calibration, generator=generator, method="reconstruct")
    for name, value in {"ranges": "reference", "range_images": "real"}.items():
        with pytest.raises(ValueError, match=f"method must be 'fdda' with {name} = '{value}'"):
            CONFIG.replace(**{name: value})
        config = CONFIG.replace(method="fdda", **{name: value})
        with pytest.raises(ValueError, match="method must be 'fdda' with"):
            quantize(teacher, calibration, config=config, method="reconstruct")


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0}, {"images": 31}, {"lr": 0.0}, {"affine_lr": -1.0}, {"warmup": 1.0},
        {"drop": 1.0}, {"betas": (2.0, 20.0)}, {"cache_mib": 0},
    ],
)  # fmt: skip
def test_refused_settings(change):
    with pytest.raises(ValueError, match=f"ReconstructConfig.{next(iter(change))} must be"):
        ReconstructConfig(**change)
