"""Units of reconstruction: parts of a network between which one tensor alone is alive."""

from __future__ import annotations

import operator
from typing import NamedTuple

from torch import fx

from .modules import QuantConv2d, QuantLinear
from .prepare import reader_of


class Unit(NamedTuple):
    """A part of the network that one tensor enters and one leaves.

    Both are named by the nodes of the traced network, before their quantisers: these belong to the
    unit that reads the tensor.

    layers: the quantised ones that no earlier unit has, in forward order.
    """

    entry: str
    exit: str
    layers: tuple[str, ...]


def find_units(graph_module: fx.GraphModule, student: fx.GraphModule) -> list[Unit]:
    """Splits a network at tensors that are alone alive, the last ones before a layer's quantiser.

    That makes a unit of every residual block and of every layer outside of such, whatever the
    network's modules are called (blocks as in BRECQ, Li et al., ICLR 2021, section 3.2).

    Args:
        graph_module: the network that `student` was prepared from, traced; its nodes must carry
            their shapes, see `fdda_fast.graphs.note_shapes`.
        student: from `prepare`.

    Returns:
        Units in forward order, from the image to the logits; each has a quantised layer.
    """
    modules = dict(student.named_modules())
    nodes = list(graph_module.graph.nodes)
    layers = {
        at: node
        for at, node in enumerate(nodes)
        if node.op == "call_module" and isinstance(modules[node.target], QuantConv2d | QuantLinear)
    }
    alone = _alone_alive(nodes)
    made = [nodes.index(reader_of(graph_module, n).producer) for n in layers.values()]
    bounds = sorted({max(at for at in alone if at <= producer) for producer in made})
    image = next(node for node in nodes if node.op == "placeholder")
    units: list[Unit] = []
    entry, known = image.name, set[str]()
    for at in [*bounds, len(nodes) - 1]:
        own = [n.target for i, n in layers.items() if i <= at and n.target not in known]
        last = at == len(nodes) - 1
        if last or (own and max(layers) > at):
            end = nodes[at].args[0] if last else nodes[at]
            units.append(Unit(entry, end.name, tuple(dict.fromkeys(own))))
            known.update(own)
            entry = end.name
    if not units[-1].layers:  # all of them used before, nothing of its own to learn
        last = units.pop()
        units[-1] = units[-1]._replace(exit=last.exit)
    return units


def part_of(graph_module: fx.GraphModule, entry: str, exit: str) -> fx.GraphModule:
    """What a network computes of one node's value on the way to another's.

    Args:
        graph_module: traced, `prepare`d or not; modules and parameters stay shared with it.
        entry, exit: names of nodes, of a `Unit` or of the first and the last of several.

    Returns:
        A GraphModule in eval mode that takes one tensor and returns one.
    """
    named = {node.name: node for node in graph_module.graph.nodes}
    needed: set[fx.Node] = set()
    found = [named[exit]]
    while found:
        node = found.pop()
        if node.name != entry and node not in needed:
            needed.add(node)
            if not _is_batch_size(node):
                found += node.all_input_nodes
    graph = fx.Graph()
    x = graph.placeholder("x")
    copies = {named[entry]: x}
    for node in graph_module.graph.nodes:
        if node in needed and _is_batch_size(node):
            copies[node] = graph.call_method("size", (x, 0))
        elif node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[named[exit]])
    return fx.GraphModule(graph_module, graph).eval()


def _alone_alive(nodes: list[fx.Node]) -> list[int]:
    """Where the tensors are behind which nothing that was computed before them is read."""
    order = {node: i for i, node in enumerate(nodes)}
    alone, last_read = [], 0
    for at, node in enumerate(nodes):
        if node.op == "get_attr" or _is_batch_size(node):  # the same wherever it is read
            continue
        if last_read <= at and node.meta["shape"] is not None:
            alone.append(at)
        readers = (user for user in node.users if not _tells_batch_size(user))
        last_read = max([last_read, *(order[user] for user in readers)])
    return alone


def _is_batch_size(node: fx.Node) -> bool:
    """Whether it is x.size(0) or x.shape[0] of a tensor, as in x.view(x.size(0), -1)."""
    if node.target == "size":
        return node.args[1:] == (0,) or node.kwargs == {"dim": 0}
    return node.target is operator.getitem and node.args[1] == 0 and _is_shape(node.args[0])


def _tells_batch_size(node: fx.Node) -> bool:
    return _is_batch_size(node) or (_is_shape(node) and all(map(_is_batch_size, node.users)))


def _is_shape(node: fx.Node) -> bool:
    """Whether it is x.size() or x.shape."""
    if node.target == "size":
        return len(node.args) == 1 and not node.kwargs
    return node.target is getattr and node.args[1] == "shape"
