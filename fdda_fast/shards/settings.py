"""What decides the bytes of a set, so that nobody goes on with it under other settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..config import to_dict
from ..data.preprocessing import Preprocessing
from ..files import remove_temporaries
from ..fingerprints import fingerprint
from ..generator import Generator
from ..statistics import BNSCenters
from .plan import FORMAT, ShardConfig, ShardFolder, read_json, write_json


def describe(
    generators: Sequence[Generator],
    config: ShardConfig,
    preprocessing: Preprocessing,
    teacher: nn.Module | None,
    centers: BNSCenters | None,
) -> dict[str, Any]:
    """All that decides the bytes."""
    values: dict[str, Any] = {
        "format": FORMAT,
        "config": to_dict(config),
        "preprocessing": to_dict(preprocessing),
        "generators": [fingerprint({}, g) for g in generators],
        "class_counts": [g.num_classes for g in generators],
    }
    if teacher is not None:
        values["teacher"] = fingerprint({}, teacher)
    if centers is not None:
        values["centers"] = fingerprint({}, *centers.mean, *centers.var)
    return values


def agree(folder: ShardFolder, settings: dict[str, Any]) -> None:
    """The first process says what is made; the others must want the same.

    Raises:
        ValueError: they do not.
    """
    remove_temporaries(folder.settings)
    if not folder.settings.is_file():
        write_json(folder.settings, settings)
    found, wanted = _flat(read_json(folder.settings)), _flat(settings)
    differing = sorted(n for n in {*found, *wanted} if found.get(n) != wanted.get(n))
    if differing:
        raise ValueError(f"{folder.path}: was started with other settings: {differing} differ")


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """With names of two parts for what is in a table."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = _flat(value) if isinstance(value, Mapping) else {"": value}
        flat |= {f"{name}.{part}".rstrip("."): v for part, v in inner.items()}
    return flat
