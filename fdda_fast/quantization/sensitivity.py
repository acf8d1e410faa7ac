"""What each layer's quantisation alone does to a network's output."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..config import QuantizeConfig
from ..files import written_whole
from ..fingerprints import fingerprint
from ..graphs import note_shapes
from ..losses import of_two_classes
from ..tracing import trace
from ..training import Progress
from .allocation import Widths
from .bits import IMAGE_BITS, Bits, check_bits
from .modules import ActivationQuantizer, QuantConv2d, QuantLinear
from .prepare import prepare, reader_of
from .quantize import quantize

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
    *,
    input_widths: Sequence[int] | None = None,
    keep_float: tuple[str, ...] = (),
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Measures every layer's weights and every input at every width, all else in FP32.

    Args:
        model: a network that `quantize` takes; not changed.
        images: float32 [N, C, H, W], real or synthetic; ranges come from them, too.
        widths: bits to try for weights, and for inputs where `input_widths` names no others.
        metric: `kl`, mean Kullback-Leibler divergence from the FP32 classes' probabilities, or
            `mse`, mean squared difference of the logits.
        keep_float: as in `QuantizeConfig`; these layers have no widths.
        checkpoint: JSON file in which every figure is kept; one that is there is not measured.
        progress: called as progress(figures known, total, {}).

    Raises:
        ValueError: an unknown metric, no widths or such outside 2..8, a checkpoint of another
            model, images or metric, or as `quantize`.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {METRICS}, got {metric!r}")
    input_widths = widths if input_widths is None else input_widths
    for label, given in (("widths", widths), ("input_widths", input_widths)):
        if not given:
            raise ValueError(f"{label} must name one width at least")
        for bits in given:
            check_bits(label, bits)
    graph = trace(model)
    figures = _Figures(checkpoint, fingerprint((metric, *keep_float), images, model))
    targets = torch.cat([graph(batch) for batch in images.split(_BATCH)])
    calibration = (images, targets.argmax(1))
    config = QuantizeConfig(steps=0, correct_batch_norms=False, keep_float=keep_float)
    shape = tuple(images.shape[1:])
    note_shapes(graph, shape)
    student = prepare(model, Bits(), keep_float=keep_float, image_shape=shape)
    layers = list(_input_quantizers(student))
    groups = _groups(graph, layers)
    total = len(layers) * len(set(widths)) + sum(
        1 if reads_image else len(set(input_widths)) for reads_image in groups.values()
    )

    def measure(student: fx.GraphModule, bits: int, active: Collection[str]) -> float:
        def run() -> float:
            network = _Partly(student, graph, active)
            logits = torch.cat([network.run(batch) for batch in images.split(_BATCH)])
            return _distance(logits, targets, metric)

        figure = figures.get(f"{bits} {' '.join(sorted(active))}", run)
        if progress is not None:
            progress(figures.asked, total, {})
        return figure

    weight: dict[str, dict[int, float]] = {name: {} for name in layers}
    inputs: dict[tuple[str, ...], dict[int, float]] = {group: {} for group in groups}
    for bits in sorted({*widths, *input_widths}):
        student = quantize(model, calibration, Bits(bits, bits), config)
        quantizers = _input_quantizers(student)
        if bits in widths:
            for name in layers:
                weight[name][bits] = measure(student, bits, {name})
        for group, reads_image in groups.items():
            width = IMAGE_BITS if reads_image else bits
            if width not in inputs[group] and (reads_image or bits in input_widths):
                active = set().union(*(quantizers[name] for name in group))
                inputs[group][width] = measure(student, bits, active)
    loss = {}
    for group, losses in inputs.items():
        for name in group:
            shared = losses if name == group[0] else dict.fromkeys(losses, 0.0)
            loss[name] = {(w, a): x + y for w, x in weight[name].items() for a, y in shared.items()}
    return Sensitivity({name: loss[name] for name in layers}, tuple(groups))


class _Figures:
    """Figures by name, in a file where there is one."""

    def __init__(self, path: str | Path | None, origin: str) -> None:
        self.asked = 0
        self._path = None if path is None else Path(path)
        self._values: dict[str, Any] = {"origin": origin}
        if self._path is not None and self._path.is_file():
            self._values = json.loads(self._path.read_text(encoding="utf-8"))
            if self._values.get("origin") != origin:
                raise ValueError(
                    f"{path}: was measured on another model, images, metric or keep_float"
                )

    def get(self, name: str, measure: Callable[[], float]) -> float:
        if name not in self._values:
            self._values[name] = measure()
            if self._path is not None:
                with written_whole(self._path) as temporary:
                    temporary.write_text(json.dumps(self._values, indent=0), encoding="utf-8")
        self.asked += 1
        return self._values[name]


def _distance(logits: torch.Tensor, targets: torch.Tensor, metric: str) -> float:
    if metric == "mse":
        return float(F.mse_loss(logits, targets))
    a, b = (of_two_classes(x).double().log_softmax(1) for x in (logits, targets))
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
