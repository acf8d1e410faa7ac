"""Codes two to a byte, where the graph of a GPU stores them so; on the CPU's operators."""

import pytest
import torch
from networks import images, packed_network

from fdda_fast import ops
from fdda_fast.deploy import runtime
from fdda_fast.deploy.integer import PackedCodes, PackedConv2d, Requantize
from fdda_fast.deploy.reordered import packed_values
from fdda_fast.quantization.bits import Bits


def values_of(packed, x):
    values = {}
    logits = packed.execute(x, lambda node, tensors, inputs, y: values.update({node.name: y}))
    return logits, values


def as_on_cuda(packed, monkeypatch):
    """Binds the model as for a device that has the CUDA kernels."""
    monkeypatch.setattr(runtime, "has_cuda_kernels", lambda device: True)
    return packed.to("cpu")


def test_values_are_the_same(monkeypatch):
    packed = packed_network("wide", Bits(4, 4))[1]
    x = images(2)
    logits, expected = values_of(packed, x)
    rows = packed.summary()
    found_logits, found = values_of(as_on_cuda(packed, monkeypatch), x)
    assert torch.equal(found_logits, logits)
    stored = {name: y for name, y in found.items() if isinstance(y, PackedCodes)}
    names = [node.name for node in packed.graph.nodes]
    assert {names.index(name) + 1 for name in stored} == packed_values(packed.graph)
    for name, y in stored.items():
        assert 2 * y.data.numel() == expected[name].numel()
        assert torch.equal(ops.unpack_codes(y.data), expected[name])
    assert packed.summary() == rows


def test_what_is_packed():
    """Where both sides are convolutions of one group, or a change of scale and such a one."""
    graph = packed_network("wide", Bits(4, 4))[1].graph
    found = packed_values(graph)
    kinds = {type(graph.nodes[value - 1].op) for value in found}
    assert kinds == {PackedConv2d, Requantize}
    for value in found:
        readers = [node for node in graph.nodes if value in node.inputs]
        assert all(node.op.in_channels in (32, 64) for node in readers)
        assert all(value not in node.inputs[1:] for node in readers)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("wide", Bits(8, 8)),
        ("wide", Bits(4, 8)),
        ("wide", Bits(8, 4)),
        ("resnet", Bits(4, 4)),  # 16 and 24 channels
        ("inverted", Bits(4, 4)),  # 32 channels, of depthwise convolutions
    ],
)
def test_what_is_not(name, bits):
    assert packed_values(packed_network(name, bits)[1].graph) == set()
