"""Small networks of every shape that pack has to know, and what the tests do with them."""

import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from fdda_fast.deploy import pack
from fdda_fast.deploy.integer import PackedConv2d, PackedLinear, Quantize, Requantize, to_nchw
from fdda_fast.models.small import SmallResNet
from fdda_fast.quantization.bits import Bits
from fdda_fast.quantization.modules import ActivationQuantizer, quantizer_mode
from fdda_fast.quantization.prepare import prepare

SIZE = 16
CLASSES = 10


def conv_bn(inputs, outputs, kernel=3, stride=1, groups=1, activation=nn.ReLU):
    layers = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([activation()] if activation else []))


class Residual(nn.Module):
    """Identity and downsampling shortcuts, with ReLU behind the addition."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.body = nn.Sequential(
            conv_bn(inputs, outputs, 3, stride), conv_bn(outputs, outputs, activation=None)
        )
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = conv_bn(inputs, outputs, 1, stride, activation=None)

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x))


class Inverted(nn.Module):
    """MobileNetV2: expansion, depthwise, linear bottleneck."""

    def __init__(self, inputs, outputs, stride, kernel=3):
        super().__init__()
        self.adds = stride == 1 and inputs == outputs
        self.body = nn.Sequential(
            conv_bn(inputs, 4 * inputs, 1, activation=nn.ReLU6),
            conv_bn(4 * inputs, 4 * inputs, kernel, stride, 4 * inputs, activation=nn.ReLU6),
            conv_bn(4 * inputs, outputs, 1, activation=None),
        )

    def forward(self, x):
        return x + self.body(x) if self.adds else self.body(x)


class Dense(nn.Module):
    """DenseNet: normalisation and ReLU before the convolution, concatenation behind it."""

    def __init__(self, inputs, growth):
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, growth, 3, 1, 1, bias=False)

    def forward(self, x):
        return torch.cat([x, self.conv(torch.relu(self.norm(x)))], 1)


class PreAct(nn.Module):
    """ResNet v2: the sum itself is read twice and never quantised."""

    def __init__(self, channels):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)

    def forward(self, x):
        y = self.conv1(F.relu(self.norm1(x)))
        return operator.add(self.conv2(F.relu(self.norm2(y))), x)


class Branches(nn.Module):
    """Outputs of layers that are read in several places, once before and once behind a ReLU."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = conv_bn(channels, channels, activation=None)
        self.conv2 = conv_bn(channels, channels, activation=None)

    def forward(self, x):
        y = self.conv1(x)
        z = self.conv2(F.relu(y))
        return F.relu(self.conv1(y + x) + y) + z


class PooledSum(nn.Module):
    """Pooled features that a layer and an addition read."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = conv_bn(3, CLASSES), nn.Linear(CLASSES, CLASSES)

    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.conv(x), (1, 1)).flatten(1)
        return self.fc(x) + x


class Several(nn.Module):
    """Pieces of given sizes (Res2Net, MixNet), activations that are no clips, log_softmax."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.slopes = conv_bn(3, 20), nn.PReLU(), nn.PReLU(12)
        self.convs = nn.ModuleList(nn.Conv2d(n, n, 3, 1, 1) for n in (8, 8, 4))
        self.last, self.fc = nn.Conv2d(20, 12, 1), nn.Linear(12, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        a, b, c = torch.split(self.one(x), 8, 1)
        a = F.mish(self.convs[0](a)).sigmoid().clamp(min=0.5)
        b = F.softplus(self.convs[1](b + a))
        c, d = F.elu(self.convs[2](c)).split([1, x.size(1) - 17], dim=1)
        x = self.slopes(self.last(torch.cat([a, b, c, d], 1)))
        return F.log_softmax(self.fc(x.mean((2, 3))), dim=1)


class Excite(nn.Module):
    """Squeeze-and-excitation: global pool into convolutions, product with broadcasting."""

    def __init__(self, channels):
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x):
        largest = F.adaptive_max_pool2d(x, (1, 1)).float()
        pooled = torch.maximum(F.adaptive_avg_pool2d(x, 1), torch.minimum(largest, 0.5 * largest))
        scale = self.up(F.relu(self.down(pooled)))
        return x * F.hardsigmoid(scale).expand_as(x)


