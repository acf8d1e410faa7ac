"""The native program of a packed graph: the same bits as the graph run node by node."""

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torchvision
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networks import CLASSES, NETWORKS, conv_bn, images, packed_network, quantized, randomize
from torch import nn
from torchvision.models.resnet import Bottleneck

from fdda_fast.deploy import pack
from fdda_fast.deploy.graph import Graph, Node
from fdda_fast.deploy.integer import Dequantize, Pad, Quantize, Slice
from fdda_fast.deploy.program import Program
from fdda_fast.deploy.runtime import _PROGRAMS
from fdda_fast.deploy.schema import MAX_EXTENT
from fdda_fast.ops import backend_info
from fdda_fast.ops._library import use_isa
from fdda_fast.quantization.bits import Bits

INFO = backend_info()
ISAS = [isa for isa in INFO["isas_compiled"] if isa in INFO["isas_supported"]]
pytestmark = pytest.mark.skipif(not INFO["extension"], reason="compiled operators not loaded")


def program_of(packed):
    return next(reversed(packed._programs.values()))


def assert_same(packed, x, calls=3):
    """`calls` of images that differ: what the arena keeps from one must not reach the next."""
    packed(x)  # makes the program
    for k in range(calls):
        y = torch.roll(x, k, 2) * (1 - 0.3 * k)
        y = torch.empty_strided(x.shape, x.stride()).copy_(y)
        torch.testing.assert_close(packed(y), packed.execute(y), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bits", [Bits(4, 4), Bits(8, 8), Bits(2, 3)], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network(name, bits):
    packed = packed_network(name, bits)[1]
    assert_same(packed, images(1))
    assert_same(packed, images(3).to(memory_format=torch.channels_last))


@pytest.mark.parametrize("name", NETWORKS)
def test_images_one_by_one(name, monkeypatch):
    """As if activations were large; to the last node that it is possible for."""
    monkeypatch.setattr("fdda_fast.deploy.program._STEP", -(2**24))
    packed = packed_network(name, Bits(4, 4))[1]
    assert_same(packed, images(3))
    program = program_of(packed)
    never = ("dense", "preact", "several", "excite", "shuffle", "normalised", "linear")
    assert (program._image_nodes > 1) == (name not in never)
    steps = program.profile(images(3))
    assert [step.node.name for step in steps] == [node.name for node in packed.graph.nodes]


def test_small_images_together():
    packed = packed_network("resnet", Bits(4, 4))[1]
    packed(images(8))
    assert program_of(packed)._image_nodes == 0


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    packed = packed_network("resnet", Bits(4, 4))[1]
    with use_isa(isa):
        assert_same(packed, images(2))
    assert any(key[2] == isa for key in packed._programs)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2])
def test_sums_of_two_convolutions_in_blocks(isa, threads, monkeypatch):
    """Bottlenecks: several blocks of lines in the first layer, whose steps are timed as ever."""
    monkeypatch.setattr("fdda_fast.deploy.program._LARGE", 0)
    model = torchvision.models.resnet.ResNet(Bottleneck, [1, 1, 1, 1], num_classes=CLASSES)
    packed = pack(quantized(randomize(model), Bits(4, 4), 96), images(1, 96))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with use_isa(isa):
            assert_same(packed, images(2, 96))
            made = program_of(packed)
            assert any(made._adds_up(n) for n in range(len(packed.graph.nodes) - 1))
            steps = made.profile(images(2, 96))
            assert [s.node.name for s in steps] == [n.name for n in packed.graph.nodes]
    finally:
        torch.set_num_threads(before)


@given(
    st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 70), st.data(),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_slices_and_padding(batch, channels, height, width, data):
    """Against torch's; of codes of images and of features."""
    sizes = data.draw(st.sampled_from([(channels, height, width), (width,)]))
    low, high = st.integers(-80, 70), st.integers(-80, 80) | st.just(MAX_EXTENT)
    cuts = [tuple(data.draw(s) for s in (low, high, st.integers(1, 4))) for _ in sizes]
    begin, end, step = zip(*cuts, strict=True)
    before, after = (tuple(data.draw(st.integers(0, 4)) for _ in sizes) for _ in range(2))
    pads = [n for pair in zip(before[::-1], after[::-1], strict=True) for n in pair]
    x = torch.randint(-128, 128, (batch, *sizes), generator=torch.Generator().manual_seed(0))
    expected = x[(slice(None), *map(slice, begin, end, step))].float()
    assume(expected.numel())
    expected = nn.functional.pad(expected, pads)

    ops = (
        Quantize(scale=1.0, zero_point=0.0, bits=8), Slice(begin=begin, end=end, step=step),
        Pad(before=before, after=after, value=128), Dequantize(scale=1.0, zero_point=128),
    )  # fmt: skip
    values = [x.float()]
    for op in ops:
        values.append(op.run({}, values[-1]))
    assert torch.equal(values[-1], expected)
    nodes = tuple(Node(str(i), op, (i,)) for i, op in enumerate(ops))
    program = Program(Graph(1, (1, 1), False, nodes, len(nodes)), [{}] * len(nodes), values)
    assert torch.equal(program.run(values[0]), expected)
    assert [step.kernel for step in program.profile(values[0])] == [
        "quantize",
        "copy",
        "copy",
        "torch",
    ]


def test_extreme_images():
    packed = packed_network("resnet", Bits(4, 5))[1]
    x = images(4)
    x[0, 0, 0, 0], x[1, 0, 0, 0], x[2] = float("nan"), float("inf"), -1e30
    assert_same(packed, x)


