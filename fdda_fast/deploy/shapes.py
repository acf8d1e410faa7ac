"""Shapes of all values of a traced network, found by running it."""

from __future__ import annotations

import math

import torch
from torch import fx

from ..graphs import describe, node_kind, note_values
from ..quantization.prepare import AVERAGE_POOLS, is_global_average_pool
from .translate import RESHAPES, Unsupported


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
    metas: list[dict] = []
    for batch in (2, 3):
        metas = [dict(node.meta) for node in graph_module.graph.nodes]  # at last those of two
        try:
            note_values(graph_module, example.repeat(batch, 1, 1, 1))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            reason = str(error).partition("\n")[0]  # where in the graph comes behind
            raise ValueError(
                f"the network cannot run on images of shape {tuple(example.shape[1:])}: {reason}"
            ) from error
    for node, of_two in zip(graph_module.graph.nodes, metas, strict=True):
        if node.meta["shape"] is not None:
            first = of_two["shape"][:1], node.meta["shape"][:1]
            if node.op != "get_attr" and first != ((2,), (3,)):
                raise Unsupported(
                    f"{describe(graph_module, node)}: its first dimension is not the batch"
                )
        elif "constant" in node.meta:
            node.meta["batch_dependent"] = node.meta["constant"] != of_two["constant"]
    return any(_fixes_size(graph_module, node) for node in graph_module.graph.nodes)


def _fixes_size(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    if node.meta["shape"] is None or node.op in ("placeholder", "output", "get_attr"):
        return False
    if node_kind(graph_module, node) in RESHAPES:
        # To more than one dimension behind the batch, and of more than one pixel.
        before, after = node.args[0].meta["shape"], node.meta["shape"]
        return len(after) > 2 and math.prod(before[2:]) > 1
    if node_kind(graph_module, node) in AVERAGE_POOLS:
        return is_global_average_pool(graph_module, node)  # of this size
    return any("constant" in source.meta for source in node.all_input_nodes)
