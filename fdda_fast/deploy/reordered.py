"""Packed layers on a GPU: their weights are brought into the kernels' order once a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from .. import ops
from .integer import PackedConv2d, PackedLinear
from .schema import Op, ValueType


def reordered_runner(
    op: Op, tensors: dict[str, torch.Tensor], inputs: Sequence[ValueType]
) -> Callable[..., Any]:
    """What runs the operation on values of the types `inputs`, with its own tensors bound.

    Layers that have no kernel on reordered weights keep them as they are in the file: convolutions
    of several groups but depthwise ones, and linear layers that read sums.
    """
    run = partial(op.run, tensors)
    if isinstance(op, PackedConv2d):
        depthwise = op.groups == op.in_channels == op.out_channels and op.groups > 1
        if op.groups > 1 and not depthwise:
            return run
        operator = ops.reordered_conv2d
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
