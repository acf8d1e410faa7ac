"""torch.fx graphs: what their nodes compute, and how these are replaced."""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils._pytree import tree_leaves

RELUS = {nn.ReLU, F.relu, torch.relu, "relu"}
RELU6S = {nn.ReLU6, F.relu6}
HARDTANHS = {nn.Hardtanh, F.hardtanh}
CLAMPS = {torch.clamp, torch.clip, torch.clamp_min, "clamp", "clip", "clamp_min"}
ADDS = {operator.add, torch.add, "add"}
PADS = {nn.ZeroPad2d, nn.ConstantPad2d, F.pad}


def describe(graph_module: fx.GraphModule, node: fx.Node) -> str:
    """A node's name and kind, for messages."""
    kind = node_kind(graph_module, node)
    name = node.target if node.op == "call_module" else node.name
    return f"node {name!r} ({getattr(kind, '__name__', kind)})"


def node_kind(graph_module: fx.GraphModule, node: fx.Node) -> object:
    """What a node computes: a module's class, a function, or a method's name."""
    if node.op == "call_module":
        return type(graph_module.get_submodule(node.target))
    return node.target if node.op in ("call_function", "call_method") else node.op


def settings_of(graph_module: fx.GraphModule, node: fx.Node, *names: str) -> dict[str, Any]:
    """A module's attributes, or what a function is given behind its input, `names` in order.

    Sizes that are computed from tensors' are numbers where they are known, see `note_values`.
    """
    if node.op == "call_module":
        return vars(graph_module.get_submodule(node.target))
    given = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
    return fx.map_arg(given, lambda value: value.meta.get("constant", value))


def slices_of(node: fx.Node) -> tuple | None:
    """The index of a node that cuts slices out of a tensor, as x[:, :, ::2, ::2], else None."""
    index = node.args[1] if node.target is operator.getitem else None
    slices = isinstance(index, tuple) and all(isinstance(i, slice) or i is ... for i in index)
    return index if slices else None


def pads_with_zeros(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    if node_kind(graph_module, node) not in PADS:
        return False
    given = settings_of(graph_module, node, "pad", "mode", "value")
    return given.get("mode", "constant") == "constant" and not given.get("value")


def clip_of(graph_module: fx.GraphModule, node: fx.Node) -> tuple[float, float] | None:
    """(low, high) of a node that only clips, else None."""
    kind = node_kind(graph_module, node)
    if kind in RELUS:
        return 0.0, math.inf
    if kind in RELU6S:
        return 0.0, 6.0
    if kind in HARDTANHS:
        given = settings_of(graph_module, node, "min_val", "max_val")
        return float(given.get("min_val", -1)), float(given.get("max_val", 1))
    if kind in CLAMPS:
        given = settings_of(graph_module, node, "min", "max")
        low, high = (given.get(name) for name in ("min", "max"))
        low, high = -math.inf if low is None else low, math.inf if high is None else high
        if isinstance(low, int | float) and isinstance(high, int | float) and low <= high:
            return float(low), float(high)
    return None


def addends(graph_module: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors of one shape that a node adds, else None.

    The nodes must carry their shapes as `meta["shape"]`, see `note_shapes`.
    """
    if node_kind(graph_module, node) not in ADDS or len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    nodes = isinstance(a, fx.Node) and isinstance(b, fx.Node) and a is not b
    if not nodes or a.meta.get("shape") != b.meta.get("shape"):
        return None
    return a, b


@torch.no_grad()
def note_values(graph_module: fx.GraphModule, images: torch.Tensor) -> None:
    """Runs the network and notes in every node's `meta` what its value is.

    `shape` is that of a tensor, else None; `constant` is what is no tensor and holds none, as sizes
    and what is computed from them.
    """
    _Notes(graph_module).run(images)


def note_shapes(graph_module: fx.GraphModule, image_shape: tuple[int, int, int]) -> None:
    """`note_values` of one blank image."""
    note_values(graph_module, torch.zeros(1, *image_shape))


class _Notes(fx.Interpreter):
    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        node.meta["shape"] = tuple(result.shape) if isinstance(result, torch.Tensor) else None
        node.meta.pop("constant", None)
        if not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result)):
            node.meta["constant"] = result
        return result


class NormChain(NamedTuple):
    """BatchNorm2d -> [addition] -> [clip to 0 .. relu], where nobody else reads what is between.

    relu: True: to 0 and above; a number: to 0 .. that number; False: no clipping.
    """

    nodes: tuple[fx.Node, ...]
    addition: fx.Node | None
    relu: bool | float

    @property
    def norm(self) -> fx.Node:
        return self.nodes[0]

    @property
    def last(self) -> fx.Node:
        return self.nodes[-1]


def norm_chains(graph_module: fx.GraphModule) -> list[NormChain]:
    """The chain of every BatchNorm2d, in forward order. The nodes must carry their shapes.

    Of two that an addition joins the later one has it: the other's output exists by then.
    """
    nodes = list(graph_module.graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    norms = [n for n in nodes if node_kind(graph_module, n) is nn.BatchNorm2d]
    chains = []
    for norm in norms:
        chain, addition, relu = [norm], None, False
        user = only_user(norm)
        operands = addends(graph_module, user) if user is not None else None
        if operands is not None:
            other = operands[operands[0] is norm]
            later = other in norms and only_user(other) and order[other] > order[norm]
            if not later:
                chain.append(user)
                addition, user = user, only_user(user)
        clip = clip_of(graph_module, user) if user is not None else None
        if clip is not None and clip[0] == 0:
            chain.append(user)
            relu = True if clip[1] == math.inf else clip[1]
        chains.append(NormChain(tuple(chain), addition, relu))
    return chains


def only_user(node: fx.Node) -> fx.Node | None:
    """Who alone reads a node, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def fuse(graph_module: fx.GraphModule, chain: NormChain, name: str, module: nn.Module) -> None:
    """Puts `module`, called with the norm's input and the residual, in the place of a chain.

    Every residual comes before the chain's last node, where the module is called.
    """
    inputs = [chain.norm.args[0]]
    if chain.addition is not None:
        inputs += [a for a in chain.addition.args if a is not chain.norm]
    graph_module.add_submodule(name, module)
    with graph_module.graph.inserting_after(chain.last):
        new = graph_module.graph.call_module(name, tuple(inputs))
    chain.last.replace_all_uses_with(new)
    for node in reversed(chain.nodes):
        graph_module.graph.erase_node(node)
