"""A packed graph for images of one shape, as instructions that run without the framework between.

Integer nodes that follow one another become a segment, which the extension runs as a whole
(csrc/program.h); the float nodes between segments run as they are. What integer nodes make lives
in one arena: values whose lives do not meet share memory, and a call allocates only its result.
"""

from __future__ import annotations

import math
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch

from ..ops import _library
from .graph import Graph, Node
from .integer import (
    MaxPool2d,
    PackedCodes,
    PackedConv2d,
    PackedLinear,
    Pad,
    Quantize,
    Requantize,
    Slice,
    SumPool,
    Sums,
    to_nchw,
    to_nhwc,
)

_ALIGNMENT = 64
# As in program.cpp.
_QUANTIZE, _REQUANTIZE, _MAX_POOL, _SUM_POOL, _CONV, _LINEAR_SUMS, _PAIR, _EACH_IMAGE, _COPY = (
    range(9)
)

_LARGE = 2**20  # bytes of an image's float outputs that do not stay in cache for their reader
_STEP = 2**16  # bytes moved in the time that an instruction takes before it computes anything

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Step:
    """One node of a timed run.

    Args:
        node: it.
        kernel: what ran: the extension's kernel, `torch` for float nodes.
        seconds: it took.
        macs: multiply-accumulates.
        bytes: of its inputs, its tensors and its output, each once.
    """

    node: Node
    kernel: str
    seconds: float
    macs: int
    bytes: int


@dataclass(frozen=True)
class _Segment:
    start: int  # of its nodes
    capsule: object
    inputs: tuple[tuple[int, str], ...]  # values from elsewhere, and how their memory is read


