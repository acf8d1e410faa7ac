"""Single torch.fx nodes as float operations of a packed graph."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..graphs import (
    ADDS,
    CLAMPS,
    HARDTANHS,
    PADS,
    RELU6S,
    RELUS,
    clip_of,
    describe,
    node_kind,
    slices_of,
)
from ..quantization.prepare import AVERAGE_POOLS
from . import glue
from .integer import MaxPool2d, Pad, Reshape, Slice
from .schema import MAX_EXTENT, MAX_NUMBER, Op

MAX_POOLS = {nn.MaxPool2d, F.max_pool2d, torch.max_pool2d}
RESHAPES = {
    nn.Flatten, nn.Unflatten, torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze,
    "flatten", "view", "reshape", "squeeze", "unsqueeze", "unflatten",
}  # fmt: skip
IDENTITIES = {nn.Identity, nn.Dropout, nn.Dropout2d, "contiguous", "detach", "clone", "float"}
DROPOUTS = {F.dropout, F.dropout2d}


class Translation(NamedTuple):
    """op, the nodes it reads, and its tensors by role."""

    op: Op
    inputs: tuple[fx.Node, ...]
    tensors: dict[str, torch.Tensor]


class Unsupported(ValueError):
    """A node for which there is no packed form."""


def translate(graph_module: fx.GraphModule, node: fx.Node) -> Translation:
    """The float form of a node. The graph must carry shapes (see shapes.annotate).

    Raises:
        Unsupported: there is none.
    """
    kind = node_kind(graph_module, node)
    translator = _TRANSLATORS.get(kind)
    if translator is None:
        raise Unsupported(f"{describe(graph_module, node)} has no packed form")
    try:
        return translator(graph_module, node)
    except (ValueError, TypeError, AttributeError) as error:
        raise Unsupported(f"{describe(graph_module, node)} has no packed form: {error}") from error


def bypassed(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node returns its first input. Raises Unsupported for dropout that is active."""
    kind = node_kind(graph_module, node)
    if kind in DROPOUTS:
        arguments = _arguments(graph_module, node, "input", "p", "training", "inplace")
        # torch.nn.functional.dropout is active unless told otherwise.
        if arguments.get("training", True):
            raise Unsupported(f"{describe(graph_module, node)} is active in eval mode")
        return True
    if getattr(kind, "__name__", "") == "stochastic_depth":
        arguments = _arguments(graph_module, node, "input", "p", "mode", "training")
        return not arguments.get("training", True)
    return kind in IDENTITIES


def remove_bypassed(graph_module: fx.GraphModule) -> None:
    """Takes out the nodes that return their first input. Raises as `bypassed`."""
    for node in list(graph_module.graph.nodes):
        if bypassed(graph_module, node):
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)