class Shuffle(nn.Module):
    """Channel split and shuffle, with sizes read from the tensor."""

    def __init__(self, channels):
        super().__init__()
        self.body = conv_bn(channels // 2, channels // 2)

    def forward(self, x):
        a, b = x.chunk(2, dim=1)
        x = torch.cat((a, self.body(b)), dim=1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class Normalised(nn.Module):
    """Constants of its own, scalars, a mean over the image, functional pooling."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.1, -0.2, 0.3]).view(1, 3, 1, 1))
        self.conv = nn.Conv2d(3, 12, 3, 2, 1)
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x):
        x = F.max_pool2d(F.relu6(self.conv((x - self.mean) / 0.5)), 2)
        return self.fc(F.dropout(x.mean([2, 3]), training=self.training))


class Habits(nn.Module):
    """Layers that overwrite what others read, arguments by keyword or by numpy's names."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv, self.relu = nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(inplace=True)
        self.last, self.drop, self.fc = nn.Conv2d(8, 8, 1), nn.Dropout(), nn.Linear(16, CLASSES)

    def forward(self, x):
        y = self.norm(input=self.stem(input=x))
        y = self.conv(self.relu(input=y)) + y
        z = F.hardtanh_(self.last(F.relu(input=y, inplace=True)), 0.0, 2.0)
        y += z
        y = torch.cat([self.drop(input=y), z.softmax(axis=1)], axis=1)
        y = torch.mul(F.relu6(input=y), F.softmax(y.mean(axis=(2, 3), keepdims=True), 1))
        y = F.adaptive_avg_pool2d(input=y, output_size=1)
        return self.fc(torch.flatten(input=y, start_dim=1))


class Repooled(nn.Module):
    """Pooled features that are pooled again and reshaped."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = conv_bn(3, 16), nn.Linear(16, CLASSES)

    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.conv(x).mean((2, 3), keepdim=True), 1)
        x = x.flatten(1).view(-1, 16, 1, 1)
        return self.fc(x.mean((2, 3))) - self.fc(x.sigmoid().squeeze(3).squeeze(2))


class Narrowed(nn.Module):
    """The shortcuts of He et al.'s ResNets for CIFAR-10: every other pixel, and channels of 0."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.body = nn.Sequential(
            conv_bn(inputs, outputs, 3, 2), conv_bn(outputs, outputs, activation=None)
        )
        self.more = (outputs - inputs) // 2

    def forward(self, x):
        y = self.body(x)
        y += F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more, self.more), "constant", 0)
        return F.relu(y)


class Pieces(nn.Module):
    """Slices of channels, lines and pixels, padding before a layer, pooling by the map's size."""

    def __init__(self):
        super().__init__()
        self.stem, self.edge = conv_bn(3, 20), nn.ZeroPad2d((0, 1, 0, 1))
        self.left, self.right = conv_bn(12, 8), nn.Conv2d(10, 8, 3, 2)
        self.conv, self.fc = conv_bn(16, 16), nn.Linear(32, CLASSES)

    def forward(self, x):
        x = self.stem(F.pad(x, (1, 2, 0, 1)))
        left = self.left(x[:, :12, :-1, 1:-2])
        right = self.right(self.edge(x[:, ::2, : x.size(2) - 1, 1:-2]))
        right = F.pad(right, [0, 1], value=-0.5)[..., : right.size(3)]
        x = torch.cat([left[:, :, ::2, 1::2], right], 1)
        y = self.conv(x)
        x = F.avg_pool2d(x, x.size()[2:]).view(x.size(0), -1)
        y = F.avg_pool2d(y, y.shape[3]).flatten(1)
        return self.fc(torch.cat([x, y], 1)) - self.fc(F.pad(y, (8, 8)))[:, :CLASSES]


def head(channels):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


NETWORKS = {
    "resnet": lambda: nn.Sequential(
        conv_bn(3, 16), Residual(16, 16, 1), Residual(16, 24, 2), Residual(24, 24, 1), head(24)
    ),
    "small_resnet": lambda: SmallResNet(1, 3, CLASSES),
    "wide": lambda: nn.Sequential(
        conv_bn(3, 32, 3, 2), Residual(32, 32, 1), Residual(32, 64, 2), head(64)
    ),
    "cifar": lambda: nn.Sequential(conv_bn(3, 12), Narrowed(12, 24), Narrowed(24, 28), head(28)),
    "pieces": Pieces,
    "stem": lambda: nn.Sequential(
        conv_bn(3, 16, 7, 2), nn.MaxPool2d(3, 2, 1), Residual(16, 16, 1), head(16)
    ),
    "inverted": lambda: nn.Sequential(
        conv_bn(3, 8, activation=nn.ReLU6), Inverted(8, 8, 1), Inverted(8, 12, 2),
        Inverted(12, 12, 1), conv_bn(12, 32, 1, activation=nn.ReLU6), nn.Dropout(0.2), head(32)
    ),
    "grouped": lambda: nn.Sequential(
        conv_bn(3, 24), conv_bn(24, 48, 3, 2, 4), conv_bn(48, 36, 3, 1, 6), head(36)
    ),
    "dense": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), Dense(8, 8), Dense(16, 8), nn.AvgPool2d(2), Dense(24, 8),
        nn.BatchNorm2d(32), nn.ReLU(), head(32)
    ),
    "vgg": lambda: nn.Sequential(
        nn.Conv2d(3, 12, 3, 1, 1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(12, 20, 3, 1, 1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(20 * SIZE * SIZE // 16, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, CLASSES)
    ),
    "plain": lambda: nn.Sequential(
        nn.Conv2d(3, 10, 3, padding="same"), nn.BatchNorm2d(10), nn.Hardtanh(-1, 2),
        nn.Conv2d(10, 20, (1, 3), (2, 1), (0, 2), (1, 2)), nn.LeakyReLU(0.1),
        nn.Conv2d(20, 10, 3, 2), head(10)
    ),
    "preact": lambda: nn.Sequential(nn.Conv2d(3, 12, 3), PreAct(12), PreAct(12), head(12)),
    "branches": lambda: nn.Sequential(conv_bn(3, 12), Branches(12), head(12)),
    "pooled_sum": PooledSum,
    "excite": lambda: nn.Sequential(conv_bn(3, 16, activation=nn.Hardswish), Excite(16), head(16)),
    "several": Several,
    "shuffle": lambda: nn.Sequential(conv_bn(3, 16), Shuffle(16), Shuffle(16), head(16)),
    "normalised": Normalised,
    "habits": Habits,
    "repooled": Repooled,
    "linear": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 40), nn.BatchNorm1d(40), nn.ReLU(),
        nn.Linear(40, CLASSES)
    ),
}  # fmt: skip


