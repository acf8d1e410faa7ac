"""The shipped architectures."""

import pytest
import torch
from torch import nn

from fdda_fast.models.small import mobilenetv2, regnetx, resnet8, resnet20


@pytest.mark.parametrize(("factory", "depth"), [(resnet8, 8), (resnet20, 20)])
@pytest.mark.parametrize("size", [(28, 28), (9, 14)])
def test_shape_and_depth(factory, depth, size):
    model = factory(in_channels=3, num_classes=7).eval()
    assert model(torch.randn(2, 3, *size)).shape == (2, 7)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(layers) + 1 == depth  # and the linear one
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == depth + 1


def test_stages_halve_the_image():
    model, seen = resnet8(), []
    for stage in (model.stage1, model.stage2, model.stage3):
        stage.register_forward_hook(lambda m, x, y: seen.append(tuple(y.shape[1:])))
    model(torch.randn(1, 1, 28, 28))
    assert seen == [(16, 28, 28), (32, 14, 14), (64, 7, 7)]


@pytest.mark.parametrize("factory", [mobilenetv2, regnetx])
@pytest.mark.parametrize("size", [(28, 28), (9, 14)])
def test_grouped_networks(factory, size):
    model = factory(in_channels=3, num_classes=7).eval()
    assert model(torch.randn(2, 3, *size)).shape == (2, 7)
    assert sum(p.numel() for p in model.parameters()) < 375_000


def test_kinds_of_convolutions():
    """Depthwise ones in MobileNetV2's blocks, eight channels a group in RegNetX's."""

    def widths(model):
        convs = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
        return [m.in_channels // m.groups for m in convs]

    assert widths(mobilenetv2()) == [1] * 10
    assert widths(regnetx()) == [8] * 9
    assert any(isinstance(m, nn.ReLU6) for m in mobilenetv2().modules())
