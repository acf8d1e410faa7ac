"""Packed networks compute what the fake-quantised ones do."""

import pytest
import torch
import torch.nn.functional as F
from networks import (
    NETWORKS,
    SIZE,
    agreement,
    compare_forced,
    conv_bn,
    head,
    images,
    packed_network,
    quantized,
    randomize,
)
from torch import nn

from fdda_fast.deploy import pack
from fdda_fast.deploy.fuse import layer_groups
from fdda_fast.deploy.integer import _Packed
from fdda_fast.quantization.bits import Bits
from fdda_fast.quantization.modules import quantizer_mode
from fdda_fast.quantization.prepare import prepare

WIDTHS = {
    **{f"w{b}a{b}": Bits(b, b) for b in range(2, 9)},
    "w2a8": Bits(2, 8),
    "w8a3": Bits(8, 3),
    "f8l8": Bits(4, 4, first_last=8),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("width", ["w2a2", "w4a4", "w8a8", "f8l8"])
def test_every_network(name, width):
    qmodel, packed = packed_network(name, WIDTHS[width])
    assert compare_forced(qmodel, packed, images(32)) < 1e-3


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["resnet", "inverted"])
def test_every_width(name, width):
    qmodel, packed = packed_network(name, WIDTHS[width])
    assert compare_forced(qmodel, packed, images(32)) < 1e-3


def test_overrides():
    bits = Bits(4, 4, overrides={"0.0": (8, 8), "2.shortcut.0": (3, 7), "4.2": (5, 6)})
    qmodel, packed = packed_network("resnet", bits)
    assert packed.bits["0.0"] == (8, 8)
    assert packed.bits["2.shortcut.0"] == (3, 7)
    assert packed.bits["4.2"] == (5, 6)
    assert compare_forced(qmodel, packed, images(32)) < 1e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_end_to_end(name):
    # A code that flips on a tie moves later ones: agreement is a rate, not an identity.
    qmodel, packed = packed_network(name, Bits(8, 8))
    same, difference = agreement(qmodel, packed, images(500))
    assert same >= 0.99
    assert difference < 5e-3


def test_fuses_whole_layers():
    _, packed = packed_network("resnet")
    ops = [(type(node.op).__name__, len(node.inputs)) for node in packed.graph.nodes]
    stem, block = ("PackedConv2d", 1), [("PackedConv2d", 1), ("PackedConv2d", 2)]
    assert ops[:5] == [("Quantize", 1), stem, ("Requantize", 1), *block]
    kinds = {"Quantize", "Requantize", "PackedConv2d", "SumPool", "PackedLinear"}
    assert {op for op, _ in ops} == kinds
    rows = packed.summary()
    assert {row.domain for row in rows[1:]} == {"integer"}
    # In a block that changes shape one branch is handed over in float.
    floats = [n.name for n in packed.graph.nodes[:-1] if getattr(n.op, "output_bits", 0) is None]
    assert floats == ["2.body.1.0"]


def test_keep_float():
    model = randomize(NETWORKS["resnet"]())
    qmodel = quantized(model, keep_float=("0.0", "1.body.1.0", "4.2"))
    packed = pack(qmodel, images(1))
    domains = {row.name: row.domain for row in packed.summary()}
    assert domains["0.0"] == domains["4.2"] == "float"
    assert compare_forced(qmodel, packed, images(16)) < 1e-3


def test_sizes_and_batches():
    qmodel, packed = packed_network("resnet")
    for size, batch in ((9, 1), (24, 3), (33, 2)):
        compare_forced(qmodel, packed, images(batch, size))
    noncontiguous = images(4).flip(0).transpose(2, 3)
    compare_forced(qmodel, packed, noncontiguous)
    channels_last = images(4).contiguous(memory_format=torch.channels_last)
    assert torch.equal(packed(channels_last), packed(images(4)))
    assert packed(images(4)[:0]).shape == (0, 10)


def test_batch_does_not_matter():
    _, packed = packed_network("inverted")
    x = images(6)
    assert torch.equal(packed(x), torch.cat([packed(image[None]) for image in x]))


def test_size_written_into_the_graph():
    _, packed = packed_network("shuffle")
    assert packed.graph.fixed_size
    with pytest.raises(ValueError, match=r"images of \(16, 16\) pixels only"):
        packed(images(1, 24))