class Program:
    """Made by one run of the graph, from which it takes shapes and strides.

    One thread at a time may run it, see `lock`.

    Args:
        graph: what to compute.
        bound: every node's tensors, as its operation reads them.
        values: the image and what every node made of it.
    """

    def __init__(self, graph: Graph, bound: Sequence[Tensors], values: Sequence[Any]) -> None:
        self.lock = threading.Lock()
        self._graph = graph
        self._bound = bound
        self._values = [_example(value) for value in values]
        native = [
            _is_native(node.op, [values[i] for i in node.inputs], bound[n])
            for n, node in enumerate(graph.nodes)
        ]
        self._image_nodes = _image_nodes(graph, self._values, native)
        self._layout = [
            value[:1] if i < self._image_nodes else value for i, value in enumerate(self._values)
        ]
        self._arena, self._made = self._plan(native)
        self._kept: list[torch.Tensor] = []  # what instructions point to
        self._parts: list[_Segment | int] = []
        start = 0
        while start < len(native):
            end = start
            while end < len(native) and native[end]:
                end += 1
            if end > start:
                self._parts.append(self._segment(start, end))
                start = end
            else:
                self._parts.append(start)
                start += 1

    def run(self, images: torch.Tensor) -> torch.Tensor:
        """Float logits of images like those of the first run; the caller holds `lock`."""
        return self._run(images, None)

    def profile(self, images: torch.Tensor) -> list[Step]:
        """`run`, taking the time of every node."""
        steps: list[Step] = []
        self._run(images, steps)
        return steps

    def _run(self, images: torch.Tensor, steps: list[Step] | None) -> torch.Tensor:
        values: list[Any] = [images, *self._made[1:]]
        for part in self._parts:
            if isinstance(part, int):
                node = self._graph.nodes[part]
                inputs = [values[i] for i in node.inputs]
                begin = time.perf_counter()
                values[part + 1] = node.op.run(self._bound[part], *inputs)
                if steps is not None:
                    steps.append(self._step(part, "torch", time.perf_counter() - begin))
                continue
            memory = [self._memory(values[i], i, layout) for i, layout in part.inputs]
            times = _library._extension.run_program(
                part.capsule, [m.data_ptr() for m in memory], steps is not None
            )
            if steps is not None:
                steps += [self._step(part.start + k, *taken) for k, taken in enumerate(times)]
        output = values[self._graph.output]
        # The next call overwrites the arena, of which a float node's result may be a view.
        in_arena = output.untyped_storage().data_ptr() == self._arena.untyped_storage().data_ptr()
        return output.clone() if in_arena else output

    def _step(self, n: int, kernel: str, seconds: float) -> Step:
        node = self._graph.nodes[n]
        read = sum(_bytes(self._values[i]) for i in node.inputs)
        moved = read + sum(map(_bytes, self._bound[n].values())) + _bytes(self._values[n + 1])
        macs = node.op.macs(logical_shape(self._values[n + 1]))
        return Step(node, kernel, seconds, macs, moved)

    def _memory(self, value: torch.Tensor, index: int, layout: str) -> torch.Tensor:
        if layout == "nhwc":
            return to_nhwc(value).contiguous()
        if layout == "dense":
            return value.contiguous()
        example = self._values[index]
        if value.stride() == example.stride():
            return value
        return torch.empty_strided(example.shape, example.stride(), dtype=value.dtype).copy_(value)

    def _plan(self, native: Sequence[bool]) -> tuple[torch.Tensor, list[Any]]:
        """The arena, and by value what of it the value is, None for those of other nodes."""
        nodes = self._graph.nodes
        starts = list(range(-1, len(nodes)))
        starts[self._image_nodes] = min(0, starts[self._image_nodes])  # of all images, one by one
        ends = list(range(-1, len(nodes)))
        ends[self._graph.output] = len(nodes)
        for n in reversed(range(len(nodes))):
            # What another node makes may be a view of what it read; a pair's nodes take turns.
            end = n + self._adds_up(n) if native[n] else ends[n + 1]
            for i in nodes[n].inputs:
                ends[i] = max(ends[i], end)
        sizes = {
            n + 1: -(-_bytes(self._layout[n + 1]) // _ALIGNMENT) * _ALIGNMENT
            for n in range(len(nodes))
            if native[n]
        }
        places: dict[int, int] = {}
        for value in sorted(sizes, key=sizes.__getitem__, reverse=True):
            met = sorted(
                (places[v], places[v] + sizes[v])
                for v in places
                if starts[v] <= ends[value] and starts[value] <= ends[v]
            )
            place = 0
            for begin, end in met:
                if place + sizes[value] <= begin:
                    break
                place = max(place, end)
            places[value] = place
        arena = torch.empty(
            max((places[v] + sizes[v] for v in places), default=0) + _ALIGNMENT, dtype=torch.uint8
        )
        arena = arena[-arena.data_ptr() % _ALIGNMENT :]
        made: list[Any] = [None] * (len(nodes) + 1)
        for value, place in places.items():
            made[value] = _view(arena[place:], self._layout[value])
        return arena, made

    def _adds_up(self, n: int) -> bool:
        """Whether the next node alone adds the many float outputs of this one to its own."""
        if n + 1 == len(self._graph.nodes):
            return False
        node, reader = self._graph.nodes[n], self._graph.nodes[n + 1]
        users = sum(node.inputs.count(n + 1) for node in self._graph.nodes)
        if reader.inputs[1:] != (n + 1,) or users > 1 or self._graph.output == n + 1:
            return False
        output = self._values[n + 1]
        return (
            all(
                isinstance(op, PackedConv2d) and op.kernel_size == (1, 1) and op.padding == (0, 0)
                for op in (node.op, reader.op)
            )
            and output.dtype == torch.float32
            and output.numel() * 4 >= _LARGE * len(output)
        )

    def _segment(self, start: int, end: int) -> _Segment:
        inputs: dict[tuple[int, str], int] = {}

        def address(value: int, layout: str) -> int:
            made = self._made[value]
            if made is not None:
                return _tensor(made).data_ptr()
            return -1 - inputs.setdefault((value, layout), len(inputs))

        words: list[int] = []
        if start < self._image_nodes:
            words += [_EACH_IMAGE, len(self._values[0]), self._image_nodes]
        for n in range(start, end):
            node = self._graph.nodes[n]
            if self._adds_up(n):
                words.append(_PAIR)
            sources = _Sources(node.inputs, [self._layout[i] for i in node.inputs], address)
            made = self._made[n + 1]
            if n + 1 == self._image_nodes:
                made = made[:1]
            words += _encode(node.op, self._bound[n], sources, made, self._kept)
        return _Segment(start, _library._extension.program(words), tuple(inputs))


@dataclass(frozen=True)
class _Sources:
    """Inputs of a node: examples of them, and where they will be."""

    indices: tuple[int, ...]
    examples: list[Any]
    _address: Any

    def address(self, k: int, layout: str) -> int:
        return self._address(self.indices[k], layout)


def _example(value: Any) -> Any:
    """The value's shape, strides and dtype without its data."""
    if isinstance(value, Sums):
        return Sums(_example(value.total), value.count)
    if isinstance(value, tuple):
        return tuple(map(_example, value))
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _tensor(value: Any) -> torch.Tensor:
    return value.total if isinstance(value, Sums) else value


def _bytes(value: Any) -> int:
    if isinstance(value, tuple) and not isinstance(value, Sums):
        return sum(map(_bytes, value))
    return _tensor(value).numel() * _tensor(value).element_size()


def logical_shape(value: Any) -> tuple[int, ...]:
    """[N, C, ...], of the first of several tensors."""
    if isinstance(value, Sums):
        return tuple(value.total.shape)
    if isinstance(value, PackedCodes):
        batch, height, width, channels = value.shape
        return batch, channels, height, width
    if isinstance(value, tuple):
        return logical_shape(value[0])
    return tuple(to_nchw(value).shape if value.dtype == torch.uint8 else value.shape)


def _view(memory: torch.Tensor, example: Any) -> Any:
    """The example's tensor in memory: codes and sums dense, float images NHWC."""
    if isinstance(example, Sums):
        return Sums(_view(memory, example.total), example.count)
    floats = example.dtype == torch.float32
    shape = to_nhwc(example).shape if floats else example.shape
    dense = memory[: _bytes(example)].view(example.dtype).view(shape)
    return to_nchw(dense) if floats else dense


def _image_nodes(graph: Graph, values: Sequence[Any], native: Sequence[bool]) -> int:
    """How many nodes, from the first on, to run image by image.

    Where activations outweigh weights, one image's stay in cache between the nodes and those of a
    batch do not. All that the other nodes read of these must be the codes that the last one makes.
    """
    if len(values[0]) < 2:
        return 0
    last_read = [0] * len(values)
    for n, node in enumerate(graph.nodes):
        for i in node.inputs:
            last_read[i] = n
    last_read[graph.output] = len(graph.nodes)
    best, best_gain, gain, read_until = 0, 0, 0, 0
    for n, node in enumerate(graph.nodes):
        first = isinstance(node.op, Quantize) and 0 in node.inputs and values[0].ndim == 4
        kinds = Quantize | Requantize | MaxPool2d | Slice | Pad | PackedConv2d
        if not native[n] or not isinstance(node.op, kinds) or first != (n == 0):
            break
        moved = sum(_bytes(values[i]) for i in (*node.inputs, n + 1)) // len(values[0])
        gain += moved - _STEP * torch.get_num_threads()
        convolution = isinstance(node.op, PackedConv2d)
        if convolution:
            gain -= math.prod(node.op.rows_and_depth())
        read_until = max(read_until, last_read[n])
        codes = convolution and node.op.output_bits is not None
        if codes and read_until <= n and gain > best_gain:
            best, best_gain = n + 1, gain
    return best


def _is_native(op: Any, inputs: Sequence[Any], bound: Tensors) -> bool:
    """Whether the extension has an instruction for it, on these inputs."""
    if any(t.numel() == 0 for t in map(_tensor, inputs) if isinstance(t, torch.Tensor)):
        return False
    if isinstance(op, Quantize):
        return inputs[0].ndim in (2, 4)
    if isinstance(op, MaxPool2d | Slice | Pad):
        return inputs[0].dtype == torch.uint8 and inputs[0].ndim in (2, 4)
    return isinstance(op, Requantize | SumPool | PackedConv2d | PackedLinear)


def _float(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


@singledispatch
def _encode(op: Any, bound: Tensors, x: _Sources, y: Any, kept: list[torch.Tensor]) -> list[int]:
    """An instruction in the order in which program.cpp decodes it."""
    raise NotImplementedError(type(op).__name__)


@_encode.register
def _(op: Quantize, bound: Tensors, x: _Sources, y: Any, kept: list[torch.Tensor]) -> list[int]:
    example = x.examples[0]
    size, stride = (*example.shape, 1, 1)[:4], (*example.stride(), 0, 0)[:4]
    numbers = (_float(op.scale), _float(op.zero_point), op.bits)
    return [_QUANTIZE, x.address(0, "strided"), y.data_ptr(), *size, *stride, *numbers]


@_encode.register
def _(op: Requantize, bound: Tensors, x: _Sources, y: Any, kept: list[torch.Tensor]) -> list[int]:
    numbers = map(_float, (op.x_scale, op.x_zero_point, op.scale, op.zero_point))
    return [_REQUANTIZE, x.address(0, "dense"), y.data_ptr(), y.numel(), *numbers, op.bits]


@_encode.register
def _(op: MaxPool2d, bound: Tensors, x: _Sources, y: Any, kept: list[torch.Tensor]) -> list[int]:
    geometry = (*op.kernel_size, *op.stride, *op.padding, *op.dilation)
    shapes = (*x.examples[0].shape, *y.shape[1:3])
    return [_MAX_POOL, x.address(0, "dense"), y.data_ptr(), *shapes, *geometry]


@_encode.register
def _(op: Slice, bound: Tensors, x: _Sources, y: Any, kept: list[torch.Tensor]) -> list[int]:
    sizes = to_nchw(x.examples[0]).shape[1:]
    cuts = map(slice, op.begin, op.end, op.step)
    starts, _, steps = zip(*(s.indices(n) for s, n in zip(cuts, sizes, strict=True)), strict=True)
    return _copy(x, y, starts, steps, 0)


@_encode.register
def _(op: Pad, bound: Tensors, x: _Sources, y: Any, kept: list[torch.Tensor]) -> list[int]:
    return _copy(x, y, [-n for n in op.before], [1] * len(op.before), int(op.value))


def _copy(
    x: _Sources, y: torch.Tensor, starts: Sequence[int], steps: Sequence[int], value: int
) -> list[int]:
    """Of (channels, height, width), or of channels alone, to lines, pixels and channels."""
    axes = list(
        zip(to_nchw(x.examples[0]).shape[1:], to_nchw(y).shape[1:], starts, steps, strict=True)
    )
    channels, *places = axes
    lines, pixels = places or [(1, 1, 0, 1)] * 2
    size, out_size, start, step = channels
    if (size, start, step) == (out_size, 0, 1) and pixels[3] == 1:  # whole lines at once
        channels, pixels = (*(size * n for n in pixels[:3]), 1), (1, 1, 0, 1)
    numbers = (*lines, *pixels, *channels, value)
    return [_COPY, x.address(0, "dense"), y.data_ptr(), len(y), *numbers]


@_encode.register
def _(op: SumPool, bound: Tensors, x: _Sources, y: Any, kept: list[torch.Tensor]) -> list[int]:
    batch, height, width, channels = x.examples[0].shape
    return [_SUM_POOL, x.address(0, "dense"), y.total.data_ptr(), batch, height * width, channels]


@_encode.register
def _(op: PackedConv2d, bound: Tensors, x: _Sources, y: Any, kept: list[torch.Tensor]) -> list[int]:
    out_size = y.shape[1:3] if y.dtype == torch.uint8 else y.shape[2:]
    return _conv(
        op,
        bound,
        x,
        y,
        kept,
        (*x.examples[0].shape, op.out_channels, *out_size),
        (*op.kernel_size, *op.stride, *op.padding, *op.dilation, op.groups),
    )


@_encode.register
def _(op: PackedLinear, bound: Tensors, x: _Sources, y: Any, kept: list[torch.Tensor]) -> list[int]:
    if not isinstance(x.examples[0], Sums):
        sizes = (x.examples[0].shape[0], 1, 1, op.in_features, op.out_features, 1, 1)
        return _conv(op, bound, x, y, kept, sizes, (1, 1, 1, 1, 0, 0, 1, 1, 1))
    total, count = x.examples[0]
    offsets = _keep(kept, bound["weight_offset"])
    return [
        *(_LINEAR_SUMS, x.address(0, "dense"), _keep(kept, bound["weight"]), offsets),
        *(total.shape[0], op.in_features, op.out_features),
        *(op.weight_bits, op.x_zero_point * count),
        *_epilogue(op, bound, x, y, kept, count),
    ]


def _conv(
    op: PackedConv2d | PackedLinear,
    bound: Tensors,
    x: _Sources,
    y: torch.Tensor,
    kept: list[torch.Tensor],
    sizes: tuple[int, ...],
    geometry: tuple[int, ...],
) -> list[int]:
    half = 2 ** (op.weight_bits - 1)
    offsets = bound["weight_offset"]
    fits = bool(((offsets - half >= -128) & (offsets + half <= 128)).all())
    return [
        *(_CONV, x.address(0, "dense"), _keep(kept, bound["weight"]), _keep(kept, offsets)),
        *sizes,
        *geometry,
        *(op.weight_bits, op.x_zero_point, int(fits)),
        *_epilogue(op, bound, x, y, kept, 1),
    ]


def _epilogue(
    op: PackedConv2d | PackedLinear,
    bound: Tensors,
    x: _Sources,
    y: torch.Tensor,
    kept: list[torch.Tensor],
    count: int,
) -> list[int]:
    residual = [0, 0]
    if len(x.examples) > 1:
        codes = x.examples[1].dtype == torch.uint8
        residual[0 if codes else 1] = x.address(1, "dense" if codes else "nhwc")
    codes = y.dtype == torch.uint8
    low, high = op.output_range or (0, 0)
    return [
        _keep(kept, bound["multiplier"] / count),
        _keep(kept, bound["bias"]),
        *residual,
        _float(op.residual_scale or 0.0),
        *((y.data_ptr(), 0) if codes else (0, y.data_ptr())),
        _float(low),
        _float(high),
    ]


def _keep(kept: list[torch.Tensor], tensor: torch.Tensor) -> int:
    """Its address, as long as `kept` lives."""
    kept.append(tensor.contiguous())
    return kept[-1].data_ptr()
