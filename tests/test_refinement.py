"""Refinement of images: the loss, the groups, the limits, resuming."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fdda_fast.config import QuantizeConfig, RefineConfig, SynthesisConfig
from fdda_fast.data import draw, open_source
from fdda_fast.generator import Generator
from fdda_fast.models import load_teacher
from fdda_fast.quantization import stages
from fdda_fast.quantization.bits import Bits
from fdda_fast.quantization.quantize import quantize
from fdda_fast.refinement import Refiner, limits_of
from fdda_fast.teacher import FrozenTeacher

CONFIG = RefineConfig(images=20, group=12, steps=30)
SHORT = QuantizeConfig(
    steps=2, warmup_steps=2, range_steps=1, real_batch=3, synthetic_batch=5, flip=False,
    synthesis=SynthesisConfig(batch_size=6, classes_per_step=2, images_per_class=2),
    refine=RefineConfig(images=12, group=8, steps=2),
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return load_teacher("digits-resnet8")


@pytest.fixture(scope="module")
def calibration():
    drawn = draw(open_source("digits", "train"), 2, seed=0)
    return drawn.images, drawn.labels


def starts(group):
    rng = torch.Generator().manual_seed(group)
    count = (12, 8)[group]
    return torch.randn(count, 1, 8, 8, generator=rng), torch.arange(count) % 10


def refiner(model, config=CONFIG, limit=1.5):
    limits = torch.full((1, 1, 1), -limit), torch.full((1, 1, 1), limit)
    return Refiner(FrozenTeacher(model, (1, 8, 8)), starts, limits, config)


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


def test_a_step_written_out(model):
    made = refiner(model, limit=100.0)
    images, labels = starts(0)
    metrics = made.step(0)
    x = images.clone().requires_grad_()
    bns, entropy = loss_of(model, x, labels)
    assert metrics["refine_bns"] == pytest.approx(bns.item(), rel=1e-4)
    assert metrics["refine_ce"] == pytest.approx(entropy.item(), rel=1e-4)
    (CONFIG.bns_weight * bns + CONFIG.ce_weight * entropy).backward()
    moved = made.state_tensors()["current"] - images
    # Adam's first step has the size of the rate, where the gradient is not nothing.
    clear = x.grad.abs() > 1e-3 * x.grad.abs().max()
    assert clear.float().mean() > 0.5
    torch.testing.assert_close(moved[clear], -CONFIG.lr * x.grad[clear].sign(), rtol=1e-3, atol=0)


def test_groups_come_near_the_teacher_within_the_limits(model):
    made = refiner(model)
    assert (made.groups, made.steps) == (2, 60)
    told = [made.step(index) for index in range(made.steps)]
    assert made.images.shape == (20, 1, 8, 8)
    assert torch.equal(made.labels, torch.cat([starts(0)[1], starts(1)[1]]))
    assert made.images.abs().max() == 1.5
    for group, rows in enumerate((slice(0, 12), slice(12, 20))):
        before, _ = loss_of(model, starts(group)[0].clamp(-1.5, 1.5), starts(group)[1])
        with torch.no_grad():
            after, entropy = loss_of(model, made.images[rows], made.labels[rows])
        assert after < 0.5 * before
        assert after.item() == pytest.approx(told[30 * group + 29]["refine_bns"], rel=0.5)
        assert entropy < 0.5


@pytest.mark.parametrize("stop", [0, 7, 30, 41, 60])
def test_resuming_is_bit_identical(model, stop):
    straight, first, second = (refiner(model) for _ in range(3))
    for index in range(60):
        straight.step(index)
    for index in range(stop):
        first.step(index)
    second.load_state_tensors({k: v.clone() for k, v in first.state_tensors().items()})
    for index in range(stop, 60):
        second.step(index)
    assert torch.equal(second.images, straight.images)
    assert torch.equal(second.labels, straight.labels)


def test_limits_are_those_of_every_channel():
    images = torch.stack([torch.zeros(3, 4, 4), torch.arange(3.0).view(3, 1, 1).expand(3, 4, 4)])
    low, high = limits_of(images)
    assert low.flatten().tolist() == [0.0, 0.0, 0.0]
    assert high.flatten().tolist() == [0.0, 1.0, 2.0]
    assert low.shape == high.shape == (3, 1, 1)


@pytest.mark.parametrize("start", ["calibration", "generator"])
def test_half_of_a_batch_is_refined(model, calibration, monkeypatch, start):
    """And starts from what the settings say."""
    began, batches = [], []
    begin, step = Refiner._begin, stages.Finetuner.step

    def noted_begin(self, images, labels):
        began.append((images.clone(), labels))
        begin(self, images, labels)

    def noted_step(self, index, synthetic):
        batches.append(synthetic)
        return step(self, index, synthetic)

    monkeypatch.setattr(Refiner, "_begin", noted_begin)
    monkeypatch.setattr(stages.Finetuner, "step", noted_step)
    torch.manual_seed(0)
    generator = Generator(10, (1, 8, 8)).eval()
    config = SHORT.replace(refine=SHORT.refine.replace(start=start))
    told = []
    quantize(
        model, calibration, Bits(), config, generator,
        progress=lambda done, total, metrics: told.append((done, total)),
    )  # fmt: skip
    assert told == [(i + 1, 6) for i in range(6)]
    assert [len(images) for images, _ in began] == [8, 4]
    labels = torch.cat([labels for _, labels in began])
    low, high = limits_of(calibration[0])
    assert all(bool(((low <= x) & (x <= high)).all()) for x, _ in began)
    expected = calibration[1][:12] if start == "calibration" else torch.arange(12) % 10
    assert torch.equal(labels, expected)
    refined = [images[2:] for images, _ in batches]
    assert [len(images) for images in refined] == [3, 3]
    for images in refined:  # moved for two steps of at most the rate
        far = torch.cdist(images.flatten(1), torch.cat([x for x, _ in began]).flatten(1))
        assert 0 < far.min(1).values.max() <= 2 * config.refine.lr * 8


def test_warm_up_comes_first_where_no_generator_is_given(model, calibration):
    told = []
    quantize(model, calibration, Bits(), SHORT, progress=lambda *a: told.append(a))
    assert [next(iter(metrics)) for _, _, metrics in told[2:6]] == ["refine_bns"] * 4
    assert "loss" in told[0][2]
    assert "student_loss" in told[6][2]
    assert told[-1][:2] == (8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": -1}, "images must be >= 0, got -1"),
        ({"start": "noise"}, "start must be one of .*, got 'noise'"),
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
