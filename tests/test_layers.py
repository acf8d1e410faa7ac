"""Layers of networks by this library's operators."""

import copy

import pytest
import torch
from torch import nn

from fdda_fast.layers import LAYERS, Conv3x3, MaxPool2d, use_layers
from fdda_fast.ops import convolutions
from fdda_fast.quantization.modules import quantized_layer


@pytest.fixture(params=[True, False], ids=["winograd", "direct"], autouse=True)
def pays(request, monkeypatch):
    monkeypatch.setattr(convolutions, "_winograd_pays", lambda *_: request.param)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("quantized", [True, False])
def test_output_and_gradients(bias, quantized):
    torch.manual_seed(0)
    conv = nn.Conv2d(20, 24, 3, padding=1, bias=bias)
    if quantized:
        conv = quantized_layer(conv, 4)
    leaves = [torch.randn(2, 20, 9, 6).requires_grad_(), *conv.parameters()]
    grad_y = torch.randn(2, 24, 9, 6)
    found, expected = (
        [y, *torch.autograd.grad(y, leaves, grad_y)]
        for y in (Conv3x3(conv)(leaves[0]), conv(leaves[0]))
    )
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_bfloat16(bias):
    """The output's dtype is that of x, whatever the parameters'."""
    torch.manual_seed(0)
    conv = nn.Conv2d(32, 64, 3, padding=1, bias=bias)
    x = torch.randn(2, 32, 9, 6)
    for layer in (conv, copy.deepcopy(conv).bfloat16()):
        y = Conv3x3(layer)(x.bfloat16())
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), conv(x), rtol=0.05, atol=0.05)


class Other(nn.Conv2d):
    """Computes who knows what."""


def test_what_fits():
    assert Conv3x3.fits(nn.Conv2d(4, 8, 3, padding=1))
    assert Conv3x3.fits(quantized_layer(nn.Conv2d(4, 8, 3, padding=1, bias=False), 4))
    for other in (
        nn.Conv2d(4, 8, 3),
        nn.Conv2d(4, 8, 3, padding="same"),
        nn.Conv2d(4, 8, 3, stride=2, padding=1),
        nn.Conv2d(4, 8, 3, padding=1, groups=2),
        nn.Conv2d(4, 8, 3, padding=1, dilation=2),
        nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 8, 1, padding=1),
        Other(4, 8, 3, padding=1),
        nn.ConvTranspose2d(4, 8, 3, padding=1),
    ):
        assert not Conv3x3.fits(other)


def test_what_pools():
    assert MaxPool2d.fits(nn.MaxPool2d(3, 2, 1))
    assert not MaxPool2d.fits(nn.MaxPool2d(2, return_indices=True))
    assert not MaxPool2d.fits(nn.AvgPool2d(2))
    for pool in (nn.MaxPool2d(3, 2, 1), nn.MaxPool2d((3, 2), dilation=2, ceil_mode=True)):
        x = torch.randn(2, 3, 11, 14)
        assert torch.equal(MaxPool2d(pool)(x), pool(x))


def test_layers_of_a_network():
    """Those that fit, at every depth; the parameters stay the same objects."""
    inner = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(2), inner)
    before, same = copy.deepcopy(network), {id(p) for p in network.parameters()}
    use_layers(network, LAYERS)
    assert [type(m) for m in (*network[:2], *network[2])] == [
        *(Conv3x3, MaxPool2d, Conv3x3, nn.ReLU, nn.Conv2d)
    ]
    assert {id(p) for p in network.parameters()} == same
    x = torch.randn(2, 3, 7, 7)
    torch.testing.assert_close(network(x), before(x), rtol=1e-4, atol=1e-4)
