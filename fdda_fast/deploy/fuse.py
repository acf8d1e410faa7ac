"""Which torch.fx nodes become one packed layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from ..graphs import addends, clip_of, node_kind
from ..quantization.modules import ActivationQuantizer, QuantConv2d, QuantLinear
from .graph import unique_name
from .shapes import annotate
from .translate import remove_bypassed

LAYERS = (QuantConv2d, QuantLinear)
NORMS = (nn.BatchNorm2d, nn.BatchNorm1d)


@dataclass(frozen=True)
class Group:
    """layer -> [norm] -> [+ residual] -> [clip -> quantizer | quantizer]."""

    layer: fx.Node
    norm: fx.Node | None = None
    residual: fx.Node | None = None
    clip: tuple[float, float] | None = None
    quantizer: fx.Node | None = None
    inner: tuple[fx.Node, ...] = ()
    """All its nodes but the last."""


def find_groups(graph_module: fx.GraphModule) -> dict[fx.Node, Group]:
    """Groups by their last node. Every quantised layer is in exactly one.

    Going backwards, so that the longest chain wins, and of two layers that an addition joins the
    later one takes it: then the other's output exists already.
    """
    groups: dict[fx.Node, Group] = {}
    taken: set[fx.Node] = set()
    nodes = list(graph_module.graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    for node in reversed(nodes):
        if node in taken:
            continue
        group = _match(graph_module, node, taken, order)
        if group is not None:
            groups[node] = group
            taken.update(group.inner)
    return groups


def layer_groups(student: fx.GraphModule, image: torch.Tensor) -> dict[str, tuple[fx.Node, Group]]:
    """The layers that `pack` makes of a student, by their names there and in its order.

    Args:
        student: from `prepare`; not changed.
        image: float32 [1, C, H, W].

    Returns:
        Name, see `layer_names` -> its last node, its group; nodes of a copy, with the names that
        they have in `student`.
    """
    student = copy.deepcopy(student)
    annotate(student, image)
    remove_bypassed(student)
    groups = find_groups(student)
    return {name: (last, groups[last]) for last, name in layer_names(student, groups).items()}


def layer_names(
    graph_module: fx.GraphModule, groups: Mapping[fx.Node, Group]
) -> dict[fx.Node, str]:
    """Last nodes, in forward order -> names: of the module, from its second call on as `name:1`."""
    names: dict[fx.Node, str] = {}
    for last in graph_module.graph.nodes:
        if last in groups:
            names[last] = unique_name(groups[last].layer.target, names.values())
    return names


def _match(
    graph_module: fx.GraphModule, last: fx.Node, taken: set[fx.Node], order: dict[fx.Node, int]
) -> Group | None:
    node, inner = last, []
    quantizer = clip = None

    def step_to(source: fx.Node) -> bool:
        """Whether `source` may be swallowed: nobody else reads it."""
        if len(source.users) > 1 or source in taken:
            return False
        inner.append(source)
        return True

    if node_kind(graph_module, node) is ActivationQuantizer:
        quantizer, node = node, node.args[0]
        if not step_to(node):
            return None
        clip = clip_of(graph_module, node)
        if clip is not None:
            node = node.args[0]
            if not step_to(node):
                return None

    operands = addends(graph_module, node)
    if operands is None:
        chain = _layer_and_norm(graph_module, node)
        if chain is None:
            return None
        layer, norm = chain
        inner += [n for n in (layer, norm) if n is not None and n is not node]
        return Group(layer, norm, None, clip, quantizer, tuple(inner))

    branches = sorted((operands, operands[::-1]), key=lambda pair: -order[pair[0]])
    for branch, other in branches:
        chain = None if branch in taken else _layer_and_norm(graph_module, branch)
        if chain is not None and len(branch.users) == 1:
            layer, norm = chain
            inner += [n for n in (layer, norm) if n is not None]
            return Group(layer, norm, other, clip, quantizer, tuple(inner))
    return None


def _layer_and_norm(
    graph_module: fx.GraphModule, node: fx.Node
) -> tuple[fx.Node, fx.Node | None] | None:
    """The layer whose output, normalised or not, is `node`."""
    norm = None
    if node_kind(graph_module, node) in NORMS:
        norm, node = node, node.args[0]
        if len(node.users) > 1:
            return None
        if graph_module.get_submodule(norm.target).running_mean is None:
            return None
    return (node, norm) if node_kind(graph_module, node) in LAYERS else None
