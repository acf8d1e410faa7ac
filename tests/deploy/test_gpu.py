"""Packed networks on a GPU: integer for integer what the CPU computes, and captured in a graph."""

import pytest
import torch
from networks import NETWORKS, images, packed_network, trace

from fdda_fast import ops
from fdda_fast.deploy.integer import PackedCodes, Sums, domain
from fdda_fast.deploy.reordered import packed_values
from fdda_fast.quantization.bits import Bits

pytestmark = pytest.mark.gpu


def on_cpu(value):
    if isinstance(value, Sums):
        return Sums(value.total.cpu(), value.count)
    if isinstance(value, PackedCodes):
        return ops.unpack_codes(value.data.cpu())
    if isinstance(value, tuple):
        return tuple(map(on_cpu, value))
    return value.cpu()


def on_gpu(value, packed):
    if isinstance(value, Sums):
        return Sums(value.total.cuda(), value.count)
    return PackedCodes(ops.pack_codes(value).cuda()) if packed else value.cuda()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_every_node(name, bits):
    """On the CPU's inputs, as float nodes may round differently."""
    packed = packed_network(name, Bits(bits, bits))[1]
    gpu = packed_network(name, Bits(bits, bits))[1].to("cuda")
    types, halved = packed.graph.types(), packed_values(packed.graph)
    for i, (node, _, inputs, expected) in enumerate(trace(packed, images(3))):
        if domain(node.op, [types[source] for source in node.inputs]) == "float":
            continue
        inputs = [
            on_gpu(value, source in halved)
            for source, value in zip(node.inputs, inputs, strict=True)
        ]
        actual, expected = on_cpu(gpu._runners[i](*inputs)), on_cpu(expected)
        if isinstance(actual, Sums):
            actual, expected = actual.total, expected.total
        assert torch.equal(actual, expected), node.name


@pytest.mark.parametrize("name", ["resnet", "inverted", "stem", "grouped", "wide"])
def test_captured_in_a_graph(name):
    packed = packed_network(name, Bits(4, 4))[1].to("cuda")
    x = images(4).cuda()
    expected = packed(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = packed(x)
    x.copy_(images(4, seed=2).cuda())
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    graph.replay()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated
    assert torch.equal(logits, packed(images(4, seed=2).cuda()))
    assert not torch.equal(logits, expected)


def test_back_to_the_cpu():
    packed = packed_network("resnet")[1]
    x = images(2)
    expected = packed(x)
    packed.to("cuda")
    assert packed(x.cuda()).device.type == "cuda"
    assert torch.equal(packed.to("cpu")(x), expected)


def test_current_stream():
    packed = packed_network("resnet")[1].to("cuda")
    x = images(2).cuda()
    expected = packed(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = packed(x)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(actual, expected)


def test_images_elsewhere():
    packed = packed_network("resnet")[1].to("cuda")
    with pytest.raises(ValueError, match="cannot run on images"):
        packed(images(1))
