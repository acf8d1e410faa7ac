"""Graph preparation: a traced float CNN in, the same network with fake quantisation out."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..graphs import (
    ADDS,
    RELU6S,
    RELUS,
    node_kind,
    note_shapes,
    pads_with_zeros,
    settings_of,
    slices_of,
)
from ..tracing import trace
from .bits import IMAGE_BITS, RESIDUAL_BITS, Bits
from .modules import ActivationQuantizer, own_parameters, quantized_layer

PLACEMENTS = ("full_integer", "paper")

_VALUE_PRESERVING = {
    nn.MaxPool2d, nn.Dropout, nn.Dropout2d, nn.Identity, nn.Flatten,
    F.max_pool2d, torch.max_pool2d, F.dropout, F.dropout2d, torch.flatten, torch.reshape,
    torch.squeeze, "flatten", "view", "reshape", "squeeze", "contiguous",
}  # fmt: skip
AVERAGE_POOLS = {nn.AvgPool2d, F.avg_pool2d}
# Arithmetic on activations against weights or other activations for which there is no low-bit form.
_UNQUANTIZABLE = {
    nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.Bilinear, nn.MultiheadAttention, nn.RNN, nn.LSTM, nn.GRU,
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose2d, F.linear, F.bilinear,
    F.scaled_dot_product_attention, torch.conv1d, torch.conv2d, torch.conv3d,
    torch.matmul, torch.bmm, torch.mm, torch.einsum, operator.matmul, "matmul", "bmm", "mm",
}  # fmt: skip


def prepare(
    model: nn.Module,
    bits: Bits,
    *,
    placement: str = "full_integer",
    keep_float: tuple[str, ...] = (),
    from_zero: bool = False,
    image_shape: tuple[int, int, int] | None = None,
) -> fx.GraphModule:
    """Copies and traces `model` and inserts fake quantisation.

    Args:
        model: a CNN that torch.fx can trace; not changed.
        bits: widths.
        placement: `full_integer` quantises the input of every conv and linear layer (the image at
            8 bits); a tensor is quantised where it is produced. Where a residual addition reads
            it, too, that happens twice: to 8 bits, which the addition reads, and from these to
            the width of the layers. A linear layer behind a global average pool reads the exact
            sums of the pooled integers. `paper` puts a quantiser after every ReLU and ReLU6 and
            nowhere else (image, pooled features and linear bottlenecks stay in float).
        keep_float: names of layers (or of nodes that cannot be quantised) to leave in float.
        from_zero: the paper's moving average for activation ranges, see ActivationQuantizer.
        image_shape: (C, H, W), where an average pool over the whole of such an image's map is to
            count as a global one.

    Returns:
        A GraphModule in eval mode with QuantConv2d, QuantLinear and ActivationQuantizer modules.

    Raises:
        ValueError: unknown placement or name; the model cannot be traced; a layer that cannot be
            quantised and is not in keep_float.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"placement must be one of {PLACEMENTS}, got {placement!r}")
    graph_module = trace(model)
    own_parameters(graph_module)
    if image_shape is not None:
        note_shapes(graph_module, image_shape)
    layers = _quantizable_layers(graph_module, set(keep_float))
    if not layers:
        raise ValueError("the model has no Conv2d or Linear layer to quantise")
    names = {node.target for node in layers}
    unknown = set(bits.overrides) - names
    if unknown:
        raise ValueError(f"bits.overrides names no quantised layer: {sorted(unknown)}")

    ends = {layers[0].target, layers[-1].target} if bits.first_last is not None else set()
    for name in names:
        weight_bits = bits.first_last if name in ends else bits.weight
        weight_bits = bits.overrides[name][0] if name in bits.overrides else weight_bits
        layer = graph_module.get_submodule(name)
        graph_module.set_submodule(name, quantized_layer(layer, weight_bits))

    readers = [reader_of(graph_module, layer) for layer in layers]
    integer = placement == "full_integer"
    if integer:
        spots = list(dict.fromkeys(reader.producer for reader in readers))
    else:
        spots = [
            n for n in graph_module.graph.nodes if node_kind(graph_module, n) in RELUS | RELU6S
        ]
    widths = _activation_bits(graph_module, readers, spots, bits)

    def quantize(node: fx.Node, name: str, width: int, users: Sequence[fx.Node]) -> fx.Node:
        quantizer = ActivationQuantizer(width, include_zero=integer, from_zero=from_zero)
        return _insert_after(graph_module, node, name, quantizer, users)

    for spot in spots:
        name, width = f"{spot.name}_quantizer", widths[spot]
        if not (integer and width < RESIDUAL_BITS and _feeds_addition(graph_module, spot)):
            quantize(spot, name, width, list(spot.users))
            continue
        wide = quantize(spot, f"{spot.name}_residual", RESIDUAL_BITS, list(spot.users))
        users: dict[fx.Node, list[fx.Node]] = {}
        for reader in readers:
            if reader.producer is spot:
                users.setdefault(reader.source, []).append(reader.user)
        for source, group in users.items():
            quantize(wide if source is spot else source, f"{source.name}_quantizer", width, group)
    for node in graph_module.graph.nodes:
        for name in ("shape", "constant"):  # new nodes have none
            node.meta.pop(name, None)
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module


