"""Units of reconstruction: where networks are split, and parts that compute what the whole does."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from fdda_fast.graphs import note_shapes
from fdda_fast.models.small import mobilenetv2, regnetx, resnet20
from fdda_fast.quantization.bits import Bits
from fdda_fast.quantization.modules import quantizer_mode
from fdda_fast.quantization.prepare import prepare
from fdda_fast.quantization.units import find_units, part_of
from fdda_fast.tracing import trace


class PreAct(nn.Module):
    """A sum that is read twice and never quantised, and works in place."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv1, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

    def forward(self, x):
        y = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        x += y
        return x


class Twice(nn.Module):
    """One layer in two places."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        return F.relu(self.norm(self.conv(x)))


def stem(channels=3):
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def head():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


class Reshaped(nn.Module):
    """The image's size is read at the very end, or before all else."""

    def __init__(self, batch_size, early):
        super().__init__()
        self.stem, self.conv, self.fc = stem(), nn.Conv2d(4, 2, 3), nn.Linear(2 * 144, 5)
        self.batch_size, self.early = batch_size, early

    def forward(self, x):
        count = self.batch_size(x) if self.early else None
        y = self.conv(self.stem(x))
        return self.fc(y.view(count if self.early else self.batch_size(x), -1))


class Heights(Reshaped):
    """Other sizes are of the tensor that they were read from."""

    def __init__(self):
        super().__init__(None, None)

    def forward(self, x):
        y = self.conv(self.stem(x))
        return self.fc(y.view(-1, 2 * (x.size(2) - 4) * (x.shape[3] - 4)))


class ThriceAtTheEnd(nn.Module):
    """The last unit has no layer of its own."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = stem(), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.conv(F.relu(self.conv(self.stem(x)))))
        return self.conv(x).mean([2, 3])


def blocks(prefix, count, *layers):
    return [tuple(f"{prefix}.{i}.{layer}" for layer in layers) for i in range(count)]


NETWORKS = {
    "preact": (
        lambda: nn.Sequential(stem(), PreAct(), PreAct(), head()),
        [("0.0",), ("1.conv1", "1.conv2"), ("2.conv1", "2.conv2"), ("3.2",)],
    ),
    "twice": (lambda: nn.Sequential(stem(), Twice(), head()), [("0.0",), ("1.conv",), ("2.2",)]),
    **{
        f"reshaped-{name}-{early}": (
            lambda read=read, early=early: Reshaped(read, early),
            [("stem.0",), ("conv",), ("fc",)],
        )
        for early in (False, True)
        for name, read in {
            "size(0)": lambda x: x.size(0),
            "size(dim=0)": lambda x: x.size(dim=0),
            "size()[0]": lambda x: x.size()[0],
            "shape[0]": lambda x: x.shape[0],
        }.items()
    },
    "heights": (Heights, [("stem.0", "conv", "fc")]),
    "thrice": (ThriceAtTheEnd, [("stem.0",), ("conv",)]),
    "resnet18": (
        lambda: torchvision.models.resnet18(num_classes=5),
        [
            ("conv1",),
            *blocks("layer1", 2, "conv1", "conv2"),
            *(
                pair
                for n in (2, 3, 4)
                for pair in (
                    (f"layer{n}.0.conv1", f"layer{n}.0.conv2", f"layer{n}.0.downsample.0"),
                    (f"layer{n}.1.conv1", f"layer{n}.1.conv2"),
                )
            ),
            ("fc",),
        ],
    ),
}


def prepared(model):
    torch.manual_seed(0)
    student = prepare(model, Bits(4, 4))
    with quantizer_mode(student, "observe"), torch.no_grad():
        student(torch.randn(4, 3, 16, 16))
    return student


def units_of(model, student, channels=3):
    graph_module = trace(model)
    note_shapes(graph_module, (channels, 16, 16))
    return find_units(graph_module, student)


@pytest.mark.parametrize("name", NETWORKS)
def test_units_and_their_parts(name):
    make, expected = NETWORKS[name]
    model = make().eval()
    student = prepared(model)
    units = units_of(model, student)
    assert [unit.layers for unit in units] == expected
    x = torch.randn(3, 3, 16, 16)
    for network in (trace(model), student):
        with torch.no_grad():
            whole, y = network(x.clone()), x
            for unit in units:
                y = part_of(network, unit.entry, unit.exit)(y.clone())
            assert torch.equal(y, whole)
            rest = part_of(network, units[-1].entry, units[-1].exit)
            before = part_of(network, units[0].entry, units[-1].entry)
            assert torch.equal(rest(before(x.clone())), whole)
    learned = part_of(student, units[0].entry, units[0].exit)
    assert learned.get_submodule(expected[0][0]) is student.get_submodule(expected[0][0])


@pytest.mark.parametrize(
    ("make", "count"), [(resnet20, 1 + 9 + 1), (mobilenetv2, 1 + 3 + 6 + 5 + 2), (regnetx, 11)]
)
def test_units_of_the_shipped_networks(make, count):
    """Residual blocks, and single layers where there are none."""
    model = make()
    units = units_of(model, prepare(model, Bits()), channels=1)
    assert len(units) == count
    layers = [name for unit in units for name in unit.layers]
    kinds = nn.Conv2d | nn.Linear
    assert sorted(layers) == sorted(n for n, m in model.named_modules() if isinstance(m, kinds))


def test_layers_left_in_float():
    """They belong to the units of their neighbours."""
    model = nn.Sequential(stem(), PreAct(), head())
    student = prepare(model, Bits(), keep_float=("0.0", "2.2"))
    (unit,) = units_of(model, student)
    assert unit.layers == ("1.conv1", "1.conv2")
    assert unit.entry == "input_1"
    assert unit.exit.endswith("2_2")
