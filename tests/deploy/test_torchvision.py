"""The networks of the paper, as torchvision builds them."""

import pytest
import torchvision
from networks import agreement, compare_forced, images, quantized, randomize

from fdda_fast.deploy import load_packed, pack
from fdda_fast.quantization.bits import Bits

SIZE = 64


def packed_model(name, bits):
    model = randomize(getattr(torchvision.models, name)())
    qmodel = quantized(model, bits, SIZE)
    return qmodel, pack(qmodel, images(1, SIZE))


@pytest.mark.parametrize("bits", [Bits(8, 8), Bits(4, 4, first_last=8)], ids=str)
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "regnet_x_400mf"])
def test_integer_from_image_to_logits(name, bits):
    qmodel, packed = packed_model(name, bits)
    assert {row.domain for row in packed.summary()[1:]} == {"integer"}
    assert compare_forced(qmodel, packed, images(4, SIZE)) < 1e-3


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
