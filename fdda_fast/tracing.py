"""Tracing: from a network to a torch.fx graph in which nothing works in place."""

from __future__ import annotations

import copy
import inspect
import operator
from functools import partialmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .graphs import describe, node_kind

# What returns its input itself in eval mode, and, by name, what may return some of its memory.
_SAME = {nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d}
_SPLITS = {"chunk", "split", "tensor_split", "unbind"}  # into pieces that share nothing
_VIEWS = _SPLITS | {
    "Flatten", "Unflatten", "flatten", "unflatten", "view", "view_as", "reshape", "reshape_as",
    "ravel", "squeeze", "unsqueeze", "getitem", "narrow", "select", "diagonal", "as_strided",
    "unfold", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "t", "T", "mT",
    "expand", "expand_as", "broadcast_to", "contiguous", "to", "type", "type_as", "float", "data",
    "detach", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "stochastic_depth",
}  # fmt: skip
_SIZES = {"size", "shape", "dim", "ndim", "numel", "dtype", "device"}
_AUGMENTED = {
    getattr(operator, f"i{name.rstrip('_')}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_")
}
_NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim"}  # torch's functions take both


class _Proxy(fx.Proxy):
    """Tells `x += y` from `x = x + y`: x may have another name, or be a view."""

    def _augment(self, target: Any, other: Any) -> fx.Proxy:
        name = _AUGMENTED[target].__name__
        return self.tracer.create_proxy("call_function", target, (self, other), {}, name)


for _target in _AUGMENTED:
    setattr(_Proxy, f"__{_target.__name__}__", partialmethod(_Proxy._augment, _target))


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def trace(model: nn.Module) -> fx.GraphModule:
    """A traced copy of `model` in eval mode, in a form on which nodes can be replaced one by one.

    No node works in place: what `model` reads after it was overwritten, the graph reads from the
    node that overwrote it. `input` is a node's first argument, also where it came as a keyword;
    `axis` and `keepdims` are `dim` and `keepdim`. `view` is `reshape`, for tensors of any layout.

    Raises:
        ValueError: torch.fx cannot trace the model, it takes more than one input, or it reads a
            tensor of which a part, or a reshaped form, was overwritten.
    """
    model = copy.deepcopy(model).eval()
    try:
        graph_module = fx.GraphModule(model, _Tracer().trace(model), type(model).__name__)
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
    for node in graph_module.graph.nodes:
        _use_plain_arguments(node)
    _take_out_of_place(graph_module)
    for node in graph_module.graph.nodes:
        given = (*node.args[1:], *node.kwargs.values())
        is_view = node.op == "call_method" and node.target == "view"
        if is_view and not isinstance(given[0], torch.dtype):
            node.target = "reshape"  # also of channels_last
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module


def _use_plain_arguments(node: fx.Node) -> None:
    """Puts `input` first, and torch's names in the place of numpy's."""
    if node.op != "call_module" and not inspect.isfunction(node.target):
        node.kwargs = {_NUMPY_NAMES.get(name, name): v for name, v in node.kwargs.items()}
    # torch.where alone has an `input` that is not the first one.
    if not node.args and "input" in node.kwargs and "condition" not in node.kwargs:
        node.args = (node.kwargs["input"],)
        node.kwargs = {name: v for name, v in node.kwargs.items() if name != "input"}


_Place = tuple[fx.Node, ...]  # whose memory a tensor lies in, and the views that lead to it


