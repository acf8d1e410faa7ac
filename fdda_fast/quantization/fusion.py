"""Faster forms of a network for training: fused norms, convolutions in half precision."""

from __future__ import annotations

import torch
from torch import fx, nn

from .. import ops
from ..graphs import fuse, node_kind, norm_chains, note_shapes, only_user
from ..layers import Conv3x3
from .modules import ActivationQuantizer, QuantConv2d


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
            residual = residual.to(x.dtype)
        return ops.bn_relu_fake_quantize(
            x, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps,
            x_min, x_max, self.quantizer.bits, self.relu, residual, ste,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"relu={self.relu}"


def fuse_norms(student: fx.GraphModule, image_shape: tuple[int, int, int]) -> fx.GraphModule:
    """A faster form of a student for fine-tuning.

    Every BatchNorm2d -> [addition of another tensor] -> [ReLU or ReLU6] -> ActivationQuantizer,
    nothing else reading in between, becomes one module; the rest stays as it is. The gradients are
    those of `student` up to rounding. Where the student's quantisers observe or measure, run the
    student itself.

    Args:
        student: from `prepare`, in eval mode; not changed.
        image_shape: (channels, height, width) of its input.

    Returns:
        A GraphModule in eval mode with the same parameters and buffers (the objects, not copies).
    """
    graph_module = fx.GraphModule(student, _copied(student.graph))
    note_shapes(graph_module, image_shape)
    for chain in norm_chains(graph_module):
        norm, end = graph_module.get_submodule(chain.norm.target), only_user(chain.last)
        quantized = end is not None and node_kind(graph_module, end) is ActivationQuantizer
        if not quantized or not norm.affine or norm.running_mean is None:
            continue
        fused = FusedNormQuantizer(norm, graph_module.get_submodule(end.target), chain.relu)
        chain = chain._replace(nodes=(*chain.nodes, end))
        fuse(graph_module, chain, f"{end.target}_fused", fused)
    graph_module.delete_all_unused_submodules()
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module.eval()


class _CastLayer(nn.Module):
    """A convolution on activations and weights cast to `dtype`, a linear layer in its weight's."""

    def __init__(self, layer: nn.Conv2d | Conv3x3 | nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.dtype = layer, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer, dtype = self.layer, self.dtype
        if isinstance(layer, nn.Linear):
            return layer(x.to(layer.weight.dtype))
        if isinstance(layer, Conv3x3):
            return layer(x.to(dtype))
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
        if isinstance(kind, type) and issubclass(kind, nn.Conv2d | Conv3x3 | nn.Linear):
            layer = graph_module.get_submodule(node.target)
            graph_module.set_submodule(node.target, _CastLayer(layer, dtype))
    return graph_module


def _copied(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy
