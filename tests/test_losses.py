"""The losses of FDDA against float64 numpy."""

import numpy as np
import pytest
import torch

from fdda_fast.losses import (
    distillation,
    distorted,
    first_deep_layer,
    moment_distance,
    standard_normal_targets,
)
from fdda_fast.statistics import Moments

CHANNELS = (3, 7, 5, 2)


def some_moments(seed, groups):
    generator = torch.Generator().manual_seed(seed)
    return [
        Moments(
            torch.randn(groups, c, generator=generator), torch.rand(groups, c, generator=generator)
        )
        for c in CHANNELS
    ]


def numpy_distance(moments, targets, layers):
    """Mean over layers of MSE(mean) + MSE(var), group by group."""
    total = 0.0
    for layer in layers:
        for got, target in zip(moments[layer], targets[layer], strict=True):
            total = total + np.mean((got.double().numpy() - target.double().numpy()) ** 2, axis=1)
    return total / len(layers)


@pytest.mark.parametrize(
    ("layers", "first"), [(20, 8), (27, 12), (52, 24), (53, 25), (1, 0), (3, 0), (5, 1), (6, 1)]
)
def test_first_deep_layer(layers, first):
    assert first_deep_layer(layers) == first


@pytest.mark.parametrize("layers", [range(4), range(2, 4), range(3, 4)])
def test_moment_distance(layers):
    moments, targets = some_moments(0, 3), some_moments(1, 3)
    result = moment_distance(moments, targets, layers)
    assert result.shape == (3,)
    np.testing.assert_allclose(result, numpy_distance(moments, targets, layers), rtol=1e-5)
    # Layers outside the range have no say.
    for layer in set(range(4)) - set(layers):
        moments[layer] = Moments(moments[layer].mean + 9, moments[layer].var * 3)
    assert torch.equal(moment_distance(moments, targets, layers), result)


def test_moment_distance_to_one_target_for_all():
    moments, target = some_moments(0, 3), some_moments(1, 1)
    result = moment_distance(moments, target, range(4))
    np.testing.assert_allclose(result, numpy_distance(moments, target, range(4)), rtol=1e-5)


@pytest.mark.parametrize("clamp", [False, True])
def test_distorted_centers(clamp):
    centers = some_moments(2, 2)
    result = distorted(centers, (0.5, 1.0), torch.Generator().manual_seed(5), clamp=clamp)
    rng = torch.Generator().manual_seed(5)
    negative = 0
    for (mean, var), got in zip(centers, result, strict=True):
        noise = [torch.randn(mean.shape, generator=rng).double().numpy() for _ in range(2)]
        expected = var.double().numpy() + 1.0 * noise[1]
        negative += (expected < 0).sum()
        if clamp:
            expected = np.maximum(expected, 0)
        mean = mean.double().numpy() + 0.5 * noise[0]
        np.testing.assert_allclose(got.mean, mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got.var, expected, rtol=1e-5, atol=1e-6)
    assert negative > 0  # or the clamp is not tested


def test_distortion_has_the_stated_spread():
    centers = [Moments(torch.full((4, 5000), 3.0), torch.full((4, 5000), 8.0))]
    rng = torch.Generator().manual_seed(0)
    for std in ((0.5, 1.0), (0.1, 2.0)):
        (got,) = distorted(centers, std, rng, clamp=False)
        for value, center, spread in zip(got, (3.0, 8.0), std, strict=True):
            assert value.mean().item() == pytest.approx(center, abs=5 * spread / 20000**0.5)
            assert value.std().item() == pytest.approx(spread, rel=0.03)


def test_distortion_is_redrawn():
    centers, rng = some_moments(2, 2), torch.Generator().manual_seed(5)
    first = distorted(centers, (0.5, 1.0), rng, clamp=False)
    second = distorted(centers, (0.5, 1.0), rng, clamp=False)
    assert not torch.equal(first[0].mean, second[0].mean)


def test_standard_normal_targets():
    like = [Moments(torch.full((2, 4000), 7.0), torch.full((2, 4000), 9.0))]
    (got,) = standard_normal_targets(like, torch.Generator().manual_seed(1))
    rng = torch.Generator().manual_seed(1)
    assert torch.equal(got.mean, torch.randn(2, 4000, generator=rng))
    assert torch.equal(got.var, torch.randn(2, 4000, generator=rng))
    for value in got:
        assert abs(value.mean().item()) < 0.06
        assert value.std().item() == pytest.approx(1, rel=0.05)


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("temperature", [20.0, 4.0, 1.0])
def test_distillation(temperature):
    generator = torch.Generator().manual_seed(0)
    student, teacher = 5 * torch.randn(2, 6, 10, generator=generator, dtype=torch.float64)
    p, q = softmax(teacher.numpy() / temperature), softmax(student.numpy() / temperature)
    expected = temperature**2 * (p * (np.log(p) - np.log(q))).sum() / len(student)
    result = distillation(student, teacher, temperature)
    assert result.item() == pytest.approx(expected, rel=1e-9)
    single = distillation(student.float(), teacher.float(), temperature)
    assert single.item() == pytest.approx(expected, rel=1e-3)
    assert distillation(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-9)


def test_distillation_of_one_logit_is_that_of_its_sigmoid():
    student, teacher = torch.tensor([[0.3], [-2.0]]), torch.tensor([[1.0], [-1.5]])
    p, q = (1 / (1 + np.exp(-x.double().numpy() / 2)) for x in (teacher, student))
    expected = 4 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean()
    assert distillation(student, teacher, 2.0).item() == pytest.approx(expected, rel=1e-5)