def randomize(model, seed=0):
    """Statistics and affine parameters as trained networks have them, negative gains included."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor, low, high):
        tensor.data.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))

    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu", generator=generator)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            draw(module.running_mean, -0.3, 0.3)
            draw(module.running_var, 0.5, 2.0)
            draw(module.weight, -0.2, 1.5)
            draw(module.bias, -0.3, 0.5)
    return model.eval()


def images(count, size=SIZE, channels=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, size, size, generator=generator)


@torch.no_grad()
def quantized(model, bits=None, size=SIZE, channels=3, **options):
    """`model` prepared, its ranges observed on random images."""
    qmodel = prepare(model, bits or Bits(4, 4), **options)
    with quantizer_mode(qmodel, "observe"):
        for seed in range(3):
            qmodel(images(8, size, channels, seed=100 + seed))
    return qmodel


def packed_network(name, bits=None, **options):
    torch.manual_seed(0)
    qmodel = quantized(randomize(NETWORKS[name]()), bits, **options)
    return qmodel, pack(qmodel, images(1))


def trace(packed, x):
    """[(node, tensors, inputs, output)] of one run."""
    records = []
    packed.execute(x, lambda *record: records.append(record))
    return records


class Forced(fx.Interpreter):
    """Runs a fake-quantised network whose quantisers return what the packed one computed there.

    So every layer is compared on equal inputs, and differences cannot add up. `differing` and
    `total` count codes; a code may differ by one, and only where the value lies on a tie but for
    the rounding errors of float32.
    """

    TIE = 2e-3

    def __init__(self, qmodel, packed, x):
        super().__init__(qmodel)
        self.codes = iter(
            to_nchw(output)
            for node, _, _, output in trace(packed, x)
            if isinstance(node.op, Quantize | Requantize | PackedConv2d | PackedLinear)
            and output.dtype == torch.uint8
        )
        self.differing = self.total = 0

    def call_module(self, target, args, kwargs):
        module = self.fetch_attr(target)
        if not isinstance(module, ActivationQuantizer):
            return super().call_module(target, args, kwargs)
        x, codes = args[0], next(self.codes).long()
        width = torch.clamp(module.x_max - module.x_min, min=1e-8)
        scale = torch.full_like(width, 2.0**module.bits - 1) / width
        zero_point = torch.round(scale * module.x_min)
        expected = torch.round(module(x) * scale - zero_point).long()
        distance = (codes - expected).abs()
        assert distance.max() <= 1, f"{target}: codes differ by {distance.max().item()}"
        exact = scale.double() * x.double() - zero_point
        tie = (exact - exact.floor() - 0.5).abs()
        assert tie[distance > 0].numel() == 0 or tie[distance > 0].max() < self.TIE, target
        self.differing += int((distance > 0).sum())
        self.total += codes.numel()
        return (codes + zero_point) / scale


@torch.no_grad()
def compare_forced(qmodel, packed, x):
    """Asserts layer-wise equality; returns the share of codes that differ."""
    forced = Forced(qmodel, packed, x)
    logits = forced.run(x)
    assert next(forced.codes, None) is None
    torch.testing.assert_close(packed(x), logits, rtol=1e-4, atol=1e-4 * logits.abs().max().item())
    return forced.differing / forced.total


@torch.no_grad()
def agreement(qmodel, packed, x):
    """(share of equal arg-maxes, mean absolute difference over the logits' standard deviation)."""
    expected, logits = qmodel(x), packed(x)
    same = (expected.argmax(1) == logits.argmax(1)).float().mean().item()
    return same, ((logits - expected).abs().mean() / expected.std()).item()
