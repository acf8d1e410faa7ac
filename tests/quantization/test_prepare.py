"""Graph preparation: where quantisers go, with how many bits, and what is refused."""

import operator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn

from fdda_fast.deploy import pack
from fdda_fast.quantization.bits import Bits
from fdda_fast.quantization.modules import (
    ActivationQuantizer,
    QuantConv2d,
    QuantLinear,
    activation_quantizers,
    quantizer_mode,
)
from fdda_fast.quantization.prepare import prepare


def conv_bn(inputs, outputs, kernel=3, stride=1, groups=1, activation=nn.ReLU):
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([activation()] if activation else []))


class Basic(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = conv_bn(inputs, outputs, 3, stride)
        self.conv2 = conv_bn(outputs, outputs, activation=None)
        self.down = conv_bn(inputs, outputs, 1, stride, activation=None)

    def forward(self, x):
        return F.relu(self.conv2(self.conv1(x)) + self.down(x))


class ResNetLike(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 8, 7, 2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.block1, self.block2 = Basic(8, 8, 1), Basic(8, 12, 2)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = self.block2(self.block1(self.pool(self.stem(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


class Inverted(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.adds = stride == 1 and inputs == outputs
        self.expand = conv_bn(inputs, 2 * inputs, 1, activation=nn.ReLU6)
        self.depthwise = conv_bn(2 * inputs, 2 * inputs, 3, stride, 2 * inputs, nn.ReLU6)
        self.project = conv_bn(2 * inputs, outputs, 1, activation=None)

    def forward(self, x):
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.adds else y


class MobileNetLike(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 8, 3, 2, activation=nn.ReLU6)
        self.blocks = nn.Sequential(Inverted(8, 12, 1), Inverted(12, 12, 1), Inverted(12, 16, 2))
        self.head = conv_bn(16, 24, 1, activation=nn.ReLU6)
        self.dropout, self.fc = nn.Dropout(0.2), nn.Linear(24, 5)

    def forward(self, x):
        return self.fc(self.dropout(self.head(self.blocks(self.stem(x))).mean([2, 3])))


class Dense(nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4, 3, 1, 1, bias=False)

    def forward(self, x):
        return torch.cat([x, self.conv(torch.relu(self.norm(x)))], 1)


class DenseNetLike(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 1, 1)
        self.block = nn.Sequential(Dense(4), Dense(8))
        self.transition = nn.Conv2d(12, 6, 1)  # reads a concatenation
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        x = F.avg_pool2d(self.transition(self.block(self.stem(x))), 2).relu()
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def vgg_like():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(8 * 8 * 8, 10), nn.ReLU(), nn.Dropout(), nn.Linear(10, 5),
    )  # fmt: skip


NETWORKS = {
    "resnet": ResNetLike,
    "mobilenet": MobileNetLike,
    "densenet": DenseNetLike,
    "vgg": vgg_like,
    "resnet18": torchvision.models.resnet18,
    "mobilenet_v2": torchvision.models.mobilenet_v2,
}
# Places where the method reads: every ReLU of the network, in calls.
RELUS = {"resnet": 5, "mobilenet": 8, "densenet": 3, "vgg": 3, "resnet18": 17, "mobilenet_v2": 35}
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def build(name):
    torch.manual_seed(0)
    return NETWORKS[name]().eval()


@torch.no_grad()
def prepared(model, bits=None, **options):
    student = prepare(model, bits or Bits(4, 4), **options)
    with quantizer_mode(student, "observe"):
        student(IMAGES)
    return student


def module_of(student, node):
    return student.get_submodule(node.target) if node.op == "call_module" else None


MOVES = (nn.MaxPool2d, nn.Dropout, nn.Flatten, nn.Identity)
POOLS = (nn.AdaptiveAvgPool2d,)
POOL_CALLS = (F.adaptive_avg_pool2d, "mean")


def quantizer_of(student, layer):
    """The quantiser behind a layer's input, found by walking the graph, or None."""
    node = layer.args[0]
    linear = isinstance(module_of(student, layer), nn.Linear)
    while True:
        module = module_of(student, node)
        if isinstance(module, ActivationQuantizer):
            return module
        moves = isinstance(module, MOVES) or node.target in (torch.flatten, "flatten")
        if not moves and not (linear and (isinstance(module, POOLS) or node.target in POOL_CALLS)):
            return None
        node = node.args[0]


def layers_of(student):
    kinds = QuantConv2d | QuantLinear
    return [n for n in student.graph.nodes if isinstance(module_of(student, n), kinds)]


def inputs_of(student):
    """What every quantised layer really reads, by name."""
    seen = {}

    def keep(name):
        return lambda module, inputs: seen.__setitem__(name, inputs[0].detach())

    layers = {n.target: student.get_submodule(n.target) for n in layers_of(student)}
    handles = [m.register_forward_pre_hook(keep(n)) for n, m in layers.items()]
    with torch.no_grad():
        student(IMAGES)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_reads_quantised_values(name):
    model = build(name)
    plain = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    student = prepared(model)
    layers = layers_of(student)
    assert len(layers) == len(plain)
    seen = inputs_of(student)
    for index, layer in enumerate(layers):
        quantizer = quantizer_of(student, layer)
        assert quantizer is not None, layer
        assert quantizer.include_zero
        assert quantizer.observed == 1
        bits = 8 if index == 0 else 4  # the image has 8
        assert quantizer.bits == bits
        assert module_of(student, layer).weight_bits == 4
        x = seen[layer.target]
        if x.ndim == 4:  # pooled features have more values: sums of quantised ones
            assert x.unique().numel() <= 2**bits, layer
    assert not student.training
    with torch.no_grad():
        assert not torch.equal(student(IMAGES), model(IMAGES))


@pytest.mark.parametrize("name", NETWORKS)
def test_quantisers_are_not_doubled(name):
    """One for each producer, and a quantiser reads another only behind a residual one."""
    student = prepare(build(name), Bits())
    calls = [
        n for n in student.graph.nodes if isinstance(module_of(student, n), ActivationQuantizer)
    ]
    assert len({n.args[0] for n in calls}) == len(calls) == len(activation_quantizers(student))
    for call in calls:
        source = call.args[0]
        while isinstance(module_of(student, source), nn.MaxPool2d | nn.Identity):
            source = source.args[0]
        if isinstance(module_of(student, source), ActivationQuantizer):
            assert source.target.endswith("_residual")
            assert module_of(student, source).bits == 8
        else:
            assert set(source.users) == {call}  # all readers read the quantised tensor


@pytest.mark.parametrize("name", NETWORKS)
def test_paper_placement_is_behind_every_relu(name):
    student = prepare(build(name), Bits(5, 3, 8), placement="paper")
    nodes = list(student.graph.nodes)
    functions = (F.relu, F.relu6, torch.relu, "relu")
    relus = [
        n for n in nodes
        if isinstance(module_of(student, n), nn.ReLU | nn.ReLU6)
        or (n.op != "call_module" and n.target in functions)
    ]  # fmt: skip
    calls = [n for n in nodes if isinstance(module_of(student, n), ActivationQuantizer)]
    assert len(relus) == RELUS[name]
    assert [c.args[0] for c in calls] == relus
    for relu, call in zip(relus, calls, strict=True):
        assert set(relu.users) == {call}
    assert not any(q.include_zero for q in activation_quantizers(student))


def test_pooled_features_are_sums_of_codes():
    student = prepared(ResNetLike().eval())
    x = inputs_of(student)["fc"]
    quantizer = quantizer_of(student, layers_of(student)[-1])
    scale = 15 / (quantizer.x_max - quantizer.x_min)
    positions = 4 * 4  # 32 pixels, halved by stem, pool and block2
    sums = x.double() * scale * positions
    assert (sums - sums.round()).abs().max() < 1e-3
    assert sums.abs().max() > 1


def last_ops(pool):
    """Of a packed network whose features are pooled so, and how its layers are quantised."""

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)
            self.whole, self.part = nn.AvgPool2d(30, stride=1), nn.AvgPool2d(16)

        def forward(self, x):
            return self.fc(pool(self, F.relu(self.conv(x))))

    torch.manual_seed(0)
    student = prepare(Pooled().eval(), Bits(), image_shape=(3, 32, 32))
    with quantizer_mode(student, "observe"):
        student(IMAGES)
    packed = pack(student, IMAGES[:1])
    torch.testing.assert_close(packed(IMAGES), student(IMAGES), atol=1e-4, rtol=1e-4)
    return [row.op for row in packed.summary()][2:], packed.graph.fixed_size


@pytest.mark.parametrize(
    ("pool", "fixed"),
    [
        (lambda net, x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1), False),
        (lambda net, x: torch.squeeze(torch.squeeze(x.mean([2, 3], True), 3), 2), False),
        (lambda net, x: net.whole(x).view(x.size(0), -1), True),
        (lambda net, x: F.avg_pool2d(x, (30, 30)).flatten(1), True),
        (lambda net, x: F.avg_pool2d(x, kernel_size=30, padding=0).flatten(1), True),
        (lambda net, x: F.avg_pool2d(x, x.size()[3]).flatten(1), True),
        (lambda net, x: F.avg_pool2d(x, kernel_size=x.shape[-2:]).flatten(1), True),
        (lambda net, x: F.avg_pool2d(x, (x.size(2), x.size(3)), 1).flatten(1), True),
        (lambda net, x: F.adaptive_avg_pool2d(F.pad(x, (1, 1))[:, :, 1:], 1).flatten(1), False),
    ],
)
def test_however_features_are_pooled_their_sums_stay_exact(pool, fixed):
    ops, fixed_size = last_ops(pool)
    assert [op for op in ops if op not in ("Pad", "Slice")] == ["SumPool", "PackedLinear"]
    assert fixed_size == fixed


@pytest.mark.parametrize(
    "pool",
    [
        lambda net, x: net.part(x).flatten(1),  # 14 rows and columns are left out
        lambda net, x: F.avg_pool2d(x, 30, divisor_override=9).flatten(1),
        lambda net, x: F.avg_pool2d(x, 30, stride=3, padding=1).flatten(1),
        lambda net, x: F.avg_pool2d(x, x.size(3) // 2).flatten(1)[:, :6],
        lambda net, x: F.pad(F.adaptive_avg_pool2d(x, 1).flatten(1)[:, :4], (1, 1)),
    ],
)
def test_other_pools_are_not_taken_for_such(pool):
    assert "SumPool" not in last_ops(pool)[0]


def test_a_module_that_is_called_like_a_quantiser_stays():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()
    named = nn.Sequential()
    for name, layer in zip(("conv", "relu", "relu_quantizer"), model, strict=True):
        named.add_module(name, layer)
    student = prepared(named)
    assert isinstance(student.get_submodule("relu_quantizer"), QuantConv2d)
    assert len(activation_quantizers(student)) == 2


def test_resnet18_in_full():
    student = prepare(build("resnet18"), Bits(4, 3, 8))
    weights = [module_of(student, n).weight_bits for n in layers_of(student)]
    assert weights == [8] + [4] * 19 + [8]
    # Image, the stem's ReLU before the pool, 8 inner and 8 outer ReLUs; the last one feeds fc.
    # The first block of each stage also feeds the second one's addition.
    names = {n for n, q in student.named_modules() if isinstance(q, ActivationQuantizer)}
    residuals = {f"layer{i}_0_relu_1_residual" for i in (1, 2, 3, 4)}
    assert residuals < names
    assert len(names) == 18 + 4
    by_layer = [quantizer_of(student, n).bits for n in layers_of(student)]
    assert by_layer[0] == 8  # image
    assert by_layer[1] == 8  # produced by the first layer
    assert by_layer[-1] == 8  # consumed by the last one
    assert set(by_layer[2:-1]) == {3}


@pytest.mark.parametrize("placement", ["full_integer", "paper"])
def test_first_and_last(placement):
    student = prepare(build("mobilenet"), Bits(4, 3, 7), placement=placement)
    weights = [module_of(student, n).weight_bits for n in layers_of(student)]
    assert weights == [7] + [4] * 10 + [7]
    relus = [
        q.bits
        for n, q in student.named_modules()
        if isinstance(q, ActivationQuantizer) and n != "x_quantizer" and "residual" not in n
    ]
    assert (relus[0], relus[-1]) == (7, 7)
    assert set(relus[1:-1]) == {3}


def test_overrides():
    bits = Bits(4, 4, 8, {"block1.conv1.0": (2, 6), "block1.down.0": (3, 5), "fc": (5, 3)})
    student = prepare(build("resnet"), bits)
    layers = {n.target: n for n in layers_of(student)}

    def widths(name):
        return module_of(student, layers[name]).weight_bits, quantizer_of(
            student, layers[name]
        ).bits

    assert widths("stem.0") == (8, 8)
    assert widths("block1.conv1.0") == (2, 6)  # one input for both: the wider width
    assert widths("block1.down.0") == (3, 6)
    assert widths("block1.conv2.0") == (4, 4)
    assert widths("fc") == (5, 3)  # wins over first_last
    student = prepare(build("resnet"), Bits(4, 5, overrides={"block1.conv1.0": (2, 2)}))
    layers = {n.target: n for n in layers_of(student)}
    assert widths("block1.conv1.0") == (2, 5)  # the other layer that reads it has 5
    assert widths("block1.down.0") == (4, 5)


def test_the_image_keeps_its_bits():
    student = prepare(build("vgg"), Bits(4, 4, overrides={"0": (3, 2)}))
    first = layers_of(student)[0]
    assert module_of(student, first).weight_bits == 3
    assert quantizer_of(student, first).bits == 8


def test_from_zero_reaches_the_quantisers():
    for from_zero in (False, True):
        student = prepare(build("vgg"), Bits(), placement="paper", from_zero=from_zero)
        assert {q.from_zero for q in activation_quantizers(student)} == {from_zero}


def test_every_layer_learns_weights_of_its_own():
    """Whatever the teacher shares and freezes."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1))
    model[3].weight = model[0].weight
    student = prepare(model.requires_grad_(False), Bits())
    assert student.get_parameter("0.weight") is not student.get_parameter("3.weight")
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert all(student.get_parameter(name).requires_grad for name in names)
    assert all(torch.equal(student.get_parameter(n), model.get_parameter(n)) for n in names)


def test_the_model_is_not_touched():
    model = build("vgg").train()
    model[0].weight.requires_grad_(False)
    types = [type(m) for m in model.modules()]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    student = prepare(model, Bits())
    with torch.no_grad():
        for tensor in student.state_dict().values():
            tensor.add_(1)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert [type(m) for m in model.modules()] == types
    assert all(m.training for m in model.modules())
    assert model[1].inplace
    assert not student.get_submodule("1").inplace


def codes(x, low, high, bits):
    """method.md section 4 in float64: values after quantisation."""
    scale = (2**bits - 1) / np.maximum(high - low, 1e-8)
    zero_point = np.round(scale * low) + 2 ** (bits - 1)
    q = np.clip(np.round(scale * x - zero_point), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (q + zero_point) / scale


def conv_numpy(x, weight, bias):
    """3x3 with padding 1, in float64."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.einsum("nchwij,ocij->nohw", windows, weight) + bias[:, None, None]


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_one_layer_against_numpy(bits):
    torch.manual_seed(4)
    layer = nn.Conv2d(3, 4, 3, padding=1)
    student = prepared(nn.Sequential(layer), Bits(bits, 4))
    x = IMAGES.double().numpy()
    low, high = min(x.min(), 0), max(x.max(), 0)
    w = layer.weight.detach().double().numpy()
    limits = w.min((1, 2, 3), keepdims=True), w.max((1, 2, 3), keepdims=True)
    expected = conv_numpy(
        codes(x, low, high, 8), codes(w, *limits, bits), layer.bias.detach().double().numpy()
    )
    with torch.no_grad():
        got = student(IMAGES).double().numpy()
    # A code on a tie may go the other way in float32: then single outputs differ by a step.
    np.testing.assert_allclose(np.median(np.abs(got - expected)), 0, atol=1e-5)
    close = np.isclose(got, expected, rtol=1e-4, atol=1e-4)
    assert close.mean() > 0.99
    assert np.abs(got - expected).max() < (high - low) / 255 * np.abs(w).max() * 1.5


def test_paper_placement_of_two_layers_against_numpy():
    torch.manual_seed(4)
    first, second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)
    model = nn.Sequential(first, nn.ReLU(), second)
    student = prepare(model, Bits(4, 3), placement="paper", from_zero=True)
    with torch.no_grad(), quantizer_mode(student, "observe"):
        student(0.5 * IMAGES)
        student(IMAGES)

    def layer(x, module):
        w = module.weight.detach().double().numpy()
        w = codes(w, w.min((1, 2, 3), keepdims=True), w.max((1, 2, 3), keepdims=True), 4)
        return conv_numpy(x, w, module.bias.detach().double().numpy())

    hidden = [np.maximum(layer(s * IMAGES.double().numpy(), first), 0) for s in (0.5, 1)]
    high = 0.9 * (0.9 * 0 + 0.1 * hidden[0].max()) + 0.1 * hidden[1].max()
    low = 0.9 * (0.9 * 0 + 0.1 * hidden[0].min()) + 0.1 * hidden[1].min()
    expected = layer(codes(hidden[1], low, high, 3), second)
    (quantizer,) = activation_quantizers(student)
    assert quantizer.x_max.item() == pytest.approx(high, rel=1e-5)
    with torch.no_grad():
        got = student(IMAGES).double().numpy()
    assert np.isclose(got, expected, rtol=1e-3, atol=1e-4).mean() > 0.99


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 4)

    def forward(self, x):
        x = self.conv(x).flatten(2)
        return self.fc(torch.matmul(x, x.transpose(1, 2)))


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x, y):
        return self.conv(x) + y


class Undecided(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else x


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

    def forward(self, x):
        x = F.relu(self.conv(input=x))
        return self.fc(input=torch.flatten(F.adaptive_avg_pool2d(x, output_size=1), 1))


class MyConv(nn.Conv2d):
    pass


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 2)), {}, r"no low-bit form for: 0 \(ConvTransp"),
        (nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")), {}, "'reflect'"),
        (nn.Sequential(MyConv(3, 4, 1)), {}, r"conv2d \(conv2d\)"),
        (Attention(), {}, r"matmul \(matmul\)"),
        (Undecided(), {}, "cannot trace Undecided"),
        (Sum(), {}, "exactly one image batch, but takes 2 inputs"),
        (nn.Sequential(nn.ReLU()), {}, "no Conv2d or Linear"),
        (nn.Sequential(nn.Conv2d(3, 4, 1)), {"keep_float": ("0",)}, "no Conv2d or Linear"),
        (nn.Sequential(nn.Conv2d(3, 4, 1)), {"keep_float": ("fc",)}, r"nothing .*\['fc'\]"),
        (nn.Sequential(nn.Conv2d(3, 4, 1)), {"placement": "every"}, "placement must be one of"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1)),
            {"bits": Bits(overrides={"conv9": (4, 4)})},
            r"no quantised layer: \['conv9'\]",
        ),
    ],
)
def test_what_cannot_be_prepared(model, options, message):
    options = {"bits": Bits(), **options}
    with pytest.raises(ValueError, match=message):
        prepare(model, **options)


