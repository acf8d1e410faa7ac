"""PackedModel: its inputs, what it says about itself."""

import dataclasses
import math

import pytest
import torch
from networks import images, packed_network, quantized, randomize
from torch import nn

from fdda_fast.data.preprocessing import Preprocessing
from fdda_fast.deploy import PackedModel, pack
from fdda_fast.deploy.glue import Unary
from fdda_fast.deploy.graph import Graph, Node
from fdda_fast.deploy.integer import SumPool
from fdda_fast.quantization.bits import Bits


@pytest.fixture(scope="module")
def packed():
    return packed_network("resnet", Bits(4, 5))[1]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 16, 16), r"shape \[N, 3, H, W\], got \(3, 16, 16\)"),
        (torch.zeros(1, 4, 16, 16), r"shape \[N, 3, H, W\]"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.float64), "float32 tensor, got torch.float64"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "float32 tensor, got torch.uint8"),
        ([[0.0]], "float32 tensor, got list"),
    ],
)
def test_wrong_input(packed, x, message):
    with pytest.raises(ValueError, match=message):
        packed(x)


def test_size_that_does_not_fit():
    _, packed = packed_network("vgg")
    with pytest.raises(ValueError, match=r"7 \(PackedLinear\) cannot run .* expected \[N, 320\]"):
        packed(images(1, 20))
    _, packed = packed_network("stem")
    with pytest.raises(ValueError, match="cannot run on images"):
        packed(images(1, 16)[:, :, :0])


def test_not_a_number_does_not_crash(packed):
    x = images(3)
    x[0, 0, 0, 0], x[1, 0, 0, 0], x[2, 0, 0, 0] = float("nan"), float("inf"), float("-inf")
    assert packed(x).shape == (3, 10)


def test_pool_that_would_overflow():
    huge = torch.zeros(1, dtype=torch.uint8).expand(1, 4096, 4096, 1)
    with pytest.raises(ValueError, match="overflows int32"):
        SumPool().run({}, huge)


def test_no_gradients(packed):
    x = images(1).requires_grad_()
    assert not packed(x).requires_grad
    assert not packed.training
    assert list(packed.parameters()) == []


def test_moves_but_keeps_its_dtypes(packed):
    assert packed.to("cpu") is packed
    with pytest.raises(ValueError, match=r"expected torch\.float32"):
        packed.half()
    assert packed(images(1)).dtype == torch.float32


def test_profiles_on_the_cpu_only(packed):
    with pytest.raises(ValueError, match="profile: expected images on the CPU, got meta"):
        packed.profile(images(1).to("meta"))


def test_summary(packed):
    rows = {row.name: row for row in packed.summary()}
    assert len(rows) == len(packed.graph.nodes)
    conv = rows["2.body.0.0"]
    assert (conv.op, conv.domain, conv.bits) == ("PackedConv2d", "integer", 4)
    assert conv.input_shape == (1, 16, 16, 16)
    assert conv.output_shape == (1, 24, 8, 8)
    assert conv.macs == 24 * 8 * 8 * 16 * 9
    packed_bytes = 32 * 16 * 9 * 4 // 8  # rows padded to 32
    assert conv.weight_bytes == packed_bytes + 24 * (1 + 4 + 4)
    image = rows["0.0"]
    assert image.input_shape == (1, 3, 16, 16)
    quantize = packed.summary()[0]
    assert (quantize.op, quantize.domain, quantize.bits) == ("Quantize", "convert", 8)
    assert rows["4.2"].macs == 240
    assert sum(row.weight_bytes for row in rows.values()) == sum(
        t.numel() * t.element_size() for t in packed.tensors.values()
    )


def test_summary_of_images_that_do_not_fit_memory(packed):
    graph = dataclasses.replace(packed.graph, in_channels=2**20, image_size=(2**14, 2**14))
    with pytest.raises(ValueError, match="cannot run on images of shape"):
        PackedModel(graph, packed.tensors).summary()


def test_glue_is_named():
    _, packed = packed_network("dense")
    domains = {row.op: row.domain for row in packed.summary()}
    assert domains["BatchNorm"] == domains["Cat"] == domains["AvgPool2d"] == "float"
    assert domains["Dequantize" if "Dequantize" in domains else "Quantize"] == "convert"
    assert domains["PackedConv2d"] == domains["SumPool"] == "integer"


def test_metadata_must_fit(packed):
    grey = Preprocessing(16, 16, (0.5,), (0.5,))
    with pytest.raises(ValueError, match="1 channels, the model reads 3"):
        PackedModel(packed.graph, packed.tensors, grey)
    with pytest.raises(ValueError, match="3 class names for 10 outputs"):
        PackedModel(packed.graph, packed.tensors, class_names=["a", "b", "c"])
    qmodel = quantized(randomize(nn.Sequential(nn.Conv2d(3, 5, 16), nn.Flatten())))
    with pytest.raises(ValueError, match="2 class names for 5 logits"):
        pack(qmodel, images(1), class_names=["a", "b"])
    assert pack(qmodel, images(1), class_names=list("abcde")).class_names == list("abcde")


def test_frees_tensors_after_their_last_use(packed):
    dead = packed.graph.last_uses()
    freed = [value for values in dead for value in values]
    assert sorted(freed) == list(range(len(packed.graph.nodes)))
    assert len(freed) == len(set(freed))


def test_output_that_a_later_node_reads():
    nodes = (Node("a", Unary(function="relu"), (0,)), Node("b", Unary(function="tanh"), (1,)))
    model = PackedModel(Graph(3, (16, 16), False, nodes, output=1), {})
    x = images(1)
    assert torch.equal(model(x), x.relu())
    assert model.summary()[1].input_shape == (1, 3, 16, 16)


def test_threads_do_not_matter(packed):
    x = images(5, 24)
    expected = packed(x)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(packed(x), expected)
    finally:
        torch.set_num_threads(threads)
    assert math.isfinite(expected.sum().item())
