"""Faster forms of a network for training: fused norms, convolutions in half precision."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from .. import ops
from .modules import ActivationQuantizer, QuantConv2d
from .prepare import ADDS, RELUS, node_kind

_IN_PLACE_ADDS = {operator.iadd, "add_"}


class FusedNormQuantizer(nn.Module):
    """`quantizer(relu(norm(x) + residual))` in one pass; a norm in eval mode, a range as it is.

    Args:
        norm, quantizer: those of the student; their parameters and buffers stay shared.
        relu: True: ReLU; a number: clipped to 0 .. that number; False: neither.
    """

    def __init__(
        self, norm: nn.BatchNorm2d, quantizer: ActivationQuantizer, relu: bool | float
    ) -> None:
        super().__init__()
        self.norm, self.quantizer, self.relu = norm, quantizer, relu

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        norm = self.norm
        x_min, x_max, ste = self.quantizer.range()
        if residual is not None:
            residual = residual.to(x.dtype).expand_as(x)
        return ops.bn_relu_fake_quantize(
            x, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps,
            x_min, x_max, self.quantizer.bits, self.relu, residual, ste,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"relu={self.relu}"


def fuse_norms(student: fx.GraphModule) -> fx.GraphModule:
    """A faster form of a student for fine-tuning.

    Every BatchNorm2d -> [addition of another tensor] -> [ReLU or ReLU6] -> ActivationQuantizer,
    nothing else reading in between, becomes one module; the rest stays as it is. The gradients are
    those of `student` up to rounding. Where the student's quantisers observe or measure, run the
    student itself.

    Args:
        student: from `prepare`, in eval mode; not changed.

    Returns:
        A GraphModule in eval mode with the same parameters and buffers (the objects, not copies).
    """
    graph_module = fx.GraphModule(student, _copied(student.graph))
    for node in list(graph_module.graph.nodes):
        if node_kind(graph_module, node) is ActivationQuantizer:
            _fuse(graph_module, node)
    graph_module.delete_all_unused_submodules()
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module.eval()


class _CastLayer(nn.Module):
    """A convolution on activations and weights cast to `dtype`, a linear layer in its weight's."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.dtype = layer, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer, dtype = self.layer, self.dtype
        if isinstance(layer, nn.Linear):
            return layer(x.to(layer.weight.dtype))
        quantized = isinstance(layer, QuantConv2d)
        weight = layer.quantized_weight() if quantized else layer.weight
        bias = None if layer.bias is None else layer.bias.to(dtype)
        # The layout in which convolutions and fused norms are fast: one copy instead of two.
        weight = weight.to(dtype=dtype, memory_format=torch.channels_last)
        return layer._conv_forward(x.to(dtype), weight, bias)


def cast_convolutions(graph_module: fx.GraphModule, dtype: torch.dtype) -> fx.GraphModule:
    """Lets a network's convolutions compute in `dtype`; their weights stay, cast at every use.

    What follows a convolution reads and writes `dtype`, too; linear layers compute as before.

    Args:
        graph_module: traced; its convolutions and linear layers are replaced.
        dtype: torch.bfloat16, for instance.

    Returns:
        graph_module.
    """
    for node in graph_module.graph.nodes:
        kind = node_kind(graph_module, node)
        if isinstance(kind, type) and issubclass(kind, nn.Conv2d | nn.Linear):
            layer = graph_module.get_submodule(node.target)
            graph_module.set_submodule(node.target, _CastLayer(layer, dtype))
    return graph_module


def _copied(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy


def _fuse(graph_module: fx.GraphModule, end: fx.Node) -> None:
    """Replaces the chain that ends in the quantiser `end`, if there is one."""
    node, relu, residual = end.args[0], False, None
    if node_kind(graph_module, node) in RELUS and len(node.users) == 1:
        relu = RELUS[node_kind(graph_module, node)]
        node = node.args[0]
    addition = node
    norm = _norm(graph_module, node)
    if norm is None:
        norm, residual = _added_norm(graph_module, node)
    if norm is None:
        return
    fused = FusedNormQuantizer(
        graph_module.get_submodule(norm.target), graph_module.get_submodule(end.target), relu
    )
    name = f"{end.target}_fused"
    graph_module.add_submodule(name, fused)
    with graph_module.graph.inserting_before(end):
        inputs = norm.args if residual is None else (*norm.args, residual)
        new = graph_module.graph.call_module(name, inputs)
    end.replace_all_uses_with(new)
    for old in dict.fromkeys((end, end.args[0], addition, norm)):
        graph_module.graph.erase_node(old)


def _norm(graph_module: fx.GraphModule, node: object) -> fx.Node | None:
    """The node, if it is a batch norm with all its tensors that nothing else reads."""
    if not isinstance(node, fx.Node) or len(node.users) != 1 or len(node.args) != 1:
        return None
    if node_kind(graph_module, node) is not nn.BatchNorm2d:
        return None
    norm = graph_module.get_submodule(node.target)
    return node if norm.affine and norm.running_mean is not None else None


def _added_norm(
    graph_module: fx.GraphModule, node: fx.Node
) -> tuple[fx.Node | None, fx.Node | None]:
    """Batch norm and residual of an addition that nothing else reads."""
    kind = node_kind(graph_module, node)
    if kind not in ADDS or len(node.users) != 1 or len(node.args) != 2 or node.kwargs:
        return None, None
    first, second = node.args
    for norm, residual in ((first, second), (second, first)):
        # In place, the addition writes to its first operand, which others may read later.
        visible = kind in _IN_PLACE_ADDS and residual is first and len(first.users) > 1
        if _norm(graph_module, norm) and isinstance(residual, fx.Node) and not visible:
            return norm, residual
    return None, None
