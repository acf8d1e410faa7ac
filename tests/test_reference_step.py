"""The library's step and the benchmarks' plain one compute the same losses and gradients."""

import copy
import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from norms import randomize_norms
from torch import nn

from fdda_fast.config import QuantizeConfig, SynthesisConfig
from fdda_fast.quantization.bits import Bits
from fdda_fast.quantization.finetune import Finetuner
from fdda_fast.quantization.modules import activation_quantizers
from fdda_fast.quantization.prepare import prepare
from fdda_fast.seeding import stream
from fdda_fast.statistics import collect_centers
from fdda_fast.synthesis import _STEP_STREAM, GeneratorTrainer

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from reference_step import (
    Draws,
    PlainActivation,
    PlainGenerator,
    ReferenceStep,
    plain_student,
)

CLASSES, SHAPE = 5, (3, 12, 8)


class Net(nn.Module):
    """Every ReLU is a module of its own, as in the authors' networks."""

    def __init__(self) -> None:
        super().__init__()

        def layer(channels_in, channels, stride=1):
            conv = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())

        self.stem = layer(3, 8)
        self.body = nn.Sequential(layer(8, 12, 2), layer(12, 12))
        self.branch = nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12))
        self.relu = nn.ReLU()
        self.last = layer(12, 16)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        x = self.relu(self.body(x) + self.branch(x))
        return self.fc(self.last(x).mean((2, 3)))


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(3)
    model = Net()
    randomize_norms(model)
    return model.eval()


@pytest.fixture(scope="module")
def calibration():
    images = torch.randn(2 * CLASSES, *SHAPE, generator=torch.Generator().manual_seed(4))
    return images, torch.arange(CLASSES).repeat(2)


@pytest.fixture(scope="module")
def centers(teacher, calibration):
    centers = collect_centers(teacher, *calibration, CLASSES)
    return dataclasses.replace(centers, reliable=torch.ones(CLASSES, dtype=torch.bool))


def plain_step(teacher, generator, student, centers):
    by_class = [
        [(mean[k], var[k]) for mean, var in zip(centers.mean, centers.var, strict=True)]
        for k in range(CLASSES)
    ]
    return ReferenceStep(copy.deepcopy(teacher), generator, student, by_class)


def draws(config, index, centers):
    """What the library's step draws, in its order."""
    rng = stream(config.seed, _STEP_STREAM, index)
    labels = torch.randint(CLASSES, (config.batch_size,), generator=rng)
    class_b = int(torch.randperm(CLASSES, generator=rng)[0])
    z = torch.randn(config.batch_size + config.images_per_class, 100, generator=rng)
    noise = [
        (torch.randn(mean.shape[1], generator=rng), torch.randn(mean.shape[1], generator=rng))
        for mean in centers.mean
    ]
    return Draws(z[: config.batch_size], labels, z[config.batch_size :], class_b, noise)


def assert_same_gradients(plain, ours):
    """Up to rounding: 2e-3 of a tensor's largest, 1e-6 of all (biases before a norm have none).

    Most agree to 1e-6; a number that rounding moves across a ReLU's bend makes the rest.
    """
    expected = {name: p.grad for name, p in plain.named_parameters()}
    largest = max(grad.abs().max().item() for grad in expected.values())
    gradients = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert set(gradients) == set(expected)
    for name, want in expected.items():
        atol = max(2e-3 * want.abs().max().item(), 1e-6 * largest)
        torch.testing.assert_close(gradients[name], want, rtol=1e-4, atol=atol)


def test_generator_step(teacher, centers):
    config = SynthesisConfig.reference()
    trainer = GeneratorTrainer(teacher, centers, config)
    generator = PlainGenerator(CLASSES, SHAPE)
    plain = plain_step(teacher, generator, plain_student(teacher, 4, 4), centers)
    for index in range(3):
        # Adam turns the rounding errors in place of a zero gradient into whole steps.
        generator.load_state_dict(trainer.generator.state_dict())
        images, labels, metrics = trainer.step(index)
        drawn = draws(config, index, centers)
        expected, losses = plain.generator_step(drawn)
        assert torch.equal(labels, drawn.labels_a)
        torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)
        assert metrics == pytest.approx({k: v.item() for k, v in losses.items()}, rel=1e-4)
        assert_same_gradients(generator, trainer.generator)
        statistics = dict(trainer.generator.named_buffers())
        for name, value in generator.named_buffers():
            torch.testing.assert_close(statistics[name], value, rtol=1e-4, atol=1e-5)


def test_student_step(teacher, calibration, centers):
    config = QuantizeConfig.reference()
    student = prepare(teacher, Bits(4, 4), placement="paper", from_zero=True)
    student_plain = plain_student(teacher, 4, 4)
    tuner = Finetuner(student, teacher, calibration, config)
    activations = [m for m in student_plain.modules() if isinstance(m, PlainActivation)]
    for module in activations:
        module.observing = True
    for seed in range(20):
        images = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(seed))
        tuner.observe(images)
        with torch.no_grad():
            student_plain(images)
    for module, quantizer in zip(activations, activation_quantizers(student), strict=True):
        module.observing = False
        torch.testing.assert_close(module.x_max, quantizer.x_max)
        module.x_max.copy_(quantizer.x_max)
    plain = plain_step(teacher, PlainGenerator(CLASSES, SHAPE), student_plain, centers)
    synthetic = (torch.randn(16, *SHAPE), torch.randint(CLASSES, (16,)))
    for index in range(3):
        metrics = tuner.step(index, synthetic)
        loss = plain.student_step(*tuner.batch(index, synthetic))
        assert metrics["student_loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert_same_gradients(student_plain, student)