def test_all_problems_are_named_at_once():
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.Conv2d(4, 4, 1), nn.Conv1d(4, 4, 1))
    with pytest.raises(ValueError, match=r"0 \(ConvTranspose2d\), 2 \(Conv1d\).*keep_float"):
        prepare(model, Bits())


def test_keep_float():
    model = nn.Sequential(
        nn.ConvTranspose2d(3, 4, 2), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)
    )
    student = prepare(model, Bits(4, 4, 8), keep_float=("0", "2"))
    assert type(student.get_submodule("2")) is nn.Conv2d
    (layer,) = layers_of(student)
    assert layer.target == "4"
    assert quantizer_of(student, layer) is not None
    assert len(activation_quantizers(student)) == 1


def test_keep_float_by_node_name():
    student = prepare(Attention(), Bits(), keep_float=("matmul",))
    assert [n.target for n in layers_of(student)] == ["conv", "fc"]
    assert quantizer_of(student, layers_of(student)[1]) is not None
    calls = {n.name: n for n in student.graph.nodes}
    assert not isinstance(module_of(student, calls["matmul"].args[0]), ActivationQuantizer)


def test_layers_called_by_keyword():
    student = prepare(ByKeyword(), Bits())
    with torch.no_grad(), quantizer_mode(student, "observe"):
        assert student(IMAGES).shape == (4, 2)
    assert [quantizer_of(student, n).bits for n in layers_of(student)] == [8, 4]


