"""Packed layers on a GPU: their weights are brought into the kernels' order once a model, and codes
of 4 bits lie two to a byte wherever the kernels on both sides know how.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from .. import ops
from .graph import Graph
from .integer import PackedCodes, PackedConv2d, PackedLinear, Requantize
from .schema import Op, ValueType

_BITS = 4  # of codes and weights that share a byte
_CHANNELS = ops.reference.PACKED_CHANNELS


def packed_values(graph: Graph) -> set[int]:
    """Indices of the values that are stored as `PackedCodes`.

    All that can be, as no layer moves more bytes by it (`gpu_report.Layer`). They are made by a
    convolution of one group or by `Requantize`, and read by such convolutions with weights of up to
    4 bits only, not as a residual.
    """
    types = graph.types()
    readers: dict[int, list[tuple[Op, int]]] = {}
    for node in graph.nodes:
        for position, source in enumerate(node.inputs):
            readers.setdefault(source, []).append((node.op, position))
    return {
        value
        for value, node in enumerate(graph.nodes, 1)
        if (isinstance(node.op, Requantize) or _is_dense(node.op))
        and types[value].kind == "codes"
        and types[value].bits <= _BITS
        and value in readers
        and all(position == 0 and _reads_packed(op) for op, position in readers[value])
    }


def _is_dense(op: Op) -> bool:
    return isinstance(op, PackedConv2d) and op.groups == 1


def _reads_packed(op: Op) -> bool:
    return (
        _is_dense(op)
        and op.weight_bits <= _BITS
        and op.in_channels % _CHANNELS == 0
        and op.x_zero_point < 2**_BITS
    )


def reordered_runners(
    graph: Graph, bound: Sequence[dict[str, torch.Tensor]]
) -> list[Callable[..., Any]]:
    """What runs each node on its inputs, given its own tensors.

    Layers that have no kernel on reordered weights keep them as they are in the file: convolutions
    of several groups but depthwise ones, and linear layers that read sums.
    """
    types, packed = graph.types(), packed_values(graph)
    return [
        _runner(node.op, tensors, [types[i] for i in node.inputs], value in packed)
        for value, (node, tensors) in enumerate(zip(graph.nodes, bound, strict=True), 1)
    ]


def _runner(
    op: Op, tensors: dict[str, torch.Tensor], inputs: Sequence[ValueType], out_packed: bool
) -> Callable[..., Any]:
    run = partial(op.run, tensors)
    if isinstance(op, Requantize) and out_packed:
        return partial(op.run, tensors, operator=_requantize_packed)
    if isinstance(op, PackedConv2d):
        depthwise = op.groups == op.in_channels == op.out_channels and op.groups > 1
        if op.groups > 1 and not depthwise:
            return run
        operator = partial(_conv2d, out_packed=out_packed)
    elif isinstance(op, PackedLinear) and inputs[0].kind == "codes":
        depthwise, operator = False, ops.reordered_linear
    else:
        return run
    weight = ops.reorder_weight(tensors["weight"], op.weight_bits, *op.rows_and_depth(), depthwise)
    return partial(
        op.run,
        {**tensors, "weight": weight},
        operator=partial(operator, x_bits=inputs[0].bits),
    )


def _requantize_packed(*arguments: Any) -> PackedCodes:
    return PackedCodes(ops.requantize_codes_packed(*arguments))


def _conv2d(x: torch.Tensor | PackedCodes, *arguments: Any, x_bits: int, out_packed: bool) -> Any:
    x_packed = isinstance(x, PackedCodes)
    y = ops.reordered_conv2d(
        x.data if x_packed else x,
        *arguments,
        x_bits=x_bits,
        x_packed=x_packed,
        out_packed=out_packed,
    )
    return PackedCodes(y) if out_packed else y
