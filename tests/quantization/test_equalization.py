"""Cross-layer equalisation."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from norms import randomize_norms
from torch import nn

import fdda_fast as fdda
from fdda_fast.quantization.bits import Bits
from fdda_fast.quantization.equalization import equalized

IMAGES = torch.randn(20, 3, 12, 12, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(20) % 5


class Net(nn.Module):
    """A residual addition, a depthwise layer, ReLU6, a shuffle of groups, pooling, flattening.

    One ReLU is called several times, as in torchvision's ResNets.
    """

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv3, self.bn3 = nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8, bias=False)
        self.bn4 = nn.BatchNorm2d(16)
        self.conv5, self.bn5 = nn.Conv2d(16, 8, 1, groups=2, bias=False), nn.BatchNorm2d(8)
        self.conv6, self.bn6 = nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv7, self.bn7 = nn.Conv2d(4, 6, 1, groups=2, bias=False), nn.BatchNorm2d(6)
        self.conv8 = nn.Conv2d(4, 6, 1, bias=False)
        self.fc = nn.Linear(6 * 36, 5)
        self.relu = nn.ReLU()

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn3(self.conv3(self.relu(self.bn2(self.conv2(x))))) + x)
        x = self.relu(self.bn4(self.depthwise(x)))
        x = F.relu6(self.bn5(self.conv5(x)))
        x = self.bn6(self.conv6(x))
        shuffled = x.view(x.size(0), 2, 2, 12, 12).transpose(1, 2).flatten(1, 2)
        x = F.max_pool2d(F.relu(self.bn7(self.conv7(x)) + self.conv8(shuffled)), 2)
        return self.fc(x.view(x.size(0), -1))


class Plain(nn.Module):
    """Norms through which all layers can be equalised."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(64, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.flatten(self.pool(F.relu(self.bn2(self.conv2(x)))), 1))


class Repeated(Plain):
    """A layer and a norm that are called twice, and so would need one factor for both."""

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        for _ in range(2):
            x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(torch.flatten(self.pool(x), 1))


class Split(Plain):
    """What a node with several results reads stays as it is: so do the channels of one half."""

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        low, high = x.chunk(2, 1)
        x = F.relu(self.bn2(self.conv2(x))) + torch.cat([low * high, high], 1)
        return self.fc(torch.flatten(self.pool(x), 1))


class Cut(Plain):
    """Slices and padding: of pixels, through which factors pass, and of channels and features."""

    def __init__(self):
        super().__init__()
        self.conv3, self.conv4 = nn.Conv2d(16, 8, 1), nn.Conv2d(12, 8, 1)
        self.bn3, self.wide = nn.BatchNorm2d(8), nn.Linear(60, 5)

    def forward(self, x):
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        y = self.conv3(F.pad(x, (1, 1))[:, :, ::2, 1:]) + self.conv4(F.pad(x[:, 2:14, ::2], (1, 0)))
        y = F.relu(self.bn3(y))
        y = torch.flatten(self.pool(y), 1)
        return self.fc(F.pad(y, (16, 16))) + self.wide(F.pad(y[:, 4:], (16, 16)))


class Shared(Plain):
    """Two layers, one of which alone can take factors up, with one weight."""

    def __init__(self):
        super().__init__()
        self.before = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.before.weight = self.conv2.weight

    def forward(self, x):
        x = F.relu(self.bn1(self.before(self.conv1(x))))
        return self.fc(torch.flatten(self.pool(F.relu(self.bn2(self.conv2(x)))), 1))


def made(cls):
    torch.manual_seed(0)
    model = cls().eval().requires_grad_(False)
    randomize_norms(model)
    return model


@pytest.mark.parametrize("cls", [Net, Plain, Repeated, Split, Cut, Shared])
def test_the_float_network_computes_the_same(cls):
    model = made(cls)
    scaled = equalized(model, IMAGES)
    torch.testing.assert_close(scaled(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


def test_what_can_be_scaled_is():
    model = made(Net)
    scaled = equalized(model, IMAGES)
    factors = {
        name: module.weight / model.get_submodule(name).weight
        for name, module in scaled.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    }
    changed = {name for name, factor in factors.items() if not torch.equal(factor, factor * 0 + 1)}
    # Not before a shuffle (bn6), or in a sum with a layer without a norm (bn7).
    assert changed == {"bn1", "bn2", "bn3", "bn4", "bn5"}
    assert all(factors[name].min() == 1 for name in ("bn1", "bn2", "bn4", "bn5"))
    torch.testing.assert_close(factors["bn1"], factors["bn3"])
    same = {"conv1", "conv7", "conv8", "fc"}
    for name in same:
        assert torch.equal(scaled.get_submodule(name).weight, model.get_submodule(name).weight)


def channel_maxima(model, layer):
    found = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: found.append(*args))
    model(IMAGES)
    hook.remove()
    return found[0].detach().view(len(IMAGES), 16, -1).abs().amax((0, 2)).double().numpy()


def test_channels_move_a_quarter_of_the_way_to_one_size():
    model = made(Plain)
    model.bn2.bias += 1  # no channel is always zero
    scaled = equalized(model, IMAGES)
    for layer in ("conv2", "fc"):
        before, after = (np.log(channel_maxima(m, layer)) for m in (model, scaled))
        np.testing.assert_allclose(after - after.mean(), (before - before.mean()) * 0.75, atol=1e-4)


def test_a_channel_that_is_always_zero_stays_finite():
    model = made(Plain)
    model.bn1.weight[3], model.bn1.bias[3] = 0, -1
    scaled = equalized(model, IMAGES)
    assert all(tensor.isfinite().all() for tensor in scaled.state_dict().values())


def unlike_channels(model):
    """The same function with channels 256 times as large as others."""
    result = copy.deepcopy(model)
    factor = 2.0 ** torch.linspace(-4, 4, 16)[torch.randperm(16)]
    for norm in (result.bn1, result.bn2):
        norm.weight *= factor
        norm.bias *= factor
    result.conv2.weight /= factor.view(-1, 1, 1, 1)
    result.fc.weight /= factor.repeat_interleave(4)
    return result


@pytest.mark.parametrize("method", ["fdda", "reconstruct"])
def test_quantize_serves_unlike_channels_better(method):
    model = unlike_channels(made(Plain))
    logits = model(IMAGES)

    def error(equalize):
        config = fdda.QuantizeConfig(
            steps=0, flip=False, blend=0, max_shift=0, equalize=equalize, method=method,
            reconstruct=fdda.ReconstructConfig(steps=40, images=32, batch=16),
        )  # fmt: skip
        student = fdda.quantize(model, (IMAGES, LABELS), Bits(4, 4), config)
        return (student(IMAGES) - logits).square().mean()

    assert error(True) < 0.5 * error(False)