def test_a_layer_called_twice_reads_quantised_values_both_times():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, 1, 1)

        def forward(self, x):
            return self.conv(F.relu(self.conv(x)))

    student = prepare(Twice(), Bits(4, 5))
    assert [quantizer_of(student, n).bits for n in layers_of(student)] == [8, 5]


def test_residual_addition_reads_eight_bits():
    """And the layers read these same integers, narrowed."""
    student = prepare(build("mobilenet"), Bits())
    add = next(n for n in student.graph.nodes if n.target is operator.add)
    wide = module_of(student, add.args[0])
    assert isinstance(wide, ActivationQuantizer)
    assert wide.bits == 8
    reader = next(n for n in layers_of(student) if n.target == "blocks.1.expand.0")
    assert module_of(student, reader.args[0]).bits == 4
    assert reader.args[0].args[0] is add.args[0]


def test_wide_layers_share_their_integers_with_the_addition():
    student = prepare(build("mobilenet"), Bits(8, 8))
    add = next(n for n in student.graph.nodes if n.target is operator.add)
    reader = next(n for n in layers_of(student) if n.target == "blocks.1.expand.0")
    assert reader.args[0] is add.args[0]


def test_addition_behind_a_pool_and_an_identity():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.pool, self.skip = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Identity()
            self.conv, self.side, self.fc = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

        def forward(self, x):
            x = F.relu(self.stem(x))
            y = self.pool(x)
            y = self.conv(y) + self.skip(y)
            return self.fc(y.mean((2, 3))) + self.fc(self.side(x).mean((2, 3)))

    student = prepare(Net(), Bits(4, 3))
    nodes = {n.name: n for n in student.graph.nodes}
    assert nodes["pool"].args[0] is nodes["relu_residual"]
    assert nodes["skip"].args[0] is nodes["pool"]  # 8 bits
    assert nodes["conv"].args[0] is nodes["pool_quantizer"]
    assert nodes["pool_quantizer"].args[0] is nodes["pool"]
    assert nodes["side"].args[0] is nodes["relu_quantizer"]
    assert nodes["relu_quantizer"].args[0] is nodes["relu_residual"]
    bits = {n: q.bits for n, q in student.named_modules() if isinstance(q, ActivationQuantizer)}
    assert (bits["relu_residual"], bits["pool_quantizer"], bits["relu_quantizer"]) == (8, 3, 3)


def test_the_student_is_differentiable():
    student = prepared(build("mobilenet"))
    student(IMAGES).square().sum().backward()
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    assert isinstance(student, fx.GraphModule)
    assert student.get_submodule("stem.0").weight.grad.abs().sum() > 0
