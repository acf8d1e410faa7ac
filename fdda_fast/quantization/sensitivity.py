"""What each layer's quantisation alone does to a network's output."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..config import QuantizeConfig
from ..tracing import trace
from .allocation import Widths
from .bits import IMAGE_BITS, Bits, check_bits
from .finetune import quantize
from .modules import ActivationQuantizer, QuantConv2d, QuantLinear
from .prepare import reader_of

METRICS = ("kl", "mse")
_BATCH = 64


@dataclass(frozen=True)
class Sensitivity:
    """What `allocate` wants to know of a network.

    Args:
        loss: layer -> (weight bits, input bits) -> distance from the FP32 output. That of an input
            that several layers share counts at the first of them.
        groups: layers that share an input, in forward order.
    """

    loss: dict[str, dict[Widths, float]]
    groups: tuple[tuple[str, ...], ...]


class _Partly(fx.Interpreter):
    """Runs a fake-quantised network of which only the modules named are quantised.

    Other layers are those of the exact network: the student's weights may be clipped.
    """

    def __init__(
        self, student: fx.GraphModule, exact: fx.GraphModule, active: Collection[str]
    ) -> None:
        super().__init__(student)
        self._exact, self._active = exact, active

    def call_module(self, target: Any, args: tuple, kwargs: dict) -> Any:
        module = self.fetch_attr(target)
        if target not in self._active:
            if isinstance(module, ActivationQuantizer):
                return args[0]
            if isinstance(module, QuantConv2d | QuantLinear):
                return self._exact.get_submodule(target)(*args)
        return super().call_module(target, args, kwargs)


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    images: torch.Tensor,
    widths: Sequence[int] = (2, 3, 4, 8),
    metric: str = "kl",
) -> Sensitivity:
    """Measures every layer's weights and every input at every width, all else in FP32.

    Args:
        model: a network that `quantize` takes; not changed.
        images: float32 [N, C, H, W], real or synthetic; ranges come from them, too.
        widths: bits to try.
        metric: `kl`, mean Kullback-Leibler divergence from the FP32 classes' probabilities, or
            `mse`, mean squared difference of the logits.

    Raises:
        ValueError: an unknown metric, no widths or such outside 2..8, or as `quantize`.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {METRICS}, got {metric!r}")
    if not widths:
        raise ValueError("widths must name one width at least")
    for bits in widths:
        check_bits("widths", bits)
    graph, model = trace(model), model.eval()
    targets = torch.cat([model(batch) for batch in images.split(_BATCH)])
    calibration = (images, targets.argmax(1))
    config = QuantizeConfig(steps=0, correct_batch_norms=False)
    weight: dict[str, dict[int, float]] = {}
    inputs: dict[tuple[str, ...], dict[int, float]] = {}
    for bits in widths:
        student = quantize(model, calibration, Bits(bits, bits), config)
        quantizers = _input_quantizers(student)
        if not weight:
            groups = _groups(graph, list(quantizers))

        def measure(active: Collection[str], student: fx.GraphModule = student) -> float:
            run = _Partly(student, graph, active).run
            return _distance(torch.cat([run(b) for b in images.split(_BATCH)]), targets, metric)

        for name in quantizers:
            weight.setdefault(name, {})[bits] = measure({name})
        for group, reads_image in groups.items():
            width = IMAGE_BITS if reads_image else bits
            if width not in inputs.setdefault(group, {}):
                inputs[group][width] = measure(set().union(*(quantizers[n] for n in group)))
    loss = {}
    for group, losses in inputs.items():
        for name in group:
            shared = losses if name == group[0] else dict.fromkeys(losses, 0.0)
            loss[name] = {(w, a): x + y for w, x in weight[name].items() for a, y in shared.items()}
    return Sensitivity({name: loss[name] for name in weight}, tuple(groups))


def _distance(logits: torch.Tensor, targets: torch.Tensor, metric: str) -> float:
    if metric == "mse":
        return float(F.mse_loss(logits, targets))
    a, b = (x.double().log_softmax(1) for x in (logits, targets))
    return float(F.kl_div(a, b, reduction="batchmean", log_target=True).clamp(min=0))


def _input_quantizers(student: fx.GraphModule) -> dict[str, set[str]]:
    """Layer -> the quantisers that set its input's width, in forward order."""
    found: dict[str, set[str]] = {}
    modules = dict(student.named_modules())
    for node in student.graph.nodes:
        if isinstance(modules.get(node.target), QuantConv2d | QuantLinear):
            source = node.args[0]
            while not isinstance(modules.get(source.target), ActivationQuantizer):
                source = source.args[0]
            found.setdefault(node.target, set()).add(source.target)
    return found


def _groups(graph: fx.GraphModule, layers: Sequence[str]) -> dict[tuple[str, ...], bool]:
    """Layers that read what the same nodes make, and whether that is the image."""
    producers: dict[str, set[fx.Node]] = {name: set() for name in layers}
    for node in graph.graph.nodes:
        if node.op == "call_module" and node.target in producers:
            producers[node.target].add(reader_of(graph, node).producer)
    merged: list[tuple[list[str], set[fx.Node]]] = []
    for name, made in producers.items():
        names, nodes = [name], set(made)
        for other in [m for m in merged if m[1] & nodes]:
            merged.remove(other)
            names, nodes = other[0] + names, nodes | other[1]
        merged.append((names, nodes))
    merged.sort(key=lambda pair: layers.index(pair[0][0]))
    return {tuple(n): any(p.op == "placeholder" for p in nodes) for n, nodes in merged}
