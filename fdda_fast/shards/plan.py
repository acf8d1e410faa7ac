"""What a set of shards consists of: settings, files, and the label of every image."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import Section
from ..files import written_whole

FORMAT = "fdda-fast shards 1"
BLOCK = 64  # images that are made together; they have one generator
IMAGE_FORMATS = ("png", "raw")
# Odd multipliers near 2^64 times the fractional parts of the golden ratio and of sqrt(2): the
# multiples of each fill the unit interval evenly, and the two have nothing to do with one another.
_GOLDEN, _SQRT_2 = 0x9E3779B97F4A7C15, 0x6A09E667F3BCC909


@dataclass(frozen=True)
class ShardConfig(Section):
    """What is written.

    Args:
        num_images: indices 0 to num_images - 1 are made.
        shard_size: indices per file, a multiple of 64.
        image_format: `png`, or `raw`: uint8 arrays (.npy), larger and quicker.
        seed: decides every draw.
        class_weights: relative frequency per class; none: all classes alike.
        min_confidence: images that the teacher gives their class with a lower probability are left
            out, 0: none.
    """

    num_images: int = 10_000
    shard_size: int = 1024
    image_format: str = "png"
    seed: int = 0
    class_weights: tuple[float, ...] = ()
    min_confidence: float = 0.0

    def __post_init__(self) -> None:
        self._require("num_images", self.num_images >= 1, ">= 1")
        multiple = self.shard_size >= 1 and self.shard_size % BLOCK == 0
        self._require("shard_size", multiple, f"a positive multiple of {BLOCK}")
        self._require("image_format", self.image_format in IMAGE_FORMATS, f"one of {IMAGE_FORMATS}")
        self._require("seed", self.seed >= 0, ">= 0")
        weights = np.array(self.class_weights, float)
        valid = bool(np.isfinite(weights).all() and (weights >= 0).all() and weights.any())
        self._require("class_weights", not self.class_weights or valid, "finite, >= 0, one > 0")
        self._require("min_confidence", 0 <= self.min_confidence <= 1, "in [0, 1]")

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.shard_size)

    def indices(self, shard: int) -> range:
        """Of the images of a shard."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.num_images))


class LabelPlan:
    """The generator and the labels of every block of 64 images, whatever the number of images.

    Without weights every class appears equally often in any 64 * K images from a multiple of that
    on, and evenly in between; a single generator shows image i in class i modulo K. With weights,
    shares of the first n images approach them about as 1 / n.

    Args:
        class_counts: per generator; its classes follow those of the generators before.
        weights: per class, see `ShardConfig.class_weights`.

    Raises:
        ValueError: another number of weights than of classes.
    """

    def __init__(self, class_counts: Sequence[int], weights: Sequence[float] = ()) -> None:
        self._edges = np.concatenate([[0], np.cumsum(class_counts)])
        self.num_classes = int(self._edges[-1])
        if weights and len(weights) != self.num_classes:
            raise ValueError(
                f"class_weights must have one number per class ({self.num_classes}), "
                f"got {len(weights)}"
            )
        self._cumulative = np.concatenate([[0.0], np.cumsum(weights)]) if weights else None
        self._stride = 1 if len(class_counts) == 1 else _coprime(self.num_classes)

    def block(self, number: int) -> tuple[int, torch.Tensor]:
        """The number of its generator, and int64 [64] labels among that generator's classes."""
        images = np.arange(number * BLOCK, (number + 1) * BLOCK, dtype=np.uint64)
        if self._cumulative is None:
            place = number * self._stride % self.num_classes
            generator = int(np.searchsorted(self._edges, place, side="right")) - 1
            first, end = self._edges[generator : generator + 2]
            labels = ((place - first) * BLOCK + np.arange(BLOCK)) % (end - first)
            return generator, torch.from_numpy(labels)
        at = _spread(np.uint64(number), _GOLDEN)
        generator = int(_chosen(self._cumulative[self._edges], at))
        first, end = self._edges[generator : generator + 2]
        labels = _chosen(self._cumulative[first : end + 1], _spread(images, _SQRT_2))
        return generator, torch.from_numpy(labels)


def _chosen(cumulative: np.ndarray, at: np.ndarray) -> Any:
    """In which interval, of the width of its weight, `at` in [0, 1) falls."""
    edges = cumulative - cumulative[0]
    return np.searchsorted(edges / edges[-1], at, side="right") - 1


def _spread(number: np.ndarray | np.uint64, multiplier: int) -> np.ndarray:
    """Low-discrepancy numbers in [0, 1)."""
    with np.errstate(over="ignore"):
        product = number * np.uint64(multiplier)
    return (product >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _coprime(count: int) -> int:
    """A stride that visits all of 0 to count - 1, never near where it just was."""
    stride = max(1, round(count * 0.618))
    while np.gcd(stride, count) != 1:
        stride += 1
    return stride


class ShardFolder:
    """The files of a set: shards, a record of each, settings and the index."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.settings = self.path / "settings.json"
        self.index = self.path / "index.json"

    def shard(self, number: int) -> Path:
        return self.path / f"shard-{number:06d}.tar"

    def record(self, number: int) -> Path:
        return self.shard(number).with_suffix(".json")

    def finished(self, number: int) -> dict[str, Any] | None:
        """The record of a shard, if the shard is there with the size it says."""
        try:
            record = json.loads(self.record(number).read_bytes())
            whole = self.shard(number).stat().st_size == record["bytes"]
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None
        return record if whole else None

    def read_index(self) -> dict[str, Any]:
        """Raises FileNotFoundError, or ValueError where it is no index of shards."""
        index = read_json(self.index)
        if index.get("format") != FORMAT or not {"shards", "summary"} <= index.keys():
            raise ValueError(f"{self.index}: not an index of shards ({FORMAT!r})")
        return index


def read_json(path: Path) -> dict[str, Any]:
    """Raises FileNotFoundError, or ValueError where it is no JSON object."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a JSON object")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Equal values make equal bytes; the whole file or none, unless it is there already."""
    data = (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()
    if path.is_file() and path.read_bytes() == data:
        return
    with written_whole(path) as temporary:
        temporary.write_bytes(data)
