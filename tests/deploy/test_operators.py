"""On the tensors of real networks the compiled operators and the reference agree bit for bit."""

import pytest
import torch
from networks import NETWORKS, images, packed_network, trace

from fdda_fast import ops
from fdda_fast.deploy import integer
from fdda_fast.deploy.integer import Sums
from fdda_fast.ops import reference
from fdda_fast.quantization.bits import Bits

CHECKED = (integer.Quantize, integer.PackedConv2d, integer.PackedLinear, integer.MaxPool2d)


@pytest.mark.skipif(not ops.backend_info()["extension"], reason="no compiled operators")
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_every_node(name, bits, monkeypatch):
    _, packed = packed_network(name, Bits(bits, bits))
    records = trace(packed, images(3))
    monkeypatch.setattr(integer, "ops", reference)
    for node, tensors, inputs, output in records:
        if isinstance(node.op, CHECKED) and not isinstance(output, Sums):
            assert torch.equal(node.op.run(tensors, *inputs), output), node.name