def test_grey_images_and_one_channel():
    model = randomize(nn.Sequential(conv_bn(1, 7, 5), conv_bn(7, 1, 3), conv_bn(1, 9), head(9)))
    qmodel = quantized(model, channels=1)
    packed = pack(qmodel, images(1, channels=1))
    assert compare_forced(qmodel, packed, images(16, channels=1)) < 1e-3


class Shared(nn.Module):
    """A layer that is called twice, one named as if it were its second call, one as an addition."""

    def __init__(self):
        super().__init__()
        self.conv, self.shared, self.head = conv_bn(3, 8), nn.Conv2d(8, 8, 3, 1, 1), head(8)
        self.shared_1, self.add = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = torch.relu(self.shared(self.conv(x)))
        x = torch.sigmoid(torch.relu(self.shared(x)) + x + 0.5)
        return self.head(self.add(self.shared_1(x)))


def test_shared_layer():
    model = randomize(Shared())
    qmodel = quantized(model, Bits(4, 4, overrides={"shared": (3, 5)}))
    packed = pack(qmodel, images(1))
    assert compare_forced(qmodel, packed, images(16)) < 1e-3
    names = ["conv.0", "shared", "shared:1", "shared_1", "add", "head.2"]
    assert list(layer_groups(qmodel, images(1))) == names
    assert [n.name for n in packed.graph.nodes if isinstance(n.op, _Packed)] == names
    assert list(packed.bits) == [name for name in names if name != "shared:1"]
    assert packed.bits["shared"] == (3, 5)
    again = pack(quantized(model, Bits(2, 2, overrides=packed.bits)), images(1))
    assert again.bits == packed.bits


def test_dead_and_tiny_ranges():
    # A ReLU that never fires: its quantiser's range is [0, 0].
    model = randomize(NETWORKS["resnet"]())
    model[0][1].bias.data.fill_(-100)
    qmodel = quantized(model)
    compare_forced(qmodel, pack(qmodel, images(1)), images(16))
    model[0][1].bias.data.zero_()
    model[0][1].weight.data.mul_(1e-6)
    qmodel = quantized(model)
    compare_forced(qmodel, pack(qmodel, images(1)), images(16))


class Clamp(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


CLIPS = [
    nn.ReLU, nn.ReLU6, lambda: nn.Hardtanh(-0.5, 0.7),
    lambda: Clamp(lambda x: x.clamp(0, 6)), lambda: Clamp(lambda x: torch.clamp(x, max=0.7)),
    lambda: Clamp(lambda x: x.clip(min=-0.5)), lambda: Clamp(lambda x: x.clamp_min(0)),
]  # fmt: skip


@pytest.mark.parametrize("activation", CLIPS)
def test_range_wider_than_the_activation(activation):
    model = randomize(nn.Sequential(conv_bn(3, 8, activation=activation), head(8)))
    model[0][1].bias.data.add_(3)
    qmodel = quantized(model)
    for module in qmodel.modules():
        if hasattr(module, "x_min"):
            module.x_min.fill_(-4)
            module.x_max.fill_(9)
    packed = pack(qmodel, images(1))
    assert {row.domain for row in packed.summary()[1:]} == {"integer"}
    assert compare_forced(qmodel, packed, images(16)) < 1e-3


def test_model_is_not_changed():
    qmodel = quantized(randomize(NETWORKS["resnet"]()))
    before = {name: value.clone() for name, value in qmodel.state_dict().items()}
    code = qmodel.code
    with quantizer_mode(qmodel, "observe"):
        packed = pack(qmodel, images(1))
    assert torch.equal(packed(images(4)), pack(qmodel, images(1))(images(4)))
    assert qmodel.code == code
    for name, value in qmodel.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Sequential(conv_bn(3, 4), head(4)), {"placement": "paper"}, "full_integer"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softsign(), head(4)),
            {},
            r"node '1' \(Softsign\) has no packed form",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 4, 2, padding="same"), nn.ReLU(), head(4)),
            {},
            "not symmetric",
        ),
        (
            nn.Sequential(conv_bn(3, 4), nn.Flatten(0), nn.Unflatten(0, (-1, 4)), nn.Linear(4, 3)),
            {},
            "first dimension is not the batch",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
            {},
            "running statistics",
        ),
    ],
)
def test_refuses(model, options, message):
    with pytest.raises(ValueError, match=message):
        pack(quantized(model.eval(), **options), images(1))