def test_images_of_any_layout():
    packed = packed_network("resnet", Bits(4, 4))[1]
    whole = images(4, size=20)
    for x in (whole[::2, :, 1:17, 3:19], whole.transpose(2, 3), whole[:, :1].expand(4, 3, 20, 20)):
        packed(x)
        assert torch.equal(packed(x), packed.execute(x))


class FlatConv(nn.Module):
    """A convolution as classifier: the result is a view of what an integer node made."""

    def __init__(self):
        super().__init__()
        self.body, self.head = conv_bn(3, 16), nn.Conv2d(16, CLASSES, 1)

    def forward(self, x):
        return self.head(nn.functional.adaptive_avg_pool2d(self.body(x), 1)).flatten(1)


@pytest.mark.parametrize("network", [NETWORKS["resnet"], FlatConv])
def test_results_do_not_change_with_the_next_call(network):
    torch.manual_seed(0)
    packed = pack(quantized(randomize(network()), Bits(4, 4)), images(1))
    x = images(2)
    packed(x)
    first = packed(x)
    kept = first.clone()
    packed(-x)
    assert torch.equal(first, kept)


class Views(nn.Module):
    """Float nodes that return views of what integer nodes made, used much later."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        left, right = self.bn(self.first(x)).chunk(2, 1)
        for conv in self.convs:
            left = conv(left).relu()
        return self.head(torch.cat([left, right], 1).mean((2, 3)))


def test_views_keep_what_they_show():
    torch.manual_seed(0)
    qmodel = quantized(randomize(Views()), Bits(4, 4))
    packed = pack(qmodel, images(1))
    assert_same(packed, images(2))


def test_values_share_memory():
    packed = packed_network("resnet", Bits(4, 4))[1]
    packed(images(8))
    program = program_of(packed)
    made = [y.total if isinstance(y, tuple) else y for y in program._made if y is not None]
    assert program._arena.numel() < sum(y.numel() * y.element_size() for y in made) * 0.6


def test_few_programs_are_kept():
    packed = packed_network("resnet", Bits(4, 4))[1]
    for count in (1, 2, 3, 1):
        packed(images(count))
    assert [key[0][0] for key in packed._programs] == [3, 1]
    assert len(packed._programs) == _PROGRAMS


def test_copies_have_memory_of_their_own():
    packed = packed_network("resnet", Bits(4, 4))[1]
    x = images(2)
    packed(x)
    other = copy.deepcopy(packed)
    assert not other._programs
    assert torch.equal(other(x), packed(x))
    assert packed.to("cpu") is packed
    assert not packed._programs  # its tensors may have moved


def test_threads_of_the_user():
    packed = packed_network("resnet", Bits(4, 4))[1]
    inputs = [images(4, seed=seed) for seed in range(4)]
    expected = [packed.execute(x) for x in inputs]
    packed(inputs[0])
    wrong = []

    def work(k):
        for _ in range(20):
            if not torch.equal(packed(inputs[k]), expected[k]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_threads_with_images_of_many_shapes(monkeypatch):
    """What threads do to the programs that are kept, as often and as mixed as can be."""

    class Instant:
        lock = SimpleNamespace(acquire=lambda blocking: True, release=lambda: None)
        run = staticmethod(torch.clone)

    packed = packed_network("linear")[1]
    monkeypatch.setattr(type(packed), "_trace", lambda _, x: (Instant(), x))
    inputs = [images(count) for count in range(1, 9)]

    def work(first):
        for k in range(8000):
            packed(inputs[(first * k + k // 8) % 8])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(1, 9)))
    finally:
        sys.setswitchinterval(interval)
    assert 0 < len(packed._programs) <= _PROGRAMS


def test_a_program_that_runs_is_neither_used_nor_made_again(monkeypatch):
    packed = packed_network("resnet", Bits(4, 4))[1]
    x = images(2)
    expected = packed(x)
    monkeypatch.setattr(type(packed), "_trace", lambda *_: pytest.fail("made again"))
    run, within = Program.run, []

    def run_and_call(program, x):
        within.append(packed(x))  # as another thread might
        return run(program, x)

    monkeypatch.setattr(Program, "run", run_and_call)
    assert torch.equal(packed(x), expected)
    assert len(within) == 1
    assert torch.equal(within[0], expected)


def test_profile_names_what_ran():
    packed = packed_network("resnet", Bits(4, 4))[1]
    x = images(2)
    packed(x)
    steps = program_of(packed).profile(x)
    names = [step.node.name for step in steps]
    assert names == [n.name for n in packed.graph.nodes if n.name in set(names)]
    assert all(step.seconds >= 0 and step.kernel for step in steps)
    kernels = {step.kernel for step in steps}
    assert {"quantize", "sum_pool", "linear_s32"} <= kernels
    assert kernels & {"direct", "tiles"}


@pytest.mark.parametrize("words", [[99], [0, 1], [4] + [0] * 10, [6], ["a"], [1 << 70]])
def test_nonsense_is_refused(words):
    from fdda_fast.ops._library import _extension

    with pytest.raises((RuntimeError, TypeError, OverflowError)):
        _extension.program(words)


def test_missing_inputs_are_refused():
    from fdda_fast.deploy.program import _QUANTIZE
    from fdda_fast.ops._library import _extension

    program = _extension.program([_QUANTIZE, -1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 4])
    with pytest.raises(RuntimeError, match="inputs are missing"):
        _extension.run_program(program, [], False)
