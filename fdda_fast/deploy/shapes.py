"""Shapes of all values of a traced network, found by running it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ..graphs import describe, node_kind
from ..quantization.prepare import AVERAGE_POOLS, is_global_average_pool
from .translate import RESHAPES, Unsupported


class _Recorder(fx.Interpreter):
    """Runs a network and keeps the shape of every tensor and every value that is no tensor."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.constants: dict[fx.Node, Any] = {}

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if isinstance(result, torch.Tensor):
            self.shapes[node] = tuple(result.shape)
        elif not _holds_tensors(result):
            self.constants[node] = result
        return result


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return any(_holds_tensors(v) for v in value)
    return isinstance(value, torch.Tensor)


@torch.no_grad()
def annotate(graph_module: fx.GraphModule, example: torch.Tensor) -> bool:
    """Notes in every node's `meta` its `shape` or, for sizes and numbers, its `constant`.

    Args:
        example: one image [1, C, H, W].

    Returns:
        Whether the image's size is written into the graph somewhere.

    Raises:
        ValueError: the network cannot run on such images.
        Unsupported: a tensor whose first dimension is not the batch.
    """
    runs = []
    for batch in (2, 3):
        recorder = _Recorder(graph_module)
        try:
            recorder.run(example.repeat(batch, 1, 1, 1))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            reason = str(error).partition("\n")[0]  # where in the graph comes behind
            raise ValueError(
                f"the network cannot run on images of shape {tuple(example.shape[1:])}: {reason}"
            ) from error
        runs.append(recorder)
    first, second = runs
    for node, shape in first.shapes.items():
        node.meta["shape"] = shape
        if node.op != "get_attr" and (shape[:1], second.shapes[node][:1]) != ((2,), (3,)):
            raise Unsupported(
                f"{describe(graph_module, node)}: its first dimension is not the batch"
            )
    for node, constant in first.constants.items():
        node.meta["constant"] = constant
        node.meta["batch_dependent"] = constant != second.constants[node]
    return any(_fixes_size(graph_module, node) for node in graph_module.graph.nodes)


def _fixes_size(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    if "shape" not in node.meta or node.op in ("placeholder", "output", "get_attr"):
        return False
    if node_kind(graph_module, node) in RESHAPES:
        # To more than one dimension behind the batch, and of more than one pixel.
        before, after = node.args[0].meta["shape"], node.meta["shape"]
        return len(after) > 2 and math.prod(before[2:]) > 1
    if node_kind(graph_module, node) in AVERAGE_POOLS:
        return is_global_average_pool(graph_module, node)  # of this size
    return any("constant" in source.meta for source in node.all_input_nodes)