def test_refuses_active_dropout():
    class Drops(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = conv_bn(3, 4), head(4)

        def forward(self, x):
            return self.head(nn.functional.dropout(self.conv(x), 0.1))

    with pytest.raises(ValueError, match="active in eval mode"):
        pack(quantized(Drops().eval()), images(1))


class Calls(nn.Module):
    """A convolution, and a function of it and of its output."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.fc, self.function = nn.Conv2d(3, SIZE, 1), nn.Linear(SIZE, 5), function

    def forward(self, x):
        return self.function(self, self.conv(x))


def test_numpy_names_of_arguments():
    """Where the wrong dimensions would fit, too: one image, of as many channels as columns."""
    qmodel = quantized(randomize(Calls(lambda net, y: y - y.mean(axis=(1,), keepdims=True))))
    compare_forced(qmodel, pack(qmodel, images(1)), images(1))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda net, y: (y, y), r"must return one tensor, got \(conv, conv\)"),
        (lambda net, y: {"o": y}, r"must return one tensor, got \{'o': conv\}"),
        (lambda net, y: [{"o": (y, y.shape)}], "must return one tensor, got"),
        (lambda net, y: y.shape[0], "must return one tensor, got getitem"),
        (
            lambda net, y: y.softmax(1, dtype=torch.float64).float(),
            r"'softmax' .* expected input, dim, _stacklevel alone, got \['dtype'\], too",
        ),
        (
            lambda net, y: F.hardsigmoid(y) + torch.add(y, y, out=torch.empty(0)),
            r"'add' .* expected input, other, alpha, rounding_mode alone, got \['out'\], too",
        ),
        (lambda net, y: y.clamp(1, 0), r"'clamp' .* its bounds must be numbers, the lower one"),
        (lambda net, y: torch.clamp(y, y, None), "'clamp' .* its bounds must be numbers"),
        (lambda net, y: F.elu(y, 0.5), r"'elu' .* only alpha=1.0 is known, got 0.5"),
        (lambda net, y: F.gelu(y, approximate="tanh"), "'gelu' .* only approximate='none' is"),
        (lambda net, y: y[: y.size(0) // 2, :], "its first dimension is not the batch"),
        (lambda net, y: y[-3:, :, 1:], "'getitem' .* it cuts the batch"),
        (lambda net, y: y[:, : y.size(0)], r"'getitem' .* size depends on the batch size"),
        (lambda net, y: F.pad(y, (1, 1, 0, 0), "reflect"), "'pad' .* mode='reflect'"),
        (lambda net, y: F.pad(y, (-1, 0)), r"'pad' .* Pad\.before: expected .* got -1"),
        (lambda net, y: y - F.softmax(y), r"'softmax' .* Softmax\.dim: expected .*, got None"),
        (
            lambda net, y: net.fc(F.max_pool2d(F.adaptive_avg_pool2d(y, 1), 1).flatten(1)),
            r"'fc' \(QuantLinear\): its input, of node 'flatten' .* what has a form on codes",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Implicit dimension choice", "ignore:An output with one")
def test_refuses_what_a_network_does(function, message):
    with pytest.raises(ValueError, match=message):
        pack(quantized(Calls(function).eval()), images(1))


def test_refuses_what_is_not_prepared_or_calibrated():
    model = NETWORKS["resnet"]().eval()
    with pytest.raises(ValueError, match="GraphModule that prepare"):
        pack(model, images(1))
    with pytest.raises(ValueError, match="never observed"):
        pack(prepare(model, Bits()), images(1))
    with pytest.raises(ValueError, match="example_input must be"):
        pack(quantized(model), images(1)[0])
    with pytest.raises(
        ValueError, match=r"cannot run on images of shape \(1, 16, 16\): .*channels"
    ):
        pack(quantized(model), images(1, channels=1))
    model = NETWORKS["linear"]().eval()
    with pytest.raises(ValueError, match=r"cannot run on images of shape \(3, 8, 8\): "):
        pack(quantized(model), images(1, 8))


def test_refuses_weights_that_are_not_finite():
    model = randomize(NETWORKS["resnet"]())
    qmodel = quantized(model)
    qmodel.get_parameter("1.body.0.0.weight").data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"1\.body\.0\.0: weights hold"):
        pack(qmodel, images(1))


def test_refuses_overflow():
    model = nn.Sequential(nn.Conv2d(3, 300, 1), nn.Conv2d(300, 2, 15, padding=7), head(2))
    with pytest.raises(ValueError, match="could overflow int32"):
        pack(quantized(model.eval()), images(1))
