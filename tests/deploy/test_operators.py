"""On the tensors of real networks every instruction set agrees with the reference bit for bit."""

import pytest
import torch
from networks import NETWORKS, images, packed_network, trace

from fdda_fast import ops
from fdda_fast.deploy import integer
from fdda_fast.ops import reference
from fdda_fast.ops._library import use_isa
from fdda_fast.quantization.bits import Bits

INFO = ops.backend_info()
ISAS = [isa for isa in INFO["isas_compiled"] if isa in INFO["isas_supported"]]
CHECKED = (
    integer.Quantize,
    integer.Requantize,
    integer.PackedConv2d,
    integer.PackedLinear,
    integer.MaxPool2d,
)


@pytest.mark.skipif(not ISAS, reason="no compiled operators")
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_every_node(name, bits, monkeypatch):
    _, packed = packed_network(name, Bits(bits, bits))
    records = [r for r in trace(packed, images(3)) if isinstance(r[0].op, CHECKED)]
    with monkeypatch.context() as patch:
        patch.setattr(integer, "ops", reference)
        expected = [node.op.run(tensors, *inputs) for node, tensors, inputs, _ in records]
    for isa in ISAS:
        with use_isa(isa):
            for (node, tensors, inputs, _), want in zip(records, expected, strict=True):
                assert torch.equal(node.op.run(tensors, *inputs), want), (node.name, isa)
