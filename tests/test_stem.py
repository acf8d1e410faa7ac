import itertools

import pytest
import torch
from torch import nn

from fdda_fast.stem import FrozenStem

GEOMETRIES = [
    (kernel, stride, padding)
    for kernel, stride, padding in itertools.product((3, 4, 5, 7), (2, 3), (0, 1, 2, 3))
    if stride < kernel > padding
]


@pytest.mark.parametrize(("kernel", "stride", "padding"), GEOMETRIES)
@pytest.mark.parametrize("channels", [1, 3])
def test_gradient_against_autograd(kernel, stride, padding, channels):
    conv = nn.Conv2d(channels, 5, kernel, stride, padding).double().requires_grad_(False)
    assert FrozenStem.fits(conv)
    for size in ((15, 14), (16, 19), (21, 14)):
        x = torch.randn(2, channels, *size, dtype=torch.float64, requires_grad=True)
        expected_y, y = conv(x), FrozenStem(conv)(x)
        assert torch.equal(y, expected_y)
        grad_y = torch.randn_like(y)
        (expected,) = torch.autograd.grad(expected_y, x, grad_y)
        (grad,) = torch.autograd.grad(y, x, grad_y)
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(8, 4, 3, stride=2),
        nn.Conv2d(3, 4, 1, stride=2),
        nn.Conv2d(3, 3, 3, stride=2, groups=3),
        nn.Conv2d(3, 4, 3, stride=2, dilation=2),
        nn.Conv2d(3, 4, (3, 5), stride=2),
        nn.Conv2d(3, 4, 3, stride=2, padding="valid"),
        nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.ReLU(),
    ],
)
def test_others_are_left_alone(module):
    assert not FrozenStem.fits(module)
