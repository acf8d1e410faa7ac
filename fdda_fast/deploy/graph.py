"""The graph of a packed model: nodes in execution order, validated, and its JSON form."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..data.preprocessing import MAX_SIDE
from . import glue, integer  # noqa: F401  (they fill the table of records)
from .schema import MAX_EXTENT, Op, TensorSpec, ValueType, make_record

_NAME = re.compile(r"[!-~]{1,400}")


def unique_name(name: str, used: Container[str]) -> str:
    """`name`, or with the first number behind it with which it is not in `used`.

    No attribute of a module has a colon in its name.
    """
    unique, i = name, 1
    while unique in used:
        unique, i = f"{name}:{i}", i + 1
    return unique


def name_of_module(name: str) -> str:
    """That of which `unique_name` made `name`."""
    return name.partition(":")[0]


@dataclass(frozen=True)
class Node:
    """One operation.

    Args:
        name: unique in the graph; its tensors are stored as `name.role`.
        op: the record of what it does.
        inputs: indices of values: 0 is the image, i + 1 what node i makes.
    """

    name: str
    op: Op
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """Nodes in execution order.

    Args:
        in_channels: of the image.
        image_size: (height, width) of the images it was made for.
        fixed_size: whether images of another size would give wrong results.
        nodes: each reads values made before it.
        output: index of the value that is returned, a float tensor.

    Raises:
        ValueError: names or edges that make no sense.
    """

    in_channels: int
    image_size: tuple[int, int]
    fixed_size: bool
    nodes: tuple[Node, ...]
    output: int

    def __post_init__(self) -> None:
        _check_int("in_channels", self.in_channels, 1, MAX_EXTENT)
        if not isinstance(self.image_size, tuple) or len(self.image_size) != 2:
            raise ValueError(f"graph.image_size: expected two integers, got {self.image_size!r}")
        for size in self.image_size:
            _check_int("image_size", size, 1, MAX_SIDE)
        if not isinstance(self.fixed_size, bool):
            raise ValueError(f"graph.fixed_size: expected true or false, got {self.fixed_size!r}")
        names = set()
        for i, node in enumerate(self.nodes):
            if not isinstance(node.name, str) or not _NAME.fullmatch(node.name):
                raise ValueError(f"graph: bad node name {node.name!r}")
            if node.name in names:
                raise ValueError(f"graph: two nodes are called {node.name!r}")
            names.add(node.name)
            for source in node.inputs:
                _check_int(f"inputs of {node.name!r}", source, 0, i)
        _check_int("output", self.output, 0, len(self.nodes))
        kind = self.types()[self.output].kind
        if kind != "float":
            raise ValueError(f"graph.output: expected a float tensor, got {kind}")

    def types(self) -> list[ValueType]:
        """Type of every value, the image's first. Raises ValueError where an edge does not fit."""
        types = [ValueType("float")]
        for node in self.nodes:
            try:
                types.append(node.op.result([types[i] for i in node.inputs]))
            except ValueError as error:
                raise ValueError(
                    f"graph: node {node.name!r} ({type(node.op).__name__}) {error}"
                ) from None
        return types

    def last_uses(self) -> list[tuple[int, ...]]:
        """For every node the values that nobody needs after it."""
        last = {source: i for i, node in enumerate(self.nodes) for source in node.inputs}
        dead: list[list[int]] = [[] for _ in self.nodes]
        for value, i in last.items():
            if value != self.output:
                dead[i].append(value)
        return [tuple(values) for values in dead]

    def tensor_specs(self) -> dict[str, TensorSpec]:
        return {
            f"{node.name}.{role}": spec
            for node in self.nodes
            for role, spec in node.op.tensors().items()
        }

    def check_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raises ValueError unless `tensors` are exactly those that the nodes need."""
        specs = self.tensor_specs()
        if set(specs) != set(tensors):
            missing, foreign = sorted(set(specs) - set(tensors)), sorted(set(tensors) - set(specs))
            raise ValueError(f"tensors: missing {missing}, unexpected {foreign}")
        for name, spec in specs.items():
            tensor = tensors[name]
            if tensor.dtype not in spec.dtypes or tuple(tensor.shape) != spec.shape:
                raise ValueError(
                    f"tensor {name!r}: expected {' or '.join(map(str, spec.dtypes))} of shape "
                    f"{spec.shape}, got {tensor.dtype} of shape {tuple(tensor.shape)}"
                )
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"tensor {name!r}: holds infinities or NaN")
            if name.endswith(".weight_offset") and (tensor.long().abs().max() > integer.MAX_OFFSET):
                raise ValueError(f"tensor {name!r}: offsets above {integer.MAX_OFFSET}")

    def to_dict(self) -> dict[str, Any]:
        return {
            "in_channels": self.in_channels,
            "image_size": list(self.image_size),
            "fixed_size": self.fixed_size,
            "nodes": [
                {
                    "name": node.name,
                    "op": type(node.op).__name__,
                    "inputs": list(node.inputs),
                    "attributes": node.op.attributes(),
                }
                for node in self.nodes
            ],
            "output": self.output,
        }

    @classmethod
    def from_dict(cls, values: Any) -> Graph:
        """Raises ValueError when `values` is not what to_dict returns."""
        keys = ("in_channels", "image_size", "fixed_size", "nodes", "output")
        _check_keys("graph", values, keys)
        if not isinstance(values["nodes"], list) or not isinstance(values["image_size"], list):
            raise ValueError("graph: nodes and image_size must be lists")
        nodes = []
        for node in values["nodes"]:
            _check_keys("graph node", node, ("name", "op", "inputs", "attributes"))
            if not isinstance(node["inputs"], list):
                raise ValueError(f"graph: inputs of node {node['name']!r} must be a list")
            op = make_record(node["op"], node["attributes"])
            nodes.append(Node(node["name"], op, tuple(node["inputs"])))
        return cls(
            in_channels=values["in_channels"],
            image_size=tuple(values["image_size"]),
            fixed_size=values["fixed_size"],
            nodes=tuple(nodes),
            output=values["output"],
        )


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"graph.{name}: expected an integer in {low}..{high}, got {value!r}")


def _check_keys(name: str, values: Any, keys: tuple[str, ...]) -> None:
    if not isinstance(values, dict) or set(values) != set(keys):
        found = sorted(map(str, values)) if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{name}: expected the keys {sorted(keys)}, got {found}")
