"""From a fake-quantised torch.fx network to a packed integer graph."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import fx

from .. import ops
from ..data.preprocessing import Preprocessing
from ..graphs import describe, node_kind, pads_with_zeros, slices_of
from ..quantization.modules import ActivationQuantizer, QuantConv2d, QuantLinear
from ..quantization.prepare import is_global_average_pool
from . import fold
from .fold import Codes
from .fuse import find_groups, layer_names
from .graph import Graph, Node, unique_name
from .integer import (
    Dequantize,
    DequantizeSums,
    PackedConv2d,
    PackedLinear,
    Quantize,
    Requantize,
    SumPool,
)
from .runtime import PackedModel
from .schema import Op
from .shapes import annotate
from .translate import (
    MAX_POOLS,
    RESHAPES,
    geometry,
    remove_bypassed,
    translate,
)


def pack(
    qmodel: fx.GraphModule,
    example_input: torch.Tensor,
    preprocessing: Preprocessing | None = None,
    class_names: Sequence[str] | None = None,
) -> PackedModel:
    """Lowers a fake-quantised network to integers.

    Args:
        qmodel: from `prepare(..., placement="full_integer")`, its activation ranges observed; not
            changed.
        example_input: float32 [N, C, H, W], images as the network will get them.
        preprocessing: how an image file becomes an input; travels with the model.
        class_names: one per logit; travel with the model.

    Returns:
        A PackedModel. What has no integer form between two quantisers runs in float32 there; see
        PackedModel.summary for what does.

    Raises:
        ValueError: not a prepared network, another placement, ranges that were never observed, an
            example_input that the network cannot take, a node that cannot be packed, or sums that
            could overflow.
    """
    if not isinstance(qmodel, fx.GraphModule) or not any(
        isinstance(m, QuantConv2d | QuantLinear) for m in qmodel.modules()
    ):
        raise ValueError("pack needs the GraphModule that prepare or quantize returns")
    if example_input.ndim != 4 or not len(example_input):
        raise ValueError(f"example_input must be [N, C, H, W], got {tuple(example_input.shape)}")
    graph_module = copy.deepcopy(qmodel).cpu().float().eval()
    example = example_input[:1].detach().cpu().float()
    return _Lowering(graph_module, example).run(preprocessing, class_names)


class _Value(NamedTuple):
    """Where a torch.fx value lives: its index in the graph, its kind, what its codes mean."""

    index: int
    kind: str
    codes: Codes | None = None


class _Lowering:
    def __init__(self, graph_module: fx.GraphModule, example: torch.Tensor) -> None:
        self.graph_module = graph_module
        self.codes = {
            name: fold.activation_codes(name, module)
            for name, module in graph_module.named_modules()
            if isinstance(module, ActivationQuantizer)
        }
        self.fixed_size = annotate(graph_module, example)
        self.example = example
        remove_bypassed(graph_module)
        self.groups = find_groups(graph_module)
        self.names = layer_names(graph_module, self.groups)
        self.used = set(self.names.values())
        self.nodes: list[Node] = []
        self.tensors: dict[str, torch.Tensor] = {}
        self.values: dict[fx.Node, _Value] = {}
        self.floats: dict[tuple[int, int], int] = {}

    def run(
        self, preprocessing: Preprocessing | None, class_names: Sequence[str] | None
    ) -> PackedModel:
        inner = {node for group in self.groups.values() for node in group.inner}
        output = None
        for node in self.graph_module.graph.nodes:
            if node.op == "output":
                if not isinstance(node.args[0], fx.Node) or node.args[0].meta["shape"] is None:
                    raise ValueError(f"the network must return one tensor, got {node.args[0]}")
                output = self._float(node.args[0])
                count = node.args[0].meta["shape"][-1]
            elif node not in inner and "constant" not in node.meta:
                self.values[node] = self._lower(node)
        if class_names is not None and len(class_names) != count:
            raise ValueError(f"{len(class_names)} class names for {count} logits")
        graph = Graph(
            in_channels=self.example.shape[1],
            image_size=tuple(self.example.shape[2:]),
            fixed_size=self.fixed_size,
            nodes=tuple(self.nodes),
            output=output,
        )
        model = PackedModel(graph, self.tensors, preprocessing, class_names)
        model(self.example)  # what cannot run is refused here, not by the user's first image
        return model

    def _lower(self, node: fx.Node) -> _Value:
        if node.op == "placeholder":
            return _Value(0, "float")
        if node in self.groups:
            return self._layer(node)
        kind = node_kind(self.graph_module, node)
        if kind is ActivationQuantizer:
            return self._quantize(node)
        source = self.values.get(node.args[0]) if node.args else None
        if source is not None and source.kind != "float":
            integer = self._integer(node, kind, source)
            if integer is not None:
                return integer
        return self._glue(node)

    def _quantize(self, node: fx.Node) -> _Value:
        codes, source = self.codes[node.target], self.values[node.args[0]]
        made = {"scale": codes.scale, "zero_point": codes.paper_zero_point, "bits": codes.bits}
        if source.kind == "codes":
            read = source.codes
            op: Op = Requantize(x_scale=read.scale, x_zero_point=read.zero_point, **made)
            index = source.index
        else:
            op, index = Quantize(**made), self._float(node.args[0])
        return _Value(self._emit(node.target, op, [index]), "codes", codes)

    def _integer(self, node: fx.Node, kind: object, source: _Value) -> _Value | None:
        """Ops that codes and sums go through as they are, else None."""
        name = _name(node)
        pads = pads_with_zeros(self.graph_module, node)
        moves = kind in MAX_POOLS or kind in RESHAPES or slices_of(node) is not None or pads
        if source.kind == "codes" and moves:
            op = translate(self.graph_module, node).op
            op = replace(op, value=source.codes.zero_point) if pads else op
            return source._replace(index=self._emit(name, op, [source.index]))
        if source.kind == "codes" and is_global_average_pool(self.graph_module, node):
            return _Value(self._emit(name, SumPool(), [source.index]), "sums", source.codes)
        if source.kind == "sums" and (
            kind in RESHAPES or is_global_average_pool(self.graph_module, node)
        ):
            # Sums are [N, C] or [N, C, 1, 1], see `_float`; of the latter, a pool is the same.
            shape, users = node.meta["shape"], node.users
            moved = all(node_kind(self.graph_module, user) in RESHAPES for user in users)
            known = len(shape) in (2, 4) or (len(shape) == 3 and moved)
            return source if known and math.prod(shape[2:]) == 1 else None
        return None

    def _glue(self, node: fx.Node) -> _Value:
        op, inputs, tensors = translate(self.graph_module, node)
        index = self._emit(_name(node), op, [self._float(n) for n in inputs], tensors)
        return _Value(index, op.makes)

    def _layer(self, last: fx.Node) -> _Value:
        group = self.groups[last]
        layer = self.graph_module.get_submodule(group.layer.target)
        name = group.layer.target
        source = self.values[group.layer.args[0]]
        if source.codes is None:
            read = describe(self.graph_module, group.layer.args[0])
            raise ValueError(
                f"{describe(self.graph_module, group.layer)}: its input, of {read}, is not "
                "quantised; pack needs a model prepared with placement='full_integer', and between "
                "quantiser and layer what has a form on codes"
            )
        made = self.codes[group.quantizer.target] if group.quantizer else None
        inputs, residual, residual_scale = [source.index], None, None
        if group.residual is not None:
            added = self.values[group.residual]
            residual = added.codes if added.kind == "codes" else None
            inputs.append(added.index if residual else self._float(group.residual))
            residual_scale = (made.scale if made else 1.0) / (residual.scale if residual else 1.0)

        q, offset, step = fold.weight_codes(name, layer)
        norm = self.graph_module.get_submodule(group.norm.target) if group.norm else None
        multiplier, bias = fold.epilogue(layer, norm, step, source.codes, made, residual)
        tensors = {
            "weight": ops.pack_weight(q, layer.weight_bits),
            "weight_offset": fold.smallest_integers(offset),
            "multiplier": multiplier,
            "bias": bias,
        }
        epilogue = {
            "weight_bits": layer.weight_bits,
            "x_zero_point": source.codes.zero_point,
            "residual_scale": residual_scale,
            "output_bits": made.bits if made else None,
            "output_range": made.code_range(group.clip) if made else None,
        }
        make = self._conv if isinstance(layer, QuantConv2d) else self._linear
        index = self._append(self.names[last], make(layer, epilogue), inputs, tensors)
        return _Value(index, "codes" if made else "float", made)

    @staticmethod
    def _conv(layer: QuantConv2d, epilogue: dict) -> PackedConv2d:
        return PackedConv2d(**geometry(layer), **epilogue)

    @staticmethod
    def _linear(layer: QuantLinear, epilogue: dict) -> PackedLinear:
        return PackedLinear(
            in_features=layer.in_features, out_features=layer.out_features, **epilogue
        )

    def _float(self, node: fx.Node) -> int:
        """Index of a node's value as floats."""
        value = self.values[node]
        if value.codes is None:
            return value.index
        spatial = value.kind == "sums" and len(node.meta["shape"]) == 4
        key = (value.index, spatial)
        if key not in self.floats:
            meaning = {"scale": value.codes.scale, "zero_point": value.codes.zero_point}
            if value.kind == "sums":
                op: Op = DequantizeSums(**meaning, spatial=spatial)
            else:
                op = Dequantize(**meaning)
            name = f"{self.nodes[value.index - 1].name}_float"
            self.floats[key] = self._emit(name, op, [value.index])
        return self.floats[key]

    def _emit(
        self,
        name: str,
        op: Op,
        inputs: Sequence[int],
        tensors: dict[str, torch.Tensor] | None = None,
    ) -> int:
        """Appends a node of this name, or another where it is taken; returns its value's index."""
        unique = unique_name(name, self.used)
        self.used.add(unique)
        return self._append(unique, op, inputs, tensors or {})

    def _append(
        self, name: str, op: Op, inputs: Sequence[int], tensors: dict[str, torch.Tensor]
    ) -> int:
        self.nodes.append(Node(name, op, tuple(inputs)))
        for role, tensor in tensors.items():
            self.tensors[f"{name}.{role}"] = tensor.detach().contiguous()
        return len(self.nodes)


def _name(node: fx.Node) -> str:
    return node.target if node.op == "call_module" else node.name
