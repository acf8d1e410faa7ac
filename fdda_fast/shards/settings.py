"""What decides the bytes of a set, so that nobody goes on with it under other settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..config import to_dict
from ..data.preprocessing import Preprocessing
from ..files import remove_temporaries
from ..fingerprints import fingerprint
from ..generator import Generator
from ..statistics import BNSCenters
from .plan import ShardConfig, ShardFolder, read_json, write_json

FORMAT = "fdda-fast shards 1"


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
    found = read_json(folder.settings)
    differing = sorted(n for n in {*found, *settings} if found.get(n) != settings.get(n))
    if differing:
        raise ValueError(f"{folder.path}: was started with other settings: {differing} differ")
