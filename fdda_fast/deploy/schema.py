"""What a node of a packed graph may be: typed, range-checked records with a JSON form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch

# One axis of a tensor, a kernel, a shift: generous for any CNN, small enough to never overflow.
MAX_EXTENT = 1 << 20
# The operators compute in float32.
MAX_NUMBER = torch.finfo(torch.float32).max


class ValueType(NamedTuple):
    """What flows along an edge.

    kind: `codes`, uint8 integers below 2**bits, NHWC if 4-d; `sums`, such codes summed over the
    image; `float`, float32, NCHW if 4-d; `floats`, a tuple of them.
    """

    kind: str
    bits: int = 0


class TensorSpec(NamedTuple):
    """Dtypes that a stored tensor may have, and its shape."""

    dtypes: tuple[torch.dtype, ...]
    shape: tuple[int, ...]


def _attribute(check: Callable[[Any], Any]) -> Any:
    return dataclasses.field(metadata={"check": check})


def _whole(value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"expected an integer in {low}..{high}, got {value!r}")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected a number, got {value!r}")
    if not abs(value) <= MAX_NUMBER:  # nor NaN
        raise ValueError("expected a finite number in the range of float32")
    return float(value)


def _wholes(value: Any, low: int, high: int, lengths: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or len(value) not in lengths:
        raise ValueError(f"expected {' or '.join(map(str, lengths))} integers, got {value!r}")
    return tuple(_whole(v, low, high) for v in value)


def whole(low: int, high: int = MAX_EXTENT) -> Any:
    return _attribute(lambda value: _whole(value, low, high))


def number() -> Any:
    return _attribute(_number)


def flag() -> Any:
    def check(value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError(f"expected true or false, got {value!r}")
        return value

    return _attribute(check)


def choice(*names: str) -> Any:
    def check(value: Any) -> str:
        if value not in names:
            raise ValueError(f"expected one of {names}, got {value!r}")
        return value

    return _attribute(check)


def wholes(low: int, high: int = MAX_EXTENT, *, lengths: Sequence[int]) -> Any:
    return _attribute(lambda value: _wholes(value, low, high, lengths))


def pair(low: int, high: int = MAX_EXTENT) -> Any:
    return wholes(low, high, lengths=(2,))


def optional(attribute: Any) -> Any:
    check = attribute.metadata["check"]
    return _attribute(lambda value: None if value is None else check(value))


class Op:
    """Base of the records: attributes are dataclass fields, checked when one is made.

    Class attributes:
        reads: the kinds allowed, one entry per input.
        makes: the kind of the output.

    Raises:
        ValueError: an attribute of the wrong type or out of range.
    """

    reads: ClassVar[tuple[tuple[str, ...], ...]] = (("float",),)
    makes: ClassVar[str] = "float"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            try:
                value = field.metadata["check"](getattr(self, field.name))
            except ValueError as error:
                raise ValueError(f"{type(self).__name__}.{field.name}: {error}") from None
            object.__setattr__(self, field.name, value)
        self.check()

    def check(self) -> None:
        """Raises ValueError where attributes contradict each other."""

    def tensors(self) -> dict[str, TensorSpec]:
        """The tensors that belong to the record."""
        return {}

    def result(self, inputs: Sequence[ValueType]) -> ValueType:
        """Type of the output. Raises ValueError where the inputs do not fit."""
        self.expect(inputs, self.reads)
        return ValueType(self.makes)

    @staticmethod
    def expect(inputs: Sequence[ValueType], reads: Sequence[tuple[str, ...]]) -> None:
        kinds = tuple(i.kind for i in inputs)
        if len(kinds) != len(reads) or any(k not in r for k, r in zip(kinds, reads, strict=True)):
            raise ValueError(f"reads {tuple('|'.join(r) for r in reads)}, got {kinds}")

    def run(self, tensors: dict[str, torch.Tensor], *inputs: Any) -> Any:
        raise NotImplementedError

    def macs(self, output_shape: Sequence[int]) -> int:
        """Multiply-accumulates of one call, from the output's shape (logical, [N, C, ...])."""
        return 0

    def attributes(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conv2dOp(Op):
    """Base of the convolutions."""

    in_channels: int = whole(1)
    out_channels: int = whole(1)
    kernel_size: tuple[int, int] = pair(1, 1024)
    stride: tuple[int, int] = pair(1, 1024)
    padding: tuple[int, int] = pair(0, 1024)
    dilation: tuple[int, int] = pair(1, 1024)
    groups: int = whole(1)

    def check(self) -> None:
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(
                f"{type(self).__name__}.groups: {self.groups} does not divide {self.in_channels} "
                f"and {self.out_channels} channels"
            )
        super().check()

    @property
    def depth(self) -> int:
        """Weights per output channel."""
        return math.prod(self.kernel_size) * self.in_channels // self.groups

    def macs(self, output_shape: Sequence[int]) -> int:
        return math.prod(output_shape) * self.depth


RECORDS: dict[str, type[Op]] = {}


def record(cls: type[Op]) -> type[Op]:
    """Makes `cls` a frozen dataclass that files may name."""
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    RECORDS[cls.__name__] = cls
    return cls


def make_record(name: Any, attributes: Any) -> Op:
    """A record from its JSON form. Raises ValueError when it is none."""
    cls = RECORDS.get(name) if isinstance(name, str) else None
    if cls is None:
        raise ValueError(f"unknown operation {name!r}")
    expected = {field.name for field in dataclasses.fields(cls)}
    if not isinstance(attributes, dict) or set(attributes) != expected:
        raise ValueError(f"{name}: expected the attributes {sorted(expected)}, got {attributes!r}")
    return cls(**attributes)