def _take_out_of_place(graph_module: fx.GraphModule) -> None:
    """Gives nodes that work in place their other form, and what reads afterwards their output."""
    in_place = {m for m in graph_module.modules() if getattr(m, "inplace", False)}
    places: dict[fx.Node, _Place] = {}
    sharing: dict[fx.Node, list[fx.Node]] = {}  # what lies in one memory
    newest: dict[fx.Node, fx.Node] = {}  # a tensor -> what overwrote just that
    stale: dict[fx.Node, list[fx.Node]] = {}  # a tensor -> what overwrote a part or more of it
    numbers: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        for argument in node.all_input_nodes:
            node.replace_input_with(argument, newest.get(argument, argument))
        name, source = _name(graph_module, node), node.args[0] if node.args else None
        if _is_number(node, name, numbers):
            numbers.add(node)
        worked_in_place = _use_other_form(graph_module, node, in_place)
        of_tensor = isinstance(source, fx.Node) and source not in numbers
        same = of_tensor and node_kind(graph_module, node) in _SAME
        overwrites = of_tensor and worked_in_place and not same
        view = of_tensor and name in _VIEWS and not overwrites
        if not (same or view or node in numbers):  # it reads values, not sizes alone
            _check_fresh(graph_module, node, stale)

        if overwrites or same:
            places[node] = places[source]
        else:
            places[node] = (*places[source], node) if view else (node,)
        relatives = sharing.setdefault(places[node][0], [])
        if overwrites:
            if places[node][0].op == "get_attr":
                raise ValueError(f"{describe(graph_module, node)} overwrites a tensor of the model")
            for other in relatives:
                if places[other] == places[node]:
                    newest[other] = node
                elif not _disjoint(places[other], places[node]):
                    stale.setdefault(other, []).append(node)
        elif same or view:
            behind = stale.get(source, [])
            stale[node] = [n for n in behind if not _disjoint(places[node], places[n])]
        relatives.append(node)
    for module in in_place:
        module.inplace = False


def _use_other_form(graph_module: fx.GraphModule, node: fx.Node, in_place: set[nn.Module]) -> bool:
    """Whether the node works in place; a function or method gets its form that does not."""
    target, name = node.target, _name(graph_module, node)
    if node.op == "call_module":
        return graph_module.get_submodule(target) in in_place
    if node.op not in ("call_function", "call_method"):
        return False
    if target in _AUGMENTED:
        node.target = _AUGMENTED[target]
        return True
    if inspect.isfunction(target) and target.__module__ == F.__name__:
        names = list(inspect.signature(target).parameters)
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        if not given.pop("inplace", False):
            return False
        node.args, node.kwargs = node.args[:1], {n: v for n, v in given.items() if n != names[0]}
        return True
    if not name.endswith("_") or name.startswith("_") or getattr(operator, name, None) is target:
        return False
    owners = (torch.Tensor,) if node.op == "call_method" else (torch, F)
    forms = [form for form in (getattr(o, name[:-1], None) for o in owners) if callable(form)]
    if not forms:
        raise ValueError(f"{describe(graph_module, node)} works in place and has no other form")
    node.target = name[:-1] if node.op == "call_method" else forms[0]
    return True


def _check_fresh(
    graph_module: fx.GraphModule, node: fx.Node, stale: dict[fx.Node, list[fx.Node]]
) -> None:
    for argument in node.all_input_nodes:
        if stale.get(argument):
            raise ValueError(
                f"{describe(graph_module, node)} reads {argument.name!r}, which shares memory with "
                f"what {describe(graph_module, stale[argument][-1])} has overwritten; write that "
                "so that it does not work in place"
            )


def _disjoint(a: _Place, b: _Place) -> bool:
    """Whether they lie in different pieces of one split."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x is not y:
            split = getattr(a[i - 1].target, "__name__", a[i - 1].target) in _SPLITS
            pieces = [n.args[1] for n in (x, y) if n.target is operator.getitem]
            whole = all(isinstance(piece, int) and piece >= 0 for piece in pieces)
            return split and whole and len(set(pieces)) == 2
    return False


def _is_number(node: fx.Node, name: str, numbers: set[fx.Node]) -> bool:
    """Whether it is a size, or computed from such: no tensor."""
    arithmetic = getattr(node.target, "__module__", None) == operator.add.__module__
    inputs = node.all_input_nodes
    return name in _SIZES or (arithmetic and bool(inputs) and all(n in numbers for n in inputs))


def _name(graph_module: fx.GraphModule, node: fx.Node) -> str:
    """Of what the node computes or, for x.T and its like, of the attribute."""
    if node.target is getattr:
        return node.args[1]
    kind: Any = node_kind(graph_module, node)
    return getattr(kind, "__name__", str(kind))