def geometry(layer: nn.Conv2d) -> dict[str, Any]:
    """The fields of Conv2dOp. Raises ValueError for padding that is not symmetric."""
    padding = layer.padding
    if layer.padding_mode != "zeros":
        raise ValueError(f"padding_mode={layer.padding_mode!r}")
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        if any(t % 2 for t in total):
            raise ValueError("padding='same' with an even kernel is not symmetric")
        padding = tuple(t // 2 for t in total)
    names = ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups")
    return {**{name: getattr(layer, name) for name in names}, "padding": padding}


def _arguments(graph_module: fx.GraphModule, node: fx.Node, *names: str) -> dict[str, Any]:
    """A node's arguments by name, whether it is a module, a function or a method.

    Raises:
        ValueError: it has others than `names`.
    """
    if node.op == "call_module":
        module = graph_module.get_submodule(node.target)
        found = {name: getattr(module, name) for name in names if hasattr(module, name)}
        return {**found, names[0]: node.args[0]}
    found = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    if found.get("dtype") in (None, torch.float32):  # what it is anyway
        found.pop("dtype", None)
    unknown = [*sorted(found.keys() - set(names)), *node.args[len(names) :]]
    if unknown:
        raise ValueError(f"expected {', '.join(names)} alone, got {unknown}, too")
    return {name: _constant(value) for name, value in found.items()}


def _constant(value: Any) -> Any:
    """Numbers in place of the nodes that compute them from shapes."""

    def resolve(node: fx.Node) -> Any:
        if "constant" not in node.meta:
            return node
        if node.meta["batch_dependent"]:
            raise ValueError(f"{node.name} depends on the batch size")
        return node.meta["constant"]

    return fx.map_arg(value, resolve)


def _pair(value: Any) -> tuple[int, int]:
    return tuple(value) if isinstance(value, list | tuple) else (value, value)


def _unary(function: str) -> Callable[[fx.GraphModule, fx.Node], Translation]:
    def make(graph_module: fx.GraphModule, node: fx.Node) -> Translation:
        values = _arguments(graph_module, node, "input", "inplace")
        return Translation(glue.Unary(function=function), (values["input"],), {})

    return make


def _default(function: str, **defaults: Any) -> Callable[[fx.GraphModule, fx.Node], Translation]:
    """Of a function that has a form with its default settings alone."""

    def make(graph_module: fx.GraphModule, node: fx.Node) -> Translation:
        values = _arguments(graph_module, node, "input", *defaults, "inplace")
        for name, default in defaults.items():
            if values.get(name, default) != default:
                raise ValueError(f"only {name}={default!r} is known, got {values[name]!r}")
        return Translation(glue.Unary(function=function), (values["input"],), {})

    return make


def _clip(graph_module: fx.GraphModule, node: fx.Node) -> Translation:
    clip = clip_of(graph_module, node)
    if clip is None:
        raise ValueError("its bounds must be numbers, the lower one first")
    low, high = (max(-MAX_NUMBER, min(bound, MAX_NUMBER)) for bound in clip)
    return Translation(glue.Hardtanh(low=low, high=high), (node.args[0],), {})


def _leaky_relu(graph_module: fx.GraphModule, node: fx.Node) -> Translation:
    values = _arguments(graph_module, node, "input", "negative_slope", "inplace")
    op = glue.LeakyRelu(slope=values.get("negative_slope", 0.01))
    return Translation(op, (values["input"],), {})


def _prelu(graph_module: fx.GraphModule, node: fx.Node) -> Translation:
    weight = graph_module.get_submodule(node.target).weight
    return Translation(glue.PRelu(slopes=len(weight)), (node.args[0],), {"weight": weight})


def _softmax(record: type[Op]) -> Callable[[fx.GraphModule, fx.Node], Translation]:
    def make(graph_module: fx.GraphModule, node: fx.Node) -> Translation:
        values = _arguments(graph_module, node, "input", "dim", "_stacklevel")
        return Translation(record(dim=values["dim"]), (values["input"],), {})

    return make


def _binary(function: str) -> Callable[[fx.GraphModule, fx.Node], Translation]:
    def make(graph_module: fx.GraphModule, node: fx.Node) -> Translation:
        values = _arguments(graph_module, node, "input", "other", "alpha", "rounding_mode")
        if values.get("alpha", 1) != 1 or values.get("rounding_mode") is not None:
            raise ValueError("alpha and rounding_mode are not known")
        x, y = values["input"], values["other"]
        if isinstance(x, fx.Node) and isinstance(y, fx.Node):
            return Translation(glue.Binary(function=function), (x, y), {})
        x, y, swapped = (x, y, False) if isinstance(x, fx.Node) else (y, x, True)
        op = glue.WithScalar(function=function, value=float(y), reversed=swapped)
        return Translation(op, (x,), {})

    return make


def _expand_as(graph_module: fx.GraphModule, node: fx.Node) -> Translation:
    values = _arguments(graph_module, node, "input", "other")
    return Translation(glue.ExpandAs(), (values["input"], values["other"]), {})


def _batch_norm(graph_module: fx.GraphModule, node: fx.Node) -> Translation:
    norm = graph_module.get_submodule(node.target)
    if norm.running_mean is None:
        raise ValueError("it keeps no running statistics")
    ones = torch.ones_like(norm.running_var)
    tensors = {
        "running_mean": norm.running_mean,
        "running_var": norm.running_var,
        "weight": ones if norm.weight is None else norm.weight,
        "bias": 0 * ones if norm.bias is None else norm.bias,
    }
    op = glue.BatchNorm(channels=norm.num_features, eps=norm.eps)
    return Translation(op, (node.args[0],), tensors)


def _max_pool(graph_module: fx.GraphModule, node: fx.Node) -> Translation:
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
    values = _arguments(graph_module, node, *names, "return_indices")
    if values.get("return_indices"):
        raise ValueError("it returns indices")
    op = MaxPool2d(
        kernel_size=_pair(values["kernel_size"]),
        stride=_pair(values.get("stride") or values["kernel_size"]),
        padding=_pair(values.get("padding", 0)),
        dilation=_pair(values.get("dilation", 1)),
        ceil_mode=values.get("ceil_mode", False),
    )
    return Translation(op, (values["input"],), {})


def _avg_pool(graph_module: fx.GraphModule, node: fx.Node) -> Translation:
    names = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
    values = _arguments(graph_module, node, *names, "divisor_override")
    op = glue.AvgPool2d(
        kernel_size=_pair(values["kernel_size"]),
        stride=_pair(values.get("stride") or values["kernel_size"]),
        padding=_pair(values.get("padding", 0)),
        ceil_mode=values.get("ceil_mode", False),
        count_include_pad=values.get("count_include_pad", True),
        divisor_override=values.get("divisor_override"),
    )
    return Translation(op, (values["input"],), {})


def _adaptive_pool(record: type[Op]) -> Callable[[fx.GraphModule, fx.Node], Translation]:
    def make(graph_module: fx.GraphModule, node: fx.Node) -> Translation:
        values = _arguments(graph_module, node, "input", "output_size", "return_indices")
        if values.get("return_indices"):
            raise ValueError("it returns indices")
        height, width = _pair(values["output_size"])
        return Translation(record(height=height, width=width), (values["input"],), {})

    return make


def _mean(graph_module: fx.GraphModule, node: fx.Node) -> Translation:
    values = _arguments(graph_module, node, "input", "dim", "keepdim")
    dims = values["dim"]
    op = glue.Mean(
        dims=(dims,) if isinstance(dims, int) else tuple(dims),
        keepdim=values.get("keepdim", False),
    )
    return Translation(op, (values["input"],), {})


def _reshape(graph_module: fx.GraphModule, node: fx.Node) -> Translation:
    shape = node.meta["shape"][1:]
    # One dimension behind the batch: whatever the image's size, it is all there is.
    op = Reshape(shape=(-1,) if len(shape) == 1 else shape)
    return Translation(op, (node.args[0],), {})


def _cat(graph_module: fx.GraphModule, node: fx.Node) -> Translation:
    values = _arguments(graph_module, node, "tensors", "dim")
    return Translation(glue.Cat(dim=values.get("dim", 0)), tuple(values["tensors"]), {})


def _chunk(graph_module: fx.GraphModule, node: fx.Node) -> Translation:
    values = _arguments(graph_module, node, "input", "chunks", "dim")
    op = glue.Chunk(chunks=values["chunks"], dim=values.get("dim", 0))
    return Translation(op, (values["input"],), {})


def _split(graph_module: fx.GraphModule, node: fx.Node) -> Translation:
    name = "split_size" if node.op == "call_method" else "split_size_or_sections"
    values = _arguments(graph_module, node, "input", name, "dim")
    size, dim = values[name], values.get("dim", 0)
    if isinstance(size, int):
        whole = values["input"].meta["shape"][dim]
        size = [min(size, whole - begin) for begin in range(0, whole, size)]
    return Translation(glue.Split(sizes=tuple(size), dim=dim), (values["input"],), {})


def _item(graph_module: fx.GraphModule, node: fx.Node) -> Translation:
    source, index = node.args
    if slices_of(node) is not None:
        return _slice(source, _constant(index))
    return Translation(glue.Item(index=index), (source,), {})


def _slice(source: fx.Node, index: tuple) -> Translation:
    dims = len(source.meta["shape"])
    if ... in index:
        at = index.index(...)
        index = *index[:at], *[slice(None)] * (dims - len(index) + 1), *index[at + 1 :]
    batch, *rest = *index, *[slice(None)] * (dims - len(index))
    if batch.indices(MAX_EXTENT) != (0, MAX_EXTENT, 1):
        raise ValueError("it cuts the batch")
    op = Slice(
        begin=tuple(s.start or 0 for s in rest),
        end=tuple(MAX_EXTENT if s.stop is None else s.stop for s in rest),
        step=tuple(s.step or 1 for s in rest),
    )
    return Translation(op, (source,), {})


def _pad(graph_module: fx.GraphModule, node: fx.Node) -> Translation:
    names = ("padding",) if node.op == "call_module" else ("pad", "mode")
    values = _arguments(graph_module, node, "input", *names, "value")
    if values.get("mode", "constant") != "constant":
        raise ValueError(f"mode={values['mode']!r}")
    numbers = values[names[0]]
    before, after = (tuple(reversed(numbers[i::2])) for i in (0, 1))
    rest = (0,) * (len(node.meta["shape"]) - 1 - len(before))
    op = Pad(before=rest + before, after=rest + after, value=float(values.get("value") or 0))
    return Translation(op, (values["input"],), {})


def _transpose(graph_module: fx.GraphModule, node: fx.Node) -> Translation:
    values = _arguments(graph_module, node, "input", "dim0", "dim1")
    dims = list(range(len(node.meta["shape"])))
    a, b = values["dim0"], values["dim1"]
    dims[a], dims[b] = dims[b], dims[a]
    return Translation(glue.Permute(dims=tuple(dims)), (values["input"],), {})


def _permute(graph_module: fx.GraphModule, node: fx.Node) -> Translation:
    first, *dims = *node.args, *node.kwargs.values()
    dims = dims[0] if dims and isinstance(dims[0], list | tuple) else dims
    return Translation(glue.Permute(dims=tuple(dims)), (first,), {})


def _attribute(graph_module: fx.GraphModule, node: fx.Node) -> Translation:
    value: Any = graph_module
    for part in node.target.split("."):
        value = getattr(value, part)
    op = glue.Constant(shape=tuple(value.shape))
    return Translation(op, (), {"value": value.detach().float()})


def _bias(layer: nn.Conv2d | nn.Linear) -> torch.Tensor:
    return layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias


def _conv(graph_module: fx.GraphModule, node: fx.Node) -> Translation:
    layer = graph_module.get_submodule(node.target)
    op = glue.FloatConv2d(**geometry(layer))
    return Translation(op, (node.args[0],), {"weight": layer.weight, "bias": _bias(layer)})


def _linear(graph_module: fx.GraphModule, node: fx.Node) -> Translation:
    layer = graph_module.get_submodule(node.target)
    op = glue.FloatLinear(in_features=layer.in_features, out_features=layer.out_features)
    return Translation(op, (node.args[0],), {"weight": layer.weight, "bias": _bias(layer)})


_TRANSLATORS: dict[Any, Callable[[fx.GraphModule, fx.Node], Translation]] = {
    **dict.fromkeys(RELUS, _unary("relu")),
    **dict.fromkeys(RELU6S, _unary("relu6")),
    **dict.fromkeys((nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid"), _unary("sigmoid")),
    **dict.fromkeys((nn.Tanh, torch.tanh, "tanh"), _unary("tanh")),
    **dict.fromkeys((nn.SiLU, F.silu), _unary("silu")),
    **dict.fromkeys((nn.GELU, F.gelu), _default("gelu", approximate="none")),
    **dict.fromkeys((nn.ELU, F.elu), _default("elu", alpha=1.0)),
    **dict.fromkeys((nn.Mish, F.mish), _unary("mish")),
    **dict.fromkeys((nn.Softplus, F.softplus), _default("softplus", beta=1.0, threshold=20.0)),
    **dict.fromkeys((nn.Hardsigmoid, F.hardsigmoid), _unary("hardsigmoid")),
    **dict.fromkeys((nn.Hardswish, F.hardswish), _unary("hardswish")),
    **dict.fromkeys(HARDTANHS | CLAMPS, _clip),
    **dict.fromkeys((nn.LeakyReLU, F.leaky_relu), _leaky_relu),
    nn.PReLU: _prelu,
    **dict.fromkeys((nn.Softmax, F.softmax, torch.softmax, "softmax"), _softmax(glue.Softmax)),
    **dict.fromkeys(
        (nn.LogSoftmax, F.log_softmax, torch.log_softmax, "log_softmax"),
        _softmax(glue.LogSoftmax),
    ),
    **dict.fromkeys(ADDS, _binary("add")),
    **dict.fromkeys((operator.sub, torch.sub, "sub"), _binary("sub")),
    **dict.fromkeys((operator.mul, torch.mul, "mul"), _binary("mul")),
    **dict.fromkeys((operator.truediv, torch.div, "div"), _binary("div")),
    **dict.fromkeys((torch.maximum, "maximum"), _binary("maximum")),
    **dict.fromkeys((torch.minimum, "minimum"), _binary("minimum")),
    "expand_as": _expand_as,
    **dict.fromkeys((nn.BatchNorm2d, nn.BatchNorm1d), _batch_norm),
    **dict.fromkeys(MAX_POOLS, _max_pool),
    **dict.fromkeys(AVERAGE_POOLS, _avg_pool),
    **dict.fromkeys(
        (nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d), _adaptive_pool(glue.AdaptiveAvgPool2d)
    ),
    **dict.fromkeys(
        (nn.AdaptiveMaxPool2d, F.adaptive_max_pool2d), _adaptive_pool(glue.AdaptiveMaxPool2d)
    ),
    **dict.fromkeys((torch.mean, "mean"), _mean),
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys((torch.cat, torch.concat), _cat),
    **dict.fromkeys((torch.chunk, "chunk"), _chunk),
    **dict.fromkeys((torch.split, "split"), _split),
    operator.getitem: _item,
    **dict.fromkeys(PADS, _pad),
    **dict.fromkeys((torch.transpose, "transpose"), _transpose),
    **dict.fromkeys((torch.permute, "permute"), _permute),
    "get_attr": _attribute,
    nn.Conv2d: _conv,
    nn.Linear: _linear,
}