def _quantizable_layers(graph_module: fx.GraphModule, keep_float: set[str]) -> list[fx.Node]:
    layers, problems = [], []
    for node in graph_module.graph.nodes:
        kind, name = node_kind(graph_module, node), str(node.target)
        kept = {name, node.name} & keep_float
        keep_float -= kept
        if kept:
            continue
        if kind in (nn.Conv2d, nn.Linear):
            module = graph_module.get_submodule(node.target)
            if kind is nn.Conv2d and module.padding_mode != "zeros":
                problems.append(f"{name} (Conv2d with padding_mode={module.padding_mode!r})")
            layers.append(node)
        elif kind in _UNQUANTIZABLE or (
            isinstance(kind, type) and issubclass(kind, nn.Conv2d | nn.Linear)
        ):
            label = getattr(kind, "__name__", kind)
            problems.append(f"{name if node.op == 'call_module' else node.name} ({label})")
    if problems:
        raise ValueError(
            "no low-bit form for: " + ", ".join(problems) + ". Name them in keep_float to leave "
            "them in float"
        )
    if keep_float:
        raise ValueError(f"keep_float names nothing in the model: {sorted(keep_float)}")
    return layers


def moves_values(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node only moves or selects values, or adds zeros, which every range holds: where
    its input is quantised, its output is."""
    return (
        node_kind(graph_module, node) in _VALUE_PRESERVING
        or slices_of(node) is not None
        or pads_with_zeros(graph_module, node)
    )


def is_global_average_pool(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node averages each channel over the whole image.

    Of an average pool with a size of its own, that is known where nodes carry their shapes.
    """
    kind = node_kind(graph_module, node)
    if kind in AVERAGE_POOLS:
        shape = node.args[0].meta.get("shape")
        return shape is not None and _pools_whole(graph_module, node, tuple(shape[2:]))
    if kind in (nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d):
        size = settings_of(graph_module, node, "output_size")["output_size"]
        return size in (1, (1, 1), [1, 1])
    if kind in (torch.mean, "mean"):
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return isinstance(dims, list | tuple) and sorted(d % 4 for d in dims) == [2, 3]
    return False


def _pools_whole(graph_module: fx.GraphModule, node: fx.Node, size: tuple[int, ...]) -> bool:
    """Whether an average pool takes all of a map of that size, and divides by its pixels."""
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
    given = settings_of(graph_module, node, *names, "divisor_override")
    kernel, padding = given["kernel_size"], given.get("padding", 0)
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    plain = padding in (0, (0, 0), [0, 0]) and given.get("divisor_override") is None
    return plain and isinstance(kernel, list | tuple) and tuple(kernel) == size


class _Reader(NamedTuple):
    """Where a layer's input comes from.

    producer: makes the values; behind it come only ops that move them. source, user: the last
    edge at which they can be quantised for this layer.
    """

    layer: fx.Node
    producer: fx.Node
    source: fx.Node
    user: fx.Node


def reader_of(graph_module: fx.GraphModule, layer: fx.Node) -> _Reader:
    through_pool = isinstance(graph_module.get_submodule(layer.target), nn.Linear)
    user, source = layer, layer.args[0]
    producer = source
    while True:
        if through_pool and is_global_average_pool(graph_module, producer):
            user, source = producer, producer.args[0]
            producer = source
        elif moves_values(graph_module, producer):
            # Sums have no form that is cut or padded.
            through_pool &= node_kind(graph_module, producer) in _VALUE_PRESERVING
            producer = producer.args[0]
        else:
            return _Reader(layer, producer, source, user)


def _feeds_addition(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the values are added to other ones, moved before or not."""
    for user in node.users:
        kind = node_kind(graph_module, user)
        if kind in ADDS and len(user.all_input_nodes) == 2:
            return True
        if moves_values(graph_module, user) and _feeds_addition(graph_module, user):
            return True
    return False


def _activation_bits(
    graph_module: fx.GraphModule, readers: list[_Reader], spots: list[fx.Node], bits: Bits
) -> dict[fx.Node, int]:
    widths = dict.fromkeys(spots, bits.activation)
    if bits.first_last is not None:
        produced = next((s for s in spots if _reads(s, readers[0].layer)), None)
        for spot in (produced, readers[-1].producer):
            if spot in widths:
                widths[spot] = bits.first_last
    wanted: dict[fx.Node, list[int]] = {}
    for reader in readers:
        width = widths.get(reader.producer, bits.activation)
        override = bits.overrides.get(reader.layer.target, (0, width))
        wanted.setdefault(reader.producer, []).append(override[1])
    widths.update((spot, max(wanted[spot])) for spot in spots if spot in wanted)
    for spot in spots:
        if spot.op == "placeholder":
            widths[spot] = IMAGE_BITS
    return widths


def _reads(node: fx.Node, ancestor: fx.Node) -> bool:
    """Whether `ancestor` is reached from `node` by going back along first inputs."""
    while node.op != "placeholder":
        if node is ancestor:
            return True
        inputs = node.all_input_nodes
        if not inputs:
            return False
        node = inputs[0]
    return False


def _insert_after(
    graph_module: fx.GraphModule,
    node: fx.Node,
    name: str,
    module: nn.Module,
    users: Sequence[fx.Node],
) -> fx.Node:
    """Puts `module` between `node` and some of its users, under a name that is not taken."""
    while hasattr(graph_module, name):
        name = f"{name}_"
    graph_module.add_submodule(name, module)
    with graph_module.graph.inserting_after(node):
        new = graph_module.graph.call_module(name, (node,))
    for user in users:
        user.replace_input_with(node, new)
    return new
