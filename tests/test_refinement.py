"""Refinement of images: the loss, the groups, the limits, resuming."""

import os
import signal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fdda_fast.config import QuantizeConfig, RefineConfig
from fdda_fast.data import draw, open_source
from fdda_fast.generator import Generator
from fdda_fast.models import load_teacher
from fdda_fast.quantization import stages
from fdda_fast.quantization.bits import Bits
from fdda_fast.quantization.quantize import quantize
from fdda_fast.refinement import Refiner, refine
from fdda_fast.teacher import FrozenTeacher

CONFIG = RefineConfig(images=20, group=12, steps=30)
SHORT = QuantizeConfig(
    method="fdda",
    steps=2, range_steps=1, real_batch=3, synthetic_batch=5, flip=False,
    refine=RefineConfig(images=12, group=8, steps=2),
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return load_teacher("digits-resnet8")


@pytest.fixture(scope="module")
def calibration():
    drawn = draw(open_source("digits", "train"), 2, seed=0)
    return drawn.images, drawn.labels


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    return Generator(10, (1, 8, 8)).eval()


def refiner(model, calibration, config=CONFIG, **options):
    teacher = FrozenTeacher(model, (1, 8, 8))
    return Refiner(teacher, calibration, 10, config, seed=3, flip=False, **options)


def loss_of(model, images, labels, config=CONFIG):
    """Written out with hooks, per layer and channel, and the logits."""
    seen, handles = [], []
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            handles.append(norm.register_forward_pre_hook(lambda m, a: seen.append((m, a[0]))))
    logits = model(images)
    for handle in handles:
        handle.remove()
    total = 0.0
    for norm, x in seen:
        scale = norm.running_var + 1e-5
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        total = total + ((mean - norm.running_mean) / scale.sqrt()).square().mean()
        total = total + ((var - norm.running_var) / scale).square().mean()
    entropy = F.cross_entropy(logits, labels)
    return total / len(seen), entropy


def test_a_step_written_out(model, calibration):
    made = refiner(model, calibration)
    images, labels = made.starts(0)
    metrics = made.step(0)
    x = images.clone().requires_grad_()
    bns, entropy = loss_of(model, x, labels)
    assert metrics["refine_bns"] == pytest.approx(bns.item(), rel=1e-4)
    assert metrics["refine_ce"] == pytest.approx(entropy.item(), rel=1e-4)
    (CONFIG.bns_weight * bns + CONFIG.ce_weight * entropy).backward()
    moved = made.state_tensors()["current"] - images
    # Adam's first step has the size of the rate, where the gradient is not nothing, and images
    # keep within the calibration images' values.
    low, high = calibration[0].aminmax()
    inside = (images > low + CONFIG.lr) & (images < high - CONFIG.lr)
    clear = inside & (x.grad.abs() > 1e-3 * x.grad.abs().max())
    assert clear.float().mean() > 0.3
    torch.testing.assert_close(moved[clear], -CONFIG.lr * x.grad[clear].sign(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("start", ["calibration", "generator"])
def test_groups_come_near_the_teacher(model, calibration, generator, start):
    given = generator if start == "generator" else None
    told = []
    images, labels = refine(
        model, calibration, CONFIG, given, seed=3, progress=lambda *a: told.append(a)
    )
    assert [t[:2] for t in told] == [(i + 1, 60) for i in range(60)]
    assert images.shape == (20, 1, 8, 8)
    assert torch.equal(labels, torch.arange(20) % 10)
    low, high = calibration[0].aminmax()
    assert images.min() >= low
    assert images.max() <= high
    made = refiner(model, calibration, generator=given)
    for group, rows in enumerate((slice(0, 12), slice(12, 20))):
        start_images, start_labels = made.starts(group)
        assert torch.equal(start_labels, labels[rows])
        with torch.no_grad():
            before, doubt = loss_of(model, start_images, labels[rows])
            after, entropy = loss_of(model, images[rows], labels[rows])
        assert after < 0.5 * before
        assert after.item() == pytest.approx(told[30 * group + 29][2]["refine_bns"], rel=0.5)
        assert entropy < 0.8 * doubt


def test_images_begin_as_those_of_their_class(model, calibration):
    """Those of classes without any begin as others."""
    images = torch.arange(20.0).view(20, 1, 1, 1).expand(20, 1, 8, 8) / 20
    labels = torch.arange(20) % 5
    made = refiner(model, (images, labels), CONFIG.replace(images=2000, group=2000))
    x, y = made.starts(0)
    assert torch.equal(y, torch.arange(2000) % 10)
    seen = x.mean((1, 2, 3))
    # Tones change, but black stays black.
    assert all((seen[y == c] == 0).any() == (c in {0, 5, 6, 7, 8, 9}) for c in range(10))
    other, _ = refiner(model, (images, labels), CONFIG.replace(images=4000, group=2000)).starts(1)
    assert not torch.equal(other, x)


def test_seed_and_flip_decide(model, calibration):
    short = CONFIG.replace(steps=2)
    first, _ = refine(model, calibration, short, seed=1)
    torch.rand(3)  # the global stream plays no part
    assert torch.equal(first, refine(model, calibration, short, seed=1)[0])
    assert not torch.equal(first, refine(model, calibration, short, seed=2)[0])
    assert not torch.equal(first, refine(model, calibration, short, seed=1, flip=False)[0])


@pytest.mark.parametrize("stop", [1, 7, 30, 41])
def test_resuming_is_bit_identical(model, calibration, tmp_path, stop):
    def interrupt(done, total, metrics):
        if done == stop:
            os.kill(os.getpid(), signal.SIGINT)

    path = tmp_path / "checkpoint.safetensors"
    straight = refine(model, calibration, CONFIG)
    with pytest.raises(KeyboardInterrupt):
        refine(model, calibration, CONFIG, checkpoint=path, progress=interrupt)
    with pytest.raises(ValueError, match="other settings"):
        refine(model, calibration, CONFIG, seed=1, checkpoint=path, resume=True)
    done = []
    resumed = refine(
        model, calibration, CONFIG, checkpoint=path, resume=True,
        progress=lambda i, n, m: done.append(i),
    )  # fmt: skip
    assert done == list(range(stop + 1, 61))
    again = refine(model, calibration, CONFIG, checkpoint=path, resume=True)  # no step is left
    for finished in (resumed, again):
        assert all(torch.equal(a, b) for a, b in zip(straight, finished, strict=True))


def test_refuses_what_does_not_fit(model, calibration, generator):
    images, labels = calibration
    with pytest.raises(ValueError, match="labels of calibration images must lie in"):
        refine(model, (images, labels + 10), CONFIG)
    with pytest.raises(ValueError, match="generator makes 9 classes"):
        refine(model, calibration, CONFIG, Generator(9, (1, 8, 8)))
    with pytest.raises(ValueError, match="generator: made with another teacher"):
        refine(model, calibration, CONFIG, Generator(10, (1, 8, 8), "another"))


def test_refuses_a_model_without_norms(calibration):
    bare = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10)).eval()
    with pytest.raises(ValueError, match="no BatchNorm2d"):
        refine(bare, calibration, CONFIG)
    with pytest.raises(ValueError, match=r"no BatchNorm2d.* method 'reconstruct'"):
        quantize(bare, calibration, Bits(), SHORT)
    student = quantize(bare, calibration, Bits(8, 8), SHORT.replace(method="reconstruct"))
    images, _ = calibration
    with torch.no_grad():
        assert (student(images) - bare(images)).abs().max() < 0.05


def noted_batches(monkeypatch):
    batches = []
    step = stages.Finetuner.step

    def noted(self, index, synthetic):
        batches.append(synthetic)
        return step(self, index, synthetic)

    monkeypatch.setattr(stages.Finetuner, "step", noted)
    return batches


@pytest.mark.parametrize("given", [True, False])
def test_quantize_learns_from_refined_images(model, calibration, generator, monkeypatch, given):
    given = generator if given else None
    batches, told = noted_batches(monkeypatch), []
    quantize(model, calibration, Bits(), SHORT, given, progress=lambda *a: told.append(a))
    assert [t[:2] for t in told] == [(i + 1, 6) for i in range(6)]
    assert [next(iter(metrics)) for _, _, metrics in told[:4]] == ["refine_bns"] * 4
    images, labels = refine(model, calibration, SHORT.refine, given, flip=False)
    for batch, classes in batches:
        assert len(batch) == SHORT.synthetic_batch
        match = (batch[:, None] == images).flatten(2).all(2)
        assert match.any(1).all()
        assert torch.equal(labels[match.float().argmax(1)], classes)


def test_quantize_with_images_made_before(model, calibration, monkeypatch):
    """The same student as where they are made along the way."""
    along = quantize(model, calibration, Bits(), SHORT)
    made = refine(model, calibration, SHORT.refine, flip=False)
    told = []
    given = quantize(
        model, calibration, Bits(), SHORT, synthetic=made, progress=lambda *a: told.append(a)
    )
    assert len(told) == SHORT.steps
    for key, value in along.state_dict().items():
        assert torch.equal(value, given.state_dict()[key]), key


def test_quantize_refuses_images_that_do_not_fit(model, calibration, generator):
    images, labels = refine(model, calibration, SHORT.refine)
    for synthetic, options, message in (
        ((images[..., 1:], labels), {}, r"like the calibration images, \[1, 8, 8\], got \[1, 8, 7"),
        ((images, labels + 9), {}, "labels of synthetic images must lie in"),
        ((images, labels[1:]), {}, "labels of synthetic images must be int64"),
        ((images, labels), {"generator": generator}, "at most one of them"),
        ((images, labels), {"method": "reconstruct"}, "takes no synthetic images"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize(model, calibration, Bits(), SHORT, synthetic=synthetic, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": -1}, "images must be >= 0, got -1"),
        ({"group": 0}, "group must be >= 1"),
        ({"steps": 0}, "steps must be >= 1"),
        ({"lr": 0.0}, "lr must be > 0"),
        ({"ce_weight": -0.1}, "ce_weight must be >= 0"),
        ({"bns_weight": -0.1}, "bns_weight must be >= 0"),
    ],
)
def test_settings_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        RefineConfig(**change)
