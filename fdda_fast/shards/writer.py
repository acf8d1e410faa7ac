"""One shard: members, measures, and the record that says it is whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from .blocks import Block
from .encoding import END_OF_ARCHIVE, encode_npy, encode_png, tar_member
from .plan import ShardConfig

_NEAR = 2  # bits of 64 in which the hashes of near-duplicates differ at most
_SYNC_BYTES = 8 << 20
_ROWS = 1024  # images compared at a time with as many others of the shard


def encode_block(block: Block, config: ShardConfig) -> bytes:
    """The tar members of its images, those left out by the filter excepted."""
    members: list[bytes] = []
    for row in np.flatnonzero(block.kept):
        key = f"{block.first + row:010d}"
        members += (tar_member(f"{key}.{ext}", d) for ext, d in _parts(block, row, config))
    return b"".join(members)


def _parts(block: Block, row: int, config: ShardConfig) -> Iterator[tuple[str, bytes]]:
    """Extensions and contents of one image's members, as `webdataset` understands them."""
    label = int(block.labels[row])
    if config.image_format == "png":
        yield "png", encode_png(block.pixels[row])
    else:
        yield "image.npy", encode_npy(block.pixels[row])
    yield "cls", str(label).encode()
    facts: dict[str, Any] = {
        "generator": block.generator, "index": int(block.first + row), "label": label,
        "seed": config.seed,
    }  # fmt: skip
    if block.logits is not None:
        facts["confidence"] = float(block.confidence[row])
    if block.bns_distance is not None:
        facts["bns_distance"] = float(block.bns_distance[row])
    yield "json", json.dumps(facts, sort_keys=True).encode()
    if block.logits is not None:
        yield "logits.npy", encode_npy(block.logits[row])


class ShardWriter:
    """Writes blocks in their order, and sums up what they measure.

    Time and again it waits until the disk has them: the next blocks are made meanwhile, and little
    is left to wait for at the end.

    Args:
        file: open for writing.
    """

    def __init__(self, file: BinaryIO, config: ShardConfig) -> None:
        self._file, self._config = file, config
        self._sha256 = hashlib.sha256()
        self._bytes = self._synced = 0
        self._rejected = 0
        self._classes: Counter[int] = Counter()
        self._sums: Counter[str] = Counter()
        self._hashes: list[np.ndarray] = []

    def add(self, block: Block) -> None:
        self._write(encode_block(block, self._config))
        kept = block.kept
        self._rejected += int(len(kept) - kept.sum())
        self._classes.update(block.labels[kept].tolist())
        self._hashes.append(block.hashes[kept])
        for name in ("confidence", "agreeing", "bns_distance"):
            values = getattr(block, name)
            if values is not None:
                self._sums[name] += float(values[kept].astype(np.float64).sum())

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._bytes += len(data)
        if self._bytes - self._synced >= _SYNC_BYTES:
            self._sync()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._synced = self._bytes

    def finish(self) -> dict[str, Any]:
        """Ends the archive, which then is on the disk; its record."""
        self._write(END_OF_ARCHIVE)
        self._sync()
        return {
            "images": sum(self._classes.values()),
            "rejected": self._rejected,
            "bytes": self._bytes,
            "sha256": self._sha256.hexdigest(),
            "classes": {str(label): self._classes[label] for label in sorted(self._classes)},
            "near_duplicates": near_duplicates(np.concatenate(self._hashes)),
            "sums": dict(self._sums),
        }


def near_duplicates(hashes: np.ndarray) -> int:
    """How many of the images [N, 64] look like one before them."""
    bits = hashes.astype(np.float32)
    ones = bits.sum(1)
    near = np.zeros(len(bits), bool)
    for start in range(0, len(bits), _ROWS):
        rows = slice(start, start + _ROWS)
        for other in range(0, start + 1, _ROWS):
            columns = slice(other, other + _ROWS)
            differing = ones[rows, None] + ones[columns] - 2 * (bits[rows] @ bits[columns].T)
            if other == start:
                differing[np.triu_indices_from(differing)] = np.inf  # not before
            near[rows] |= (differing <= _NEAR).any(1)
    return int(near.sum())
