"""Merging moments, streamed centers, generators of some classes: in one process."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from norms import randomize_norms
from torch import nn

from fdda_fast.config import SynthesisConfig
from fdda_fast.distributed import Ranks, merged
from fdda_fast.fingerprints import fingerprint
from fdda_fast.models.small import SmallResNet
from fdda_fast.statistics import BNSCenters, collect_centers, stream_centers
from fdda_fast.synthesis import GeneratorTrainer, train_generator

CLASSES, SHAPE = 6, (2, 9, 8)
CONFIG = SynthesisConfig(
    steps=3, any_class_steps=1, batch_size=6, classes_per_step=2, images_per_class=2
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    model = SmallResNet(1, 2, CLASSES)
    randomize_norms(model)
    return model.eval().requires_grad_(False)


def images_of(labels):
    rng = torch.Generator().manual_seed(2)
    return torch.randn(len(labels), *SHAPE, generator=rng), torch.tensor(labels)


@pytest.fixture(scope="module")
def centers(model):
    """Classes 1, 3 and 4 are reliable."""
    centers = collect_centers(model, *images_of([*range(CLASSES)] * 2), CLASSES)
    reliable = torch.tensor([False, True, False, True, True, False])
    return dataclasses.replace(centers, reliable=reliable)


@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    offset=st.sampled_from([0.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_merged_moments_are_those_of_the_union(sizes, offset, seed):
    rng = torch.Generator().manual_seed(seed)
    parts = [offset + torch.randn(n, 3, generator=rng, dtype=torch.float64) for n in sizes]
    nothing = torch.zeros(3, dtype=torch.float64)
    mean = torch.stack([p.mean(0) if len(p) else nothing for p in parts])
    var = torch.stack([p.var(0, unbiased=False) if len(p) else nothing for p in parts])
    count = torch.tensor(sizes)[:, None]
    got = merged(count, mean[:, None], var[:, None])
    union = torch.cat(parts)
    expected = (union.mean(0), union.var(0, unbiased=False)) if len(union) else (nothing, nothing)
    torch.testing.assert_close(got.mean[0], expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.var[0], expected[1], rtol=1e-8, atol=1e-12)


def test_merging_is_differentiable():
    count = torch.tensor([[2, 0], [3, 5], [4, 0]])
    mean, var = torch.randn(2, 3, 2, 4, dtype=torch.float64).unbind()
    inputs = [mean.requires_grad_(), var.abs().detach().requires_grad_()]
    torch.autograd.gradcheck(lambda m, v: merged(count, m, v), inputs)


@settings(deadline=None, max_examples=15)
@given(
    labels=st.lists(st.sampled_from([0, 1, 2, 5]), min_size=1, max_size=24),
    cuts=st.sets(st.integers(1, 23)),
)
def test_streamed_centers_for_any_split(model, labels, cuts):
    images, labels = images_of(labels)
    cuts = [0, *sorted(c for c in cuts if c < len(labels)), len(labels)]
    batches = ((images[a:b], labels[a:b]) for a, b in itertools.pairwise(cuts))
    got = stream_centers(model, batches, CLASSES)
    expected = collect_centers(model, images, labels, CLASSES)
    for name in ("mean", "var"):
        for a, b in zip(getattr(got, name), getattr(expected, name), strict=True):
            assert a.dtype == b.dtype == torch.float32
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert torch.equal(got.count, expected.count)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-6)
    assert torch.equal(got.reliable, expected.reliable)
    assert got.image_shape == expected.image_shape == SHAPE


def test_streamed_centers_refuse_bad_input(model):
    images, labels = images_of([0, 1])
    with pytest.raises(ValueError, match=r"of one shape on all processes, got \[\]"):
        stream_centers(model, [], CLASSES)
    with pytest.raises(ValueError, match=r"images must be float \[N, C, H, W\], got \[2, 9, 8\]"):
        stream_centers(model, [(images[0], labels)], CLASSES)
    with pytest.raises(ValueError, match=r"labels of images must lie in 0\.\.5, got 0\.\.7"):
        stream_centers(model, [(images, labels), (images, 7 * labels)], CLASSES)
    with pytest.raises(ValueError, match="no BatchNorm2d"):
        stream_centers(nn.Sequential(nn.Flatten(), nn.Linear(144, 6)), [(images, labels)], CLASSES)


class Rolled(nn.Module):
    """A teacher whose class 2 is called 0."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return torch.roll(self.model(x), -2, 1)


def test_a_generator_of_some_classes(model, centers, tmp_path):
    some = centers.between(2, 5)
    assert (some.first_class, some.num_classes) == (2, 3)
    some.save(tmp_path / "c.safetensors")
    assert BNSCenters.load(tmp_path / "c.safetensors").first_class == 2
    assert some.between(1, 2).first_class == 3
    assert train_generator(model, some, CONFIG).num_classes == 3
    metrics = GeneratorTrainer(model, some, CONFIG).step(0)[2]
    from_zero = dataclasses.replace(some, first_class=0)
    rolled = Rolled(model)
    of_rolled = dataclasses.replace(from_zero, teacher=fingerprint({}, rolled))
    renamed = GeneratorTrainer(rolled, of_rolled, CONFIG).step(0)[2]
    assert metrics == pytest.approx(renamed, rel=1e-5)
    other = GeneratorTrainer(model, from_zero, CONFIG).step(0)[2]
    assert metrics["ce"] != pytest.approx(other["ce"], rel=1e-3)
    with pytest.raises(ValueError, match="0 <= first < stop <= 6, got 5, 7"):
        centers.between(5, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 6}, "batch_size must be >= the number of processes .7., got 6"),
        ({"batch_size": 7}, "images_per_class . classes per step must be >= .* .7., got 4"),
    ],
)
def test_fewer_images_than_ranks(model, centers, changes, message):
    with pytest.raises(ValueError, match=message):
        GeneratorTrainer(model, centers, CONFIG.replace(**changes), Ranks(0, 7))
