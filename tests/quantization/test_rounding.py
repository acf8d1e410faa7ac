"""Learned rounding: it starts at the weights, ends on the layer's grid, and packs as it is."""

import pytest
import torch
from torch import nn

from fdda_fast.deploy.fold import weight_codes
from fdda_fast.quantization.modules import quantized_layer
from fdda_fast.quantization.rounding import LearnedRounding


def layer_of(weight, bits):
    layer = quantized_layer(nn.Linear(weight.shape[1], len(weight), bias=False), bits)
    layer.weight.data.copy_(weight)
    return layer


def rows():
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(5, 40, generator=rng)
    special = [torch.zeros(40), torch.full((40,), -0.3), noise[0].abs() + 0.1, -noise[1].abs()]
    return torch.cat([noise, torch.stack(special)])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_nothing_is_rounded_at_first(bits):
    layer = layer_of(rows(), bits)
    rounding = LearnedRounding(layer)
    weight, step = layer.weight, 1 / rounding.scale
    assert ((rounding() - weight).abs() <= 0.5 * step + 1e-6).all()
    # Only at the ends of the grid, which holds 0, can it be more than the least fraction.
    near = ((rounding() - weight).abs() <= 2e-3 * step).float().mean()
    assert near > 0.85
    assert torch.equal(rounding.undecided(2.0) > 0, torch.tensor(True))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_hardened_weights_are_the_codes_that_pack(bits):
    """Whatever was learned: the layer's own grid and packing find the very codes."""
    layer = layer_of(rows(), bits)
    rounding = LearnedRounding(layer)
    with torch.no_grad():
        rounding.variable.copy_(
            torch.randn(rounding.variable.shape, generator=torch.Generator().manual_seed(1))
        )
    up = (rounding.variable >= 0) & rounding.free
    codes = (rounding.below + up).int()
    before = layer.weight.detach().clone()
    nearest = weight_codes("", layer_of(before, bits))[0]
    rounding.harden(layer)
    assert rounding.undecided(20.0) > 0  # the variables are as they were
    assert not torch.equal(layer.weight, before)
    torch.testing.assert_close(layer.quantized_weight(), layer.weight, rtol=1e-6, atol=1e-7)
    q, offset, _ = weight_codes("layer", layer)
    spread = before.amax(1) > before.amin(1)
    packed = q + offset[:, None]
    zero = rounding.zero_point.int()
    assert torch.equal(packed[spread], (codes + zero)[spread])
    assert not torch.equal(q[:5], nearest[:5])
    once = layer.quantized_weight()
    layer.weight.data.copy_(once)
    assert torch.equal(layer.quantized_weight(), once)


def test_both_ends_of_a_channel_stay():
    weight = rows()
    layer = layer_of(weight, 2)
    rounding = LearnedRounding(layer)
    for value, free in ((-9.0, 0), (9.0, 1)):
        with torch.no_grad():
            rounding.variable.fill_(value)
        got = rounding()
        assert ((rounding.upward() > 0.5).float().mean() == free).all()
        low, high = weight.argmin(1), weight.argmax(1)
        for row in range(5):
            assert (got[row] >= got[row, low[row]]).all()
            assert (got[row] <= got[row, high[row]]).all()
            levels = (got[row, high[row]] - got[row, low[row]]) * rounding.scale[row]
            assert levels.item() == pytest.approx(3, rel=1e-5)


def test_a_channel_without_room_for_a_grid_stays():
    weight = 1e4 + 1e-3 * torch.arange(8.0).repeat(2, 1)
    weight[1] = torch.arange(8.0)
    layer = layer_of(weight, 8)
    rounding = LearnedRounding(layer)
    with torch.no_grad():
        rounding.variable.neg_()
    rounding.harden(layer)
    assert torch.equal(layer.weight[0], layer_of(weight, 8).weight[0])


def test_gradients_reach_free_weights_alone():
    layer = layer_of(rows()[:5], 3)
    rounding = LearnedRounding(layer)
    (rounding().square().sum() + rounding.undecided(3.0)).backward()
    gradient = rounding.variable.grad
    assert torch.equal(gradient == 0, ~rounding.free | (rounding.upward() % 1 == 0))
    assert layer.weight.grad is None
