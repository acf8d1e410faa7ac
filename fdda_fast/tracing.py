"""Traced networks: torch.fx graphs and what their nodes compute."""

from __future__ import annotations

import copy
import operator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

RELUS = {nn.ReLU, F.relu, torch.relu, torch.relu_, "relu", "relu_"}
RELU6S = {nn.ReLU6, F.relu6}
HARDTANHS = {nn.Hardtanh, F.hardtanh}
IN_PLACE_ADDS = {operator.iadd, "add_"}
ADDS = {operator.add, torch.add, "add", *IN_PLACE_ADDS}


def trace(model: nn.Module) -> fx.GraphModule:
    """A traced copy of `model` in eval mode; its activations do not work in place.

    Raises:
        ValueError: torch.fx cannot trace the model, or it takes more than one input.
    """
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, nn.ReLU | nn.ReLU6):
            module.inplace = False  # the tensor may be read by others, too
    try:
        graph_module = fx.symbolic_trace(model)
    except Exception as error:  # fx raises whatever the user's forward raises
        raise ValueError(
            f"torch.fx cannot trace {type(model).__name__}: {error}. Control flow that depends on "
            "tensor values must be removed or wrapped in a leaf module"
        ) from error
    inputs = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    if len(inputs) != 1:
        raise ValueError(
            f"the model must take exactly one image batch, but takes {len(inputs)} inputs: "
            f"{[n.name for n in inputs]}"
        )
    return graph_module


def node_kind(graph_module: fx.GraphModule, node: fx.Node) -> object:
    """What a node computes: a module's class, a function, or a method's name."""
    if node.op == "call_module":
        return type(graph_module.get_submodule(node.target))
    return node.target if node.op in ("call_function", "call_method") else node.op


def clip_of(graph_module: fx.GraphModule, node: fx.Node) -> tuple[float, float] | None:
    """(low, high) of a node that only clips, else None."""
    kind = node_kind(graph_module, node)
    if kind in RELUS:
        return 0.0, float("inf")
    if kind in RELU6S:
        return 0.0, 6.0
    if kind in HARDTANHS:
        given = (
            vars(graph_module.get_submodule(node.target))
            if node.op == "call_module"
            else dict(zip(("min_val", "max_val"), node.args[1:], strict=False)) | node.kwargs
        )
        return float(given.get("min_val", -1)), float(given.get("max_val", 1))
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
def note_shapes(graph_module: fx.GraphModule, image_shape: tuple[int, int, int]) -> None:
    """Runs the network on one blank image and notes every tensor's shape as `meta["shape"]`."""
    ShapeProp(graph_module).propagate(torch.zeros(1, *image_shape))
    for node in graph_module.graph.nodes:
        node.meta["shape"] = getattr(node.meta.get("tensor_meta"), "shape", None)


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
            # In place, the addition writes to its first operand, which others may read.
            in_place = user.target in IN_PLACE_ADDS and other is operands[0]
            visible = in_place and not only_user(other)
            if not (later or visible):
                chain.append(user)
                addition, user = user, only_user(user)
        clip = clip_of(graph_module, user) if user is not None else None
        if clip is not None and clip[0] == 0:
            chain.append(user)
            relu = True if clip[1] == float("inf") else clip[1]
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
