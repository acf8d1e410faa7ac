"""Networks of their full size: those of the paper and others, most as torchvision builds them."""

import pytest
import torch
import torchvision
from networks import (
    Inverted,
    agreement,
    compare_forced,
    conv_bn,
    head,
    images,
    quantized,
    randomize,
)
from torch import nn

from fdda_fast.deploy import load_packed, pack
from fdda_fast.quantization.bits import Bits

SIZE = 64


def vgg11_bn():
    model = torchvision.models.vgg11_bn()
    model.classifier = nn.Linear(512 * 49, 10)  # its own has 120 million weights
    return model


def mobilenet_v1():
    channels = [32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024]
    layers = [conv_bn(3, 32, 3, 2)]
    for k in range(13):
        stride = 2 if k in (1, 3, 5, 11) else 1
        layers += [
            conv_bn(channels[k], channels[k], 3, stride, channels[k]),
            conv_bn(channels[k], channels[k + 1], 1),
        ]
    return nn.Sequential(*layers, head(1024))


def efficientnet_lite():
    """Inverted residuals with kernels of 3 and 5, ReLU6, no squeeze-excite."""
    layers = [conv_bn(3, 32, 3, 2, activation=nn.ReLU6)]
    inputs = 32
    stages = (16, 1, 3), (24, 2, 3), (40, 2, 5), (80, 2, 3), (112, 1, 5), (192, 2, 5), (320, 1, 3)
    for outputs, stride, kernel in stages:
        layers += [
            Inverted(inputs, outputs, stride, kernel),
            Inverted(outputs, outputs, 1, kernel),
        ]
        inputs = outputs
    return nn.Sequential(*layers, conv_bn(inputs, 1280, 1, activation=nn.ReLU6), head(1280))


OWN = {f.__name__: f for f in (vgg11_bn, mobilenet_v1, efficientnet_lite)}


def packed_model(name, bits):
    torch.manual_seed(0)
    model = randomize((OWN.get(name) or getattr(torchvision.models, name))())
    qmodel = quantized(model, bits, SIZE)
    return qmodel, pack(qmodel, images(1, SIZE))


@pytest.mark.parametrize("bits", [Bits(8, 8), Bits(4, 4, first_last=8)], ids=str)
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "regnet_x_400mf"])
def test_integer_from_image_to_logits(name, bits):
    qmodel, packed = packed_model(name, bits)
    assert {row.domain for row in packed.summary()[1:]} == {"integer"}
    assert compare_forced(qmodel, packed, images(4, SIZE)) < 1e-3


@pytest.mark.parametrize("name", ["resnet34", "resnet50", "regnet_x_800mf", "densenet121", *OWN])
def test_other_networks(name):
    qmodel, packed = packed_model(name, Bits(4, 4, first_last=8))
    kinds = {row.domain for row in packed.summary()[1:]}
    assert kinds == {"integer"} or name in ("densenet121", "vgg11_bn")
    x = images(2, SIZE)
    assert compare_forced(qmodel, packed, x) < 1e-3
    assert torch.equal(packed(x), packed.execute(x))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "regnet_x_400mf"])
def test_end_to_end(name):
    # Logits of untrained networks are close together, so the arg-max is no measure here.
    qmodel, packed = packed_model(name, Bits(8, 8))
    _, difference = agreement(qmodel, packed, images(16, SIZE))
    assert difference < 0.01


def test_resnet18_at_four_bits_is_small(tmp_path):
    _, packed = packed_model("resnet18", Bits(4, 4))
    path = tmp_path / "resnet18.fdda"
    packed.save(path)
    assert path.stat().st_size <= 6.2e6
    assert load_packed(path).graph == packed.graph
