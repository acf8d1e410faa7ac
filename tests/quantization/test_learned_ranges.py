"""Activation ranges that are learned, against float64 numpy."""

import numpy as np
import pytest
import torch

from fdda_fast.quantization.modules import ActivationQuantizer


def quantizer_with(low, high, bits):
    quantizer = ActivationQuantizer(bits, include_zero=True, from_zero=False)
    quantizer.x_min.fill_(low)
    quantizer.x_max.fill_(high)
    return quantizer


@pytest.mark.parametrize("bits", [2, 4])
def test_gradients(bits):
    """Clipped values pull their end; the others contribute their rounding error."""
    rng = np.random.default_rng(bits)
    x, weight = rng.normal(0, 1.5, 200), rng.normal(size=200)
    low, high = -1.25, 2.0
    quantizer = quantizer_with(low, high, bits)
    quantizer.log_range.requires_grad_()
    tensor = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    y = quantizer(tensor)
    (y * torch.tensor(weight, dtype=torch.float32)).sum().backward()

    below, above = x < low, x > high
    assert below.any()
    assert above.any()
    inside = ~(below | above)
    np.testing.assert_allclose(tensor.grad, weight * inside, rtol=1e-6)
    # y = code * step on the inside, step in proportion to the factor: dy/dfactor = y - x.
    scale = (2**bits - 1) / (high - low)
    zero_point = np.round(scale * low) + 2 ** (bits - 1)
    q = np.clip(np.round(scale * x - zero_point), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    expected = (q + zero_point) / scale
    np.testing.assert_allclose(y.detach(), expected, atol=1e-5)
    slope = np.where(above, high, np.where(below, low, expected - x))
    assert quantizer.log_range.grad.item() == pytest.approx((weight * slope).sum(), rel=1e-3)


def test_the_factor_scales_both_ends():
    x = torch.linspace(-3, 3, 101)
    learned = quantizer_with(-1.0, 2.0, 4)
    learned.log_range.requires_grad_()
    with torch.no_grad():
        learned.log_range.fill_(float(np.log(1.5)))
    fixed = quantizer_with(-1.5, 3.0, 4)
    torch.testing.assert_close(learned(x).detach(), fixed(x))
    learned.keep_learned_range()
    assert learned.log_range.item() == 0
    assert not learned.log_range.requires_grad
    assert learned.x_min.item() == pytest.approx(-1.5)
    assert learned.x_max.item() == pytest.approx(3.0)
    torch.testing.assert_close(learned(x), fixed(x))


def test_fixed_ranges_pass_gradients_straight_through():
    quantizer = quantizer_with(-1.0, 1.0, 4)
    x = torch.tensor([-3.0, 0.2, 3.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [1, 1, 1]
    assert quantizer.log_range.grad is None


def test_learning_finds_a_better_range():
    """Gradient descent on the squared error takes a far too wide range back."""
    torch.manual_seed(0)
    x = torch.randn(2000)
    quantizer = quantizer_with(-12.0, 12.0, 3)
    before = (quantizer(x) - x).square().mean().item()
    quantizer.log_range.requires_grad_()
    adam = torch.optim.Adam([quantizer.log_range], 0.05)
    for _ in range(60):
        adam.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        adam.step()
    quantizer.keep_learned_range()
    assert (quantizer(x) - x).square().mean().item() < 0.3 * before
    assert 1 < quantizer.x_max.item() < 5
