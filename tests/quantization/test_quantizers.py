"""Fake-quantised layers and activation ranges against float64 numpy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fdda_fast.quantization.modules import (
    ActivationQuantizer,
    QuantConv2d,
    QuantLinear,
    activation_quantizers,
    quantized_layer,
    quantizer_mode,
)


def fake_quantize(x, low, high, bits):
    """method.md section 4 in float64; numpy rounds half to even."""
    scale = (2**bits - 1) / max(high - low, 1e-8)
    zero_point = np.round(scale * low) + 2 ** (bits - 1)
    q = np.clip(np.round(scale * x - zero_point), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (q + zero_point) / scale


def off_tie(x, low, high, bits):
    """Where rounding errors of float32 cannot change the code."""
    scaled = (2**bits - 1) / max(high - low, 1e-8) * x
    return np.abs(scaled - np.floor(scaled) - 0.5) > 1e-4


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["conv", "grouped", "linear"])
def test_weights_per_output_channel(bits, kind):
    torch.manual_seed(bits)
    layer = {
        "conv": nn.Conv2d(3, 5, 3, 2, 1, dilation=2),
        "grouped": nn.Conv2d(6, 6, 3, groups=3, bias=False),
        "linear": nn.Linear(7, 5),
    }[kind]
    weight = layer.weight
    quantized = quantized_layer(layer, bits)
    assert type(quantized) is (QuantLinear if kind == "linear" else QuantConv2d)
    assert quantized.weight is weight
    assert quantized.weight_bits == bits
    w = weight.detach().double().numpy()
    expected = np.stack([fake_quantize(c, c.min(), c.max(), bits) for c in w])
    good = np.stack([off_tie(c, c.min(), c.max(), bits) for c in w])
    got = quantized.quantized_weight().detach().numpy()
    assert good.mean() > 0.99
    np.testing.assert_allclose(got[good], expected[good], rtol=1e-5, atol=1e-6)
    x = (
        torch.randn(2, 7)
        if kind == "linear"
        else torch.randn(2, weight.shape[1] * layer_groups(layer), 9, 9)
    )
    y = quantized(x)
    plain = torch.from_numpy(got)
    if kind == "linear":
        reference = F.linear(x, plain, layer.bias)
    else:
        reference = F.conv2d(
            x, plain, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups
        )
    torch.testing.assert_close(y, reference)
    assert not torch.allclose(y, layer(x), atol=1e-6)


def layer_groups(layer):
    return getattr(layer, "groups", 1)


def test_weight_ranges_follow_the_weights():
    quantized = quantized_layer(nn.Linear(4, 2), 2)
    with torch.no_grad():
        quantized.weight.copy_(torch.tensor([[0.0, 1, 2, 3], [0, 1, 2, 3]]))
    torch.testing.assert_close(quantized.quantized_weight(), quantized.weight)
    with torch.no_grad():
        quantized.weight[1] *= 7
    torch.testing.assert_close(quantized.quantized_weight(), quantized.weight)


def test_gradients_pass_straight_through():
    quantized = quantized_layer(nn.Linear(4, 2), 2)
    quantized.quantized_weight().mul(torch.arange(8.0).view(2, 4)).sum().backward()
    assert torch.equal(quantized.weight.grad, torch.arange(8.0).view(2, 4))
    quantizer = ActivationQuantizer(2, include_zero=True, from_zero=False)
    quantizer.x_max.fill_(1.0)
    x = torch.tensor([-5.0, 0.3, 9.0], requires_grad=True)  # clipped, inside, clipped
    quantizer(x).mul(torch.tensor([1.0, 2, 3])).sum().backward()
    assert x.grad.tolist() == [1, 2, 3]


# The first lies above zero, the second below, the others on both sides.
BATCHES = [
    np.random.default_rng(s).normal(mean, 1 + s, (4, 2, 3, 3))
    for s, mean in enumerate((9, -11, 0, 1))
]


@pytest.mark.parametrize("include_zero", [False, True])
@pytest.mark.parametrize("from_zero", [False, True])
def test_observed_range(include_zero, from_zero):
    quantizer = ActivationQuantizer(4, include_zero=include_zero, from_zero=from_zero)
    quantizer.mode = "observe"
    low = high = None
    if from_zero:
        low = high = 0.0
    for count, batch in enumerate(BATCHES, 1):
        x = torch.from_numpy(batch).float()
        y = quantizer(x)
        x_min, x_max = batch.min(), batch.max()
        if include_zero:
            x_min, x_max = min(x_min, 0), max(x_max, 0)
        low = x_min if low is None else 0.9 * low + 0.1 * x_min
        high = x_max if high is None else 0.9 * high + 0.1 * x_max
        assert quantizer.x_min.item() == pytest.approx(low, rel=1e-5, abs=1e-6)
        assert quantizer.x_max.item() == pytest.approx(high, rel=1e-5)
        assert quantizer.observed.item() == count
        expected = fake_quantize(batch, low, high, 4)  # with the range as it is now
        good = off_tie(batch, low, high, 4)
        np.testing.assert_allclose(y.numpy()[good], expected[good], rtol=1e-4, atol=1e-4)


def test_quantizing_leaves_the_range_alone():
    quantizer = ActivationQuantizer(4, include_zero=True, from_zero=False)
    quantizer.mode = "observe"
    quantizer(torch.tensor([-1.0, 2.0]))
    quantizer.mode = "quantize"
    y = quantizer(torch.tensor([-100.0, 0.0, 0.61, 100.0]))
    assert (quantizer.x_min.item(), quantizer.x_max.item()) == (-1, 2)
    assert y.numpy() == pytest.approx([-1, 0, 0.6, 2], abs=1e-6)
    assert set(quantizer.state_dict()) >= {"x_min", "x_max", "observed"}


@pytest.mark.parametrize("bits", [2, 4])
def test_shrinking_takes_the_least_squared_error(bits):
    rng = np.random.default_rng(bits)
    batches = [s * rng.normal(size=4000) for s in (1, 0.8)]
    for batch in batches:
        batch[:20] = 6
        batch[20:30] = -5
    quantizer = ActivationQuantizer(bits, include_zero=True, from_zero=False)
    quantizer.mode = "observe"
    for batch in batches:
        quantizer(torch.from_numpy(batch).float())
    low, high = quantizer.x_min.item(), quantizer.x_max.item()
    quantizer.mode = "measure"
    for batch in batches:
        x = torch.from_numpy(batch).float()
        assert torch.equal(quantizer(x), x)
    assert (quantizer.x_min.item(), quantizer.x_max.item()) == (low, high)
    shrinks = [i / 20 for i in range(20, 4, -1)]

    def error(low, high):
        return sum(np.mean((fake_quantize(b, low, high, bits) - b) ** 2) for b in batches)

    least = min(error(a * low, b * high) for a in shrinks for b in shrinks)
    assert least < 0.9 * error(low, high)  # or nothing would be tested
    quantizer.shrink_range()
    assert error(quantizer.x_min.item(), quantizer.x_max.item()) <= 1.01 * least


def test_shrinking_starts_afresh():
    quantizer = ActivationQuantizer(2, include_zero=True, from_zero=False)
    quantizer.x_max.fill_(9.0)
    quantizer.mode = "measure"
    quantizer(torch.tensor([0.0, 9, 9, 9, 9]))
    quantizer.shrink_range()
    assert quantizer.x_max.item() == 9  # all values on the grid already
    quantizer(torch.tensor([0.0, 2.25, 2.25, 4.5]))  # the grid of a quarter or a half would do
    quantizer.shrink_range()
    assert quantizer.x_max.item() < 9


def test_mode_of_all_quantizers():
    model = nn.Sequential(
        ActivationQuantizer(4, include_zero=True, from_zero=False),
        nn.Sequential(nn.ReLU(), ActivationQuantizer(8, include_zero=True, from_zero=False)),
    )
    quantizers = activation_quantizers(model)
    assert quantizers == [model[0], model[1][1]]

    def fail():
        with quantizer_mode(model, "measure"):
            assert [q.mode for q in quantizers] == ["measure", "measure"]
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert [q.mode for q in quantizers] == ["quantize", "quantize"]
