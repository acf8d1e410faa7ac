"""What every layer keeps of the exact network's output."""

import math

import pytest
import torch
from networks import NETWORKS, images, quantized, randomize
from torch import fx, nn

from fdda_fast.deploy import pack
from fdda_fast.deploy.fidelity import Fidelity, layer_fidelity
from fdda_fast.quantization.bits import Bits
from fdda_fast.tracing import trace


def made(name, bits=None):
    model = randomize(NETWORKS[name]())
    return model, quantized(model, bits)


def values(graph_module, x):
    """Node -> its value, copied before anything works on it in place."""
    kept = {}

    class Keeper(fx.Interpreter):
        def run_node(self, node):
            y = super().run_node(node)
            kept[node.name] = y.clone() if isinstance(y, torch.Tensor) else y
            return y

    with torch.no_grad():
        Keeper(graph_module).run(x)
    return kept


def test_sums_against_float64():
    x, y = torch.randn(2, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sums = Fidelity(*(float(t.square().sum()) for t in (x, y, y - x)))
    assert sums.cosine == pytest.approx(torch.cosine_similarity(x, y, 0).item(), abs=1e-12)
    assert sums.sqnr == pytest.approx(10 * math.log10(x.square().sum() / (y - x).square().sum()))
    assert Fidelity(1.0, 1.0, 0.0).sqnr == math.inf
    assert Fidelity(0.0, 1.0, 1.0).sqnr == -math.inf
    assert math.isnan(Fidelity(0.0, 0.0, 0.0).sqnr)
    assert math.isnan(Fidelity(0.0, 1.0, 1.0).cosine)


def test_residual_network():
    """Every layer behind what follows it, several batches of images."""
    model, student = made("resnet")
    x = images(11)
    found = layer_fidelity(model, student, x, pack(student, x[:1]))
    exact, rounded = values(trace(model), x), values(student, x)
    ends = {  # of the exact network, of the quantised one
        "0.0": ("_0_2", "_0_2_residual"),
        "2.body.0.0": ("_2_body_0_2", "_2_body_0_2_quantizer"),
        "2.body.1.0": ("_2_body_1_1", "_2_body_1_1"),
        "2.shortcut.0": ("relu_1", "relu_1_residual"),
        "4.2": ("_4_2", "_4_2"),
    }
    assert list(found)[:2] == ["0.0", "1.body.0.0"]
    assert len(found) == 9
    for layer, (a, b) in ends.items():
        error = (rounded[b] - exact[a]).double().square().sum()
        sqnr = 10 * math.log10(exact[a].double().square().sum() / error)
        pair = (v.double().flatten() for v in (exact[a], rounded[b]))
        cosine = torch.cosine_similarity(*pair, 0)
        assert found[layer]["fake-quantised"].sqnr == pytest.approx(sqnr, abs=1e-4)
        assert found[layer]["fake-quantised"].cosine == pytest.approx(cosine.item(), abs=1e-6)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_packed_loses_what_fake_quantisation_does(name):
    model, student = made(name, Bits(4, 5))
    x = images(3)
    found = layer_fidelity(model, student, x, pack(student, x[:1]))
    assert found
    for both in found.values():
        fake, packed = both["fake-quantised"], both["packed"]
        assert packed.sqnr == pytest.approx(fake.sqnr, abs=0.3)
        assert packed.cosine == pytest.approx(fake.cosine, abs=0.01)
    with_more = layer_fidelity(model, quantized(model, Bits(8, 8)), x)
    assert all(set(both) == {"fake-quantised"} for both in with_more.values())
    last = list(found)[-1]
    assert with_more[last]["fake-quantised"].sqnr > found[last]["fake-quantised"].sqnr + 6


def test_refuses():
    model, student = made("resnet")
    x = images(1)
    with pytest.raises(ValueError, match="images must be one at least"):
        layer_fidelity(model, student, x[:0])
    with pytest.raises(ValueError, match="student was not made from model"):
        layer_fidelity(nn.Sequential(nn.Conv2d(3, 4, 1)), student, x)
    for bits in (Bits(4, 3), Bits(3, 4)):
        other = pack(quantized(model, bits), x)
        with pytest.raises(ValueError, match="packed was not made from student"):
            layer_fidelity(model, student, x, other)
    with pytest.raises(ValueError, match="packed was not made from student"):
        layer_fidelity(model, student, x, pack(made("stem")[1], x))
