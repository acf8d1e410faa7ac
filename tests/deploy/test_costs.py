"""What a width costs, against networks that have it; no time is judged."""

import pytest
import torch
from networks import NETWORKS, images, quantized, randomize

from fdda_fast.deploy import pack
from fdda_fast.deploy.costs import COSTS, packed_costs
from fdda_fast.quantization.bits import Bits

PAIRS = [(2, 4), (4, 4), (4, 8), (2, 8)]


def model_and_widths(name):
    model = randomize(NETWORKS[name]())
    layers = pack(quantized(model), images(1)).bits
    widths = {n: [(w, 8) for w in (2, 4)] if a == 8 else PAIRS for n, (_, a) in layers.items()}
    return model, widths


def total(costs, pair):
    """Of a network that has the pair throughout, but where the image is read."""
    return sum(c[pair] if pair in c else c[pair[0], 8] for c in costs.values())


@pytest.fixture(scope="module")
def resnet():
    return model_and_widths("resnet")


def test_bytes_of_the_file(resnet, tmp_path):
    model, widths = resnet
    costs = packed_costs(model, images(2), widths, "bytes")
    assert {n: list(c) for n, c in costs.items()} == widths
    for pair in PAIRS:
        packed = pack(quantized(model, Bits(*pair)), images(1))
        packed.save(tmp_path / "model.fdda")
        size = (tmp_path / "model.fdda").stat().st_size
        assert size <= total(costs, pair) <= 1.1 * size + 1000
    inner = costs["2.body.0.0"]
    assert inner[4, 4] - inner[2, 4] == 32 * 16 * 9 * 2 // 8  # rows padded to 32


def test_layers_that_stay_in_float_are_paid_for(resnet, tmp_path):
    model, widths = resnet
    kept = list(widths)[-1]
    rest = {name: pairs for name, pairs in widths.items() if name != kept}
    costs = packed_costs(model, images(2), rest, "bytes", keep_float=(kept,))
    packed = pack(quantized(model, Bits(4, 4), keep_float=(kept,)), images(1))
    packed.save(tmp_path / "model.fdda")
    size = (tmp_path / "model.fdda").stat().st_size
    assert size <= total(costs, (4, 4)) <= 1.1 * size + 1000


def test_bit_operations_and_average(resnet):
    model, widths = resnet
    costs = packed_costs(model, images(1), widths, "bit_operations")
    assert costs["2.body.0.0"][2, 4] == 24 * 8 * 8 * 16 * 9 * 2 * 4
    assert costs["0.0"][4, 8] == 16 * 16 * 16 * 3 * 9 * 4 * 8
    costs = packed_costs(model, images(1), widths, "average_bits")
    for pair in PAIRS:
        assert total(costs, pair) == pytest.approx(pair[0])


def test_a_module_that_is_called_twice():
    model, widths = model_and_widths("branches")
    assert list(widths) == ["0.0", "1.conv1.0", "1.conv2.0", "2.2"]
    one = 12 * 16 * 16 * 12 * 9 * 2 * 4
    costs = packed_costs(model, images(1), widths, "bit_operations")
    assert costs["1.conv1.0"][2, 4] == 2 * one
    assert costs["1.conv2.0"][2, 4] == one
    costs = packed_costs(model, images(1), widths, "average_bits")
    assert total(costs, (4, 4)) == pytest.approx(4)
    assert costs["1.conv1.0"] == pytest.approx(costs["1.conv2.0"])


def test_seconds(resnet):
    model, widths = resnet
    seen = []
    costs = packed_costs(model, images(1), widths, "seconds", lambda *a: seen.append(a))
    assert seen == [(i, 4, {}) for i in range(1, 5)]
    assert all(seconds > 0 for c in costs.values() for seconds in c.values())


def test_refuses(resnet):
    model, widths = resnet
    with pytest.raises(ValueError, match="kind must be one of"):
        packed_costs(model, images(1), widths, "joules")
    with pytest.raises(ValueError, match="widths must be of the network's layers"):
        packed_costs(model, images(1), {"0.0": PAIRS}, COSTS[0])
    with pytest.raises(ValueError, match="no packed form"):
        packed_costs(
            torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Softsign()),
            images(1),
            {"0": [(4, 8)]},
            COSTS[0],
        )
