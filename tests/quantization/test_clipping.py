"""Clipping of 2-bit weights."""

import pytest
import torch
from torch import nn

from fdda_fast import ops
from fdda_fast.quantization import clipping
from fdda_fast.quantization.bits import Bits
from fdda_fast.quantization.clipping import clip_weights
from fdda_fast.quantization.prepare import prepare


def prepared(bits, weight):
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], bias=False)
    layer.weight.data.copy_(weight)
    return prepare(nn.Sequential(layer), bits)


def error(rounded, weight):
    return (rounded - weight).square().flatten(1).sum(1)


def test_no_clipping_to_a_grid_of_ends_is_better():
    """Against a search written out; every channel for itself."""
    weight = torch.randn(5, 7, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[1, 0, 0, 0] = 30.0
    weight[2] = 0.25
    weight[3] = weight[3].abs() + 0.1
    student = prepared(Bits(2, 4), weight)
    clip_weights(student)
    layer = student.get_submodule("0")
    found = error(layer.quantized_weight().detach(), weight)
    assert torch.equal(layer.weight, weight.clamp(*_ends(layer.weight)))
    for channel in range(5):
        row = weight[channel : channel + 1]
        tried = [
            error(ops.fake_quantize_minmax(row.clamp(a * row.min(), b * row.max()), 2, 0), row)
            for a in torch.arange(5, 21) / 20
            for b in torch.arange(5, 21) / 20
        ]
        assert found[channel] == pytest.approx(min(tried).item(), rel=1e-4, abs=1e-9)
    plain = error(ops.fake_quantize_minmax(weight, 2, 0), weight)
    assert (found <= plain).all()
    assert found[0] < 0.8 * plain[0]
    assert found[1] < plain[1]
    assert torch.equal(layer.weight[2], weight[2])


def _ends(weight):
    low, high = weight.flatten(1).aminmax(dim=1)
    return low.view(-1, 1, 1, 1), high.view(-1, 1, 1, 1)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_wider_weights_stay(bits):
    weight = torch.randn(3, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    student = prepared(Bits(bits, 4), weight)
    clip_weights(student)
    assert torch.equal(student.get_submodule("0").weight, weight)


def test_percentiles_of_every_channel(monkeypatch):
    monkeypatch.setattr(clipping, "_QUANTILE_NUMBERS", 2 * 7 * 9)  # two channels at once
    weight = torch.randn(5, 7, 3, 3, generator=torch.Generator().manual_seed(2))
    weight[1, 0, 0, 0] = 30.0
    student = prepared(Bits(4, 4), weight)
    clip_weights(student, "percentile", 95.0)
    clipped = student.get_submodule("0").weight
    for channel in range(5):
        row = weight[channel].flatten()
        low, high = (torch.quantile(row, q) for q in (0.05, 0.95))
        torch.testing.assert_close(clipped[channel].flatten(), row.clamp(low, high))


def test_least_error_of_wider_weights_on_request():
    weight = torch.randn(5, 64, 3, 3, generator=torch.Generator().manual_seed(3))
    plain = error(ops.fake_quantize_minmax(weight, 3, 0), weight)
    student = prepared(Bits(3, 4), weight)
    clip_weights(student, "mse")
    found = error(student.get_submodule("0").quantized_weight().detach(), weight)
    assert (found < plain).all()
    student = prepared(Bits(2, 4), weight)
    clip_weights(student, "minmax")
    assert torch.equal(student.get_submodule("0").weight, weight)
