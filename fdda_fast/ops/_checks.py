"""Argument checks of the public functions: every message names argument, expected and got."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(condition: bool, argument: str, expected: object, got: object) -> None:
    """Raise ValueError unless `condition`."""
    if not condition:
        raise ValueError(f"{argument}: expected {expected}, got {got}")


def check_tensor(
    value: object,
    argument: str,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int | None] | None = None,
) -> None:
    """Raise TypeError for another type or dtype, ValueError for another shape (None: any size)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        names = " or ".join(str(d) for d in dtypes)
        raise TypeError(f"{argument}: expected {names}, got {value.dtype}")
    if shape is not None and value.shape != shape:
        if shape.count(None) == len(shape) == value.dim():  # any sizes: quickly
            return
        _check_sizes(value, argument, shape)


def _check_sizes(value: Tensor, argument: str, shape: Sequence[int | None]) -> None:
    sizes = value.shape
    if len(shape) == len(sizes):
        pairs = zip(shape, sizes, strict=True)
        if all(want is None or want == have for want, have in pairs):
            return
    expected = ["any" if size is None else size for size in shape]
    raise ValueError(f"{argument}: expected shape {expected}, got {list(sizes)}")


def check_int(value: object, argument: str, low: int, high: int) -> None:
    """Raise unless `value` is an integer in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{argument}: expected an integer, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{argument}: expected {low} to {high}, got {value}")


def pair(value: int | Sequence[int], argument: str, low: int) -> list[int]:
    """`value` twice, or its two elements, each at least `low`."""
    values = [value, value] if isinstance(value, int) else list(value)
    check(len(values) == 2, argument, "an integer or two", value)
    for v in values:
        check_int(v, argument, low, 2**31 - 1)
    return values
