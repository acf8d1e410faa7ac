"""What every layer costs at every width, taken from packed networks."""

from __future__ import annotations

import statistics
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import nn

from ..quantization.allocation import Widths
from ..quantization.bits import Bits
from ..quantization.modules import quantizer_mode
from ..quantization.prepare import prepare
from ..training import Progress
from .fuse import layer_groups
from .lower import pack
from .runtime import PackedModel

COSTS = ("bytes", "bit_operations", "average_bits", "seconds")
_ROUNDS, _REPEATS = 5, 5
# A node's numbers in the file's JSON have as many digits as they need.
_NODE_BYTES = 32


def packed_costs(
    model: nn.Module,
    images: torch.Tensor,
    widths: Mapping[str, Collection[Widths]],
    kind: str,
    progress: Progress | None = None,
    *,
    keep_float: tuple[str, ...] = (),
) -> dict[str, dict[Widths, float]]:
    """Costs for `allocate`, of networks that have one pair of widths throughout.

    Every sum over the layers is that of the whole network: what does not belong to a layer (input
    and residual quantisation, pools, the file's graph) counts at the first one.

    Args:
        model: the exact network; not changed.
        images: float32 [N, C, H, W]; latency is that of this batch.
        widths: layer -> its pairs (weight bits, input bits), as in `Sensitivity.loss`.
        kind: `bytes`, of the packed file, with some room for digits; `bit_operations`,
            multiply-accumulates for one image times weight bits times input bits (as in Baskin et
            al., UNIQ, 2018); `average_bits`, of the weights; `seconds`, the medians that
            `PackedModel.profile` measures on this machine, with the threads in use.
        progress: called as progress(networks packed, total, {}).
        keep_float: as in `QuantizeConfig`; these layers' costs count at the first one, too.

    Raises:
        ValueError: an unknown kind, layers that are not those of the network, or as `pack`.
        RuntimeError: `seconds` without the compiled operators.
    """
    if kind not in COSTS:
        raise ValueError(f"kind must be one of {COSTS}, got {kind!r}")
    pairs = sorted({pair for given in widths.values() for pair in given})
    shape = tuple(images.shape[1:])
    networks: dict[Widths, PackedModel] = {}
    for pair in pairs:
        student = prepare(model, Bits(*pair), keep_float=keep_float, image_shape=shape)
        with quantizer_mode(student, "observe"), torch.no_grad():
            student(images)
        networks[pair] = pack(student, images[:1])
        if progress is not None:
            progress(len(networks), len(pairs), {})
    # The same in all of them; a module that is called twice is two layers.
    layers = {n: g.layer.target for n, (_, g) in layer_groups(student, images[:1]).items()}
    if set(layers.values()) != widths.keys():
        raise ValueError("widths must be of the network's layers, all of them")
    measured = _MEASURES[kind](networks, layers, images)
    costs: dict[str, dict[Widths, float]] = {name: {} for name in widths}
    rest = 0.0
    for pair, (nodes, others) in measured.items():
        rest = max(rest, others)
        for node, name in layers.items():
            if pair in widths[name]:
                costs[name][pair] = costs[name].get(pair, 0.0) + nodes[node]
    first = next(iter(costs))
    costs[first] = {pair: cost + rest for pair, cost in costs[first].items()}
    return {name: {pair: costs[name][pair] for pair in widths[name]} for name in widths}


_Networks = Mapping[Widths, PackedModel]
_Layers = Mapping[str, str]
_Measured = dict[Widths, tuple[dict[str, float], float]]


def _bytes(networks: _Networks, layers: _Layers, images: torch.Tensor) -> _Measured:
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.fdda"
        for pair, packed in networks.items():
            nodes = {row.name: float(row.weight_bytes) for row in packed.summary()}
            packed.save(file)
            own = sum(nodes[node] for node in layers)
            measured[pair] = nodes, file.stat().st_size - own + _NODE_BYTES * len(nodes)
    return measured


def _bit_operations(networks: _Networks, layers: _Layers, images: torch.Tensor) -> _Measured:
    measured = {}
    for pair, packed in networks.items():
        macs = {row.name: row.macs for row in packed.summary()}
        types = packed.graph.types()
        nodes = [node for node in packed.graph.nodes if node.name in layers]
        bits = {n.name: n.op.weight_bits * types[n.inputs[0]].bits for n in nodes}
        measured[pair] = {n: float(macs[n] * bits[n]) for n in layers}, 0.0
    return measured


def _average_bits(networks: _Networks, layers: _Layers, images: torch.Tensor) -> _Measured:
    measured = {}
    for pair, packed in networks.items():
        depths = {n.name: n.op.rows_and_depth() for n in packed.graph.nodes if n.name in layers}
        # A module that is called twice has its weights once, and so half of them each time.
        calls = Counter(layers.values())
        sizes = {n: rows * depth / calls[layers[n]] for n, (rows, depth) in depths.items()}
        total = sum(sizes.values())
        measured[pair] = {n: pair[0] * size / total for n, size in sizes.items()}, 0.0
    return measured


def _seconds(networks: _Networks, layers: _Layers, images: torch.Tensor) -> _Measured:
    """The networks take turns, so that a change of clock speed or of load hits all of them."""
    rounds = [{p: n.profile(images, _REPEATS) for p, n in networks.items()} for _ in range(_ROUNDS)]
    measured = {}
    for pair in networks:
        runs = zip(*(profiles[pair] for profiles in rounds), strict=True)
        nodes = {s[0].node.name: statistics.median(step.seconds for step in s) for s in runs}
        measured[pair] = nodes, sum(taken for name, taken in nodes.items() if name not in layers)
    return measured


_MEASURES = {
    "bytes": _bytes,
    "bit_operations": _bit_operations,
    "average_bits": _average_bits,
    "seconds": _seconds,
}
