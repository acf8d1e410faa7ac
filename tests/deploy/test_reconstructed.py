"""Reconstructed networks of every shape: their learned codes are the packed ones."""

import pytest
import torch
from networks import NETWORKS, compare_forced, images, randomize

from fdda_fast.config import QuantizeConfig, ReconstructConfig
from fdda_fast.deploy import pack
from fdda_fast.deploy.fold import weight_codes
from fdda_fast.quantization.bits import Bits
from fdda_fast.quantization.quantize import quantize
from fdda_fast.quantization.rounding import LearnedRounding

CONFIG = QuantizeConfig(
    range_steps=1, flip=False, max_shift=0.0, real_batch=8, synthetic_batch=0,
    reconstruct=ReconstructConfig(steps=3, images=8, batch=8, lr=1.0),
)  # fmt: skip


@pytest.mark.parametrize("bits", [Bits(2, 3), Bits(4, 4)], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network(name, bits, monkeypatch):
    torch.manual_seed(0)
    model = randomize(NETWORKS[name]())
    learned = {}
    harden = LearnedRounding.harden

    def recorded(rounding, layer):
        up = (rounding.upward() >= 0.5) & rounding.free
        learned[layer] = (rounding.below + up + rounding.zero_point).long()
        harden(rounding, layer)

    monkeypatch.setattr(LearnedRounding, "harden", recorded)
    x = images(8)
    with torch.no_grad():
        labels = model(x).argmax(1)
    student = quantize(model, (x, labels), bits, CONFIG, method="reconstruct")
    packed = pack(student, x[:1])
    assert compare_forced(student, packed, images(16)) < 1e-3
    assert learned.keys() == {m for m in student.modules() if hasattr(m, "weight_bits")}
    for layer, expected in learned.items():
        q, offset, _ = weight_codes("", layer)
        got = q + offset[:, None]
        if layer.weight.dim() == 4:
            shape = [layer.weight.shape[i] for i in (0, 2, 3, 1)]
            got = got.view(shape).permute(0, 3, 1, 2).flatten(1)
        spread = expected.amax(1) > expected.amin(1)
        assert torch.equal(got[spread], expected[spread])
