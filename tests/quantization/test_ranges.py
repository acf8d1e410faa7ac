"""Searches on histograms, against searches on the values themselves."""

import itertools

import pytest
import torch

from fdda_fast import ops
from fdda_fast.quantization.modules import ActivationQuantizer
from fdda_fast.quantization.ranges import BINS, SHRINKS, histogram, of_least_error, of_percentile


def values(kind, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 5, 17, 19, generator=rng)
    return {
        "relu": x.relu(),
        "outlier": torch.where(torch.rand(x.shape, generator=rng) < 1e-3, 9.0, x.relu()),
        "skewed": torch.where(x < 0, 0.2 * x, x.exp()),
        "below": -x.abs(),
    }[kind]


def ends(x):
    return x.min().clamp(max=0), x.max().clamp(min=0)


def test_histogram():
    x = torch.tensor([[-2.0, -1.0, 0.1], [2.0, 3.0, 1.99]])
    counts = histogram(x, -1.0, 2.0)
    assert counts.shape == (BINS,)
    assert counts.sum() == 6
    assert (counts[0], counts[-1]) == (2, 2)  # with what lies outside
    points = torch.linspace(-1, 2, BINS)
    for value in (0.1, 1.99):
        assert counts[(points - value).abs().argmin()] == 1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["relu", "outlier", "skewed", "below"])
def test_least_error(kind, bits):
    x = values(kind)
    x_min, x_max = ends(x)

    def error(low, high):
        return (ops.fake_quantize_range(x, low, high, bits) - x).double().square().sum().item()

    low, high = of_least_error(histogram(x, float(x_min), float(x_max)), x_min, x_max, bits)
    pairs = itertools.product(SHRINKS, SHRINKS)
    least = min(error(a * x_min, b * x_max) for a, b in pairs)
    assert least <= error(low, high) <= 1.02 * least
    if kind == "outlier" and bits < 8:
        assert error(low, high) < 0.9 * error(x_min, x_max)


@pytest.mark.parametrize("percentile", [60.0, 99.0, 99.9, 100.0])
@pytest.mark.parametrize("kind", ["relu", "skewed", "below"])
def test_percentile(kind, percentile):
    x = values(kind)
    x_min, x_max = ends(x)
    counts = histogram(x, float(x_min), float(x_max))
    low, high = of_percentile(counts, x_min, x_max, percentile)
    p = percentile / 100
    step = (x_max - x_min).item() / (BINS - 1)
    expected = [torch.quantile(x, q, interpolation="lower").item() for q in (1 - p, p)]
    assert low.item() == pytest.approx(max(expected[0], x_min.item()), abs=2 * step)
    assert high.item() == pytest.approx(expected[1], abs=2 * step + 0.02 * abs(expected[1]))


@pytest.mark.parametrize("include_zero", [True, False])
def test_quantizer_takes_percentiles_of_all_batches(include_zero):
    quantizer = ActivationQuantizer(4, include_zero=include_zero, from_zero=False)
    batches = [5 + values("outlier", seed) for seed in (1, 2)]
    quantizer.x_min.fill_(0.0 if include_zero else 5.0)
    quantizer.x_max.fill_(14.0)
    quantizer.mode = "measure"
    for x in batches:
        assert quantizer(x) is x
    quantizer.shrink_range(90.0)
    expected = torch.quantile(torch.cat(batches), 0.9).item()
    assert quantizer.x_max.item() == pytest.approx(expected, abs=0.02)
    assert quantizer.x_min.item() == pytest.approx(0 if include_zero else 5, abs=0.01)
    before = quantizer.x_max.clone()
    quantizer.shrink_range(90.0)  # nothing measured since
    assert quantizer.x_max == before


def test_dead_range_stays():
    quantizer = ActivationQuantizer(4, include_zero=True, from_zero=False)
    quantizer.mode = "measure"
    quantizer(torch.zeros(3))
    quantizer.shrink_range()
    assert (quantizer.x_min, quantizer.x_max) == (0, 0)
