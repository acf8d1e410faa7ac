"""How much of every layer's output is left after quantisation: noise ratio and cosine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from ..tracing import trace
from .fold import activation_codes
from .fuse import Group, layer_groups
from .graph import Node
from .integer import Dequantize, PackedConv2d, PackedLinear
from .runtime import PackedModel

_BATCH = 8  # the exact outputs of all layers are kept for so many images


@dataclass(frozen=True)
class Fidelity:
    """Of one layer's output y to the exact one x, over all images.

    Args:
        signal, output, noise: sums of x^2, of y^2, of (y - x)^2.
    """

    signal: float = 0.0
    output: float = 0.0
    noise: float = 0.0

    @property
    def sqnr(self) -> float:
        """Signal to quantisation noise ratio, 10 log10(signal / noise), in decibels."""
        if self.noise == 0:
            return math.inf if self.signal else math.nan
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    @property
    def cosine(self) -> float:
        """Of the angle between x and y, -1..1; NaN where one of them is 0."""
        length = math.sqrt(self.signal * self.output)
        return (self.signal + self.output - self.noise) / (2 * length) if length else math.nan

    def __add__(self, other: Fidelity) -> Fidelity:
        return Fidelity(
            self.signal + other.signal, self.output + other.output, self.noise + other.noise
        )


class _Observer(fx.Interpreter):
    """Shows the values of the nodes named in `layers` to a function, with their layer."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        layers: Mapping[str, str],
        show: Callable[[str, torch.Tensor], None],
    ) -> None:
        super().__init__(graph_module)
        self._layers, self._show = layers, show

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if node.name in self._layers:
            self._show(self._layers[node.name], value)
        return value


@torch.no_grad()
def layer_fidelity(
    model: nn.Module,
    student: fx.GraphModule,
    images: torch.Tensor,
    packed: PackedModel | None = None,
) -> dict[str, dict[str, Fidelity]]:
    """Compares every quantised layer's output with that of the exact network.

    The output is what the layer hands on: behind the batch norm, the addition, the activation and
    the quantiser that follow it. It contains what all layers before have lost.

    Args:
        model: the exact network; not changed.
        student: quantised from it, by `quantize`; not changed.
        images: float32 [N, C, H, W].
        packed: `pack(student)`, whose codes count as the values that they stand for.

    Returns:
        Layer, in the order of execution -> `fake-quantised`, `packed` -> Fidelity. A layer that
        is called several times appears as often, with a number behind its name.

    Raises:
        ValueError: no images, or networks that do not belong together.
    """
    if not len(images):
        raise ValueError("images must be one at least, got none")
    groups, exact = layer_groups(student, images[:1]), trace(model)
    ends = {last.name: name for name, (last, _) in groups.items()}
    # A quantiser is all that a group has and the exact network has not.
    exact_ends = {
        (last.args[0] if last is group.quantizer else last).name: name
        for name, (last, group) in groups.items()
    }
    foreign = exact_ends.keys() - {node.name for node in exact.graph.nodes}
    if foreign:
        raise ValueError(f"student was not made from model, which has no {min(foreign)!r}")
    readers = {} if packed is None else _readers(student, packed, groups)
    found: dict[str, dict[str, Fidelity]] = {name: {} for name in groups}
    signals: dict[str, torch.Tensor] = {}

    def keep(layer: str, x: torch.Tensor) -> None:
        signals[layer] = x

    def compare(network: str, layer: str, y: torch.Tensor) -> None:
        x, sums = signals[layer], found[layer]
        part = Fidelity(*(_squares(t) for t in (x, y, y - x)))
        sums[network] = sums.get(network, Fidelity()) + part

    def observe(node: Node, tensors: object, inputs: object, y: Any) -> None:
        if node.name in readers:
            compare("packed", node.name, readers[node.name](y))

    run_exact = _Observer(exact, exact_ends, keep).run
    run_student = _Observer(student, ends, partial(compare, "fake-quantised")).run
    for batch in images.split(_BATCH):
        run_exact(batch)
        run_student(batch)
        if packed is not None:
            packed.execute(batch, observe)
    return found


def _squares(x: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _readers(
    student: fx.GraphModule, packed: PackedModel, groups: Mapping[str, tuple[fx.Node, Group]]
) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Layer -> what makes floats of the output that it has in the packed network."""
    nodes = {n.name: n for n in packed.graph.nodes if isinstance(n.op, PackedConv2d | PackedLinear)}
    if list(nodes) != list(groups):
        raise ValueError("packed was not made from student: its layers are others")
    readers: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    for name, (_, group) in groups.items():
        codes, op = None, nodes[name].op
        if group.quantizer is not None:
            target = group.quantizer.target
            codes = activation_codes(target, student.get_submodule(target))
        bits = student.get_submodule(group.layer.target).weight_bits
        if (op.weight_bits, op.output_bits) != (bits, codes and codes.bits):
            raise ValueError(f"packed was not made from student: {name} has other widths")
        if codes is None:
            readers[name] = lambda y: y
        else:
            read = Dequantize(scale=codes.scale, zero_point=codes.zero_point)
            readers[name] = partial(read.run, {})
    return readers
