"""Cross-layer equalisation: channels of like size, so that one range fits all of a tensor's."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..graphs import RELU6S, RELUS, addends, node_kind, note_shapes
from ..tracing import trace
from .modules import own_parameters
from .prepare import AVERAGE_POOLS, is_global_average_pool, moves_values

# A quarter of the way (in the logarithm) to channels of one size: more of it leaves weights so
# unlike each other that their rounding costs more than the activations' gains.
_STRENGTH = 0.25
_SMALLEST = 1e-3  # of a tensor's largest channel; a smaller one hardly matters
# Ops, besides those that move values, through which a channel's positive factor passes.
_HOMOGENEOUS = (
    RELUS
    | RELU6S  # not by themselves: see `equalized`
    | AVERAGE_POOLS
    | {nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d}
)


@torch.no_grad()
def equalized(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """A copy of a network with scale moved from activation channels into weights that read them.

    A BatchNorm's output channel is multiplied by a positive factor, and the weights of the layers
    that read it, through ReLUs, pooling and additions, are divided by it, so the float network
    computes the same, and its BatchNorms read the same. Where additions tie the outputs of several
    norms, all get the same factors. Tensors that anything else makes or reads (concatenation, the
    image, a convolution without a norm) stay as they are. Factors are 1 for a tensor's largest
    channel and more for others, so that no value of `images` passes a ReLU6's bound that did not
    before; larger values may. Nagel et al., ICCV 2019, section 4.1, with ranges of the activations
    in the place of weights', since weights have a range for every output channel.

    Args:
        model: a CNN that torch.fx can trace; not changed.
        images: float32 [N, C, H, W], from which channels' ranges are taken.
    """
    result, traced = copy.deepcopy(model), trace(model)
    own_parameters(result)
    note_shapes(traced, tuple(images.shape[1:]))
    ties = _Ties(traced)
    seen = _ChannelMaxima(traced, {layer.args[0] for layer in ties.layers})
    for batch in images.split(256):
        seen.run(batch)
    for norms, layers in ties.groups():
        channels = traced.get_submodule(norms[0].target).num_features
        share = torch.zeros(channels, device=images.device)
        for layer in layers:
            largest = seen.maxima[layer.args[0]].view(channels, -1).amax(1)
            share = torch.maximum(share, largest / largest.max().clamp(min=1e-30))
        factor = share.clamp(min=_SMALLEST) ** -_STRENGTH
        factor /= factor.min()
        for norm in norms:
            module = result.get_submodule(norm.target)
            module.weight *= factor
            module.bias *= factor
        for layer in layers:
            _divide_inputs(result.get_submodule(layer.target), factor)
    return result


def _divide_inputs(layer: nn.Conv2d | nn.Linear, factor: torch.Tensor) -> None:
    if isinstance(layer, nn.Linear):  # flattened [C, H, W]
        layer.weight /= factor.repeat_interleave(layer.in_features // len(factor))
        return
    groups = factor.view(layer.groups, 1, -1, 1, 1)
    layer.weight /= groups.expand(-1, layer.out_channels // layer.groups, -1, 1, 1).flatten(0, 1)


class _ChannelMaxima(fx.Interpreter):
    """Runs a network and keeps the largest size of every channel (or feature) of some nodes."""

    def __init__(self, traced: fx.GraphModule, nodes: set[fx.Node]) -> None:
        super().__init__(traced)
        self.nodes, self.maxima = nodes, dict[fx.Node, torch.Tensor]()

    def run_node(self, node: fx.Node) -> object:
        result = super().run_node(node)
        if node in self.nodes:
            largest = result.abs().transpose(0, 1).flatten(1).amax(1)
            known = self.maxima.get(node, largest)
            self.maxima[node] = torch.maximum(known, largest)
        return result


class _Ties:
    """Which tensors' channels must be scaled alike, and which cannot be.

    Attributes:
        layers: nodes of the Conv2d and Linear layers that can take factors up.
    """

    def __init__(self, traced: fx.GraphModule) -> None:
        self._parent: dict[fx.Node, fx.Node] = {}
        self._fixed: set[fx.Node] = set()
        self._norms: list[fx.Node] = []
        self.layers: list[fx.Node] = []
        calls = Counter(n.target for n in traced.graph.nodes if n.op == "call_module")
        for node in traced.graph.nodes:
            if node.meta["shape"] is None:  # a size, or several tensors
                if "constant" not in node.meta:
                    self._fix(node.all_input_nodes)
                continue
            kind = node_kind(traced, node)
            module = traced.get_submodule(node.target) if node.op == "call_module" else None
            homogeneous = self._homogeneous(traced, node)
            if calls[node.target] > 1 and not homogeneous:  # one factor for all its calls
                self._fix([node, *node.all_input_nodes])
            elif kind is nn.BatchNorm2d and module.affine:
                self._fix(node.all_input_nodes)
                self._norms.append(node)
            elif kind in (nn.Conv2d, nn.Linear):
                self._fix([node])
                self.layers.append(node)
            elif homogeneous:
                for other in node.all_input_nodes:
                    if other.meta["shape"] is not None:
                        self._tie(node, other)
            else:
                self._fix([node, *node.all_input_nodes])

    @staticmethod
    def _homogeneous(traced: fx.GraphModule, node: fx.Node) -> bool:
        if addends(traced, node) is not None:
            return True
        passes = node_kind(traced, node) in _HOMOGENEOUS or moves_values(traced, node)
        if not passes and not is_global_average_pool(traced, node):
            return False
        # Slices and reshapings may make other channels; flattened ones stay in order.
        shape, before = node.meta["shape"], node.args[0].meta["shape"]
        flattened = len(shape) == 2 and math.prod(shape) == math.prod(before)
        return flattened or shape[:2] == before[:2]

    def _root(self, node: fx.Node) -> fx.Node:
        while self._parent.setdefault(node, node) is not node:
            node = self._parent[node]
        return node

    def _tie(self, a: fx.Node, b: fx.Node) -> None:
        a, b = self._root(a), self._root(b)
        self._parent[b] = a
        if b in self._fixed:
            self._fixed.add(a)

    def _fix(self, nodes: Sequence[fx.Node]) -> None:
        self._fixed.update(self._root(node) for node in nodes)

    def groups(self) -> list[tuple[list[fx.Node], list[fx.Node]]]:
        """Norms and the layers that read them, of every set of tied tensors with both."""
        norms: dict[fx.Node, list[fx.Node]] = {}
        layers: dict[fx.Node, list[fx.Node]] = {}
        for node in self._norms:
            norms.setdefault(self._root(node), []).append(node)
        for node in self.layers:
            layers.setdefault(self._root(node.args[0]), []).append(node)
        return [
            (norms[root], layers[root])
            for root in norms
            if root in layers and root not in self._fixed
        ]
