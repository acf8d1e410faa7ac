"""Reading everything back, and making some of it again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import from_dict
from ..data.preprocessing import Preprocessing
from ..files import digest
from ..generator import Generator
from ..seeding import stream
from ..statistics import BNSCenters
from ..training import Progress
from .blocks import BlockMaker
from .dataset import UNREADABLE, decode_image, read_shard
from .encoding import tar_member
from .plan import BLOCK, ShardConfig, ShardFolder, read_json
from .settings import agree, describe
from .writer import encode_block

_CHOICE = 32


def verify_shards(
    out_dir: str | Path,
    generators: Generator | Sequence[Generator],
    *,
    teacher: nn.Module | None = None,
    centers: BNSCenters | None = None,
    part: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
) -> None:
    """Checks a finished set, shard by shard: sums, counts, labels, images that can be decoded.

    One block of 64 images of every shard is made again; its bytes must be the same.

    Args:
        generators, teacher, centers: what the set was made with.
        part: (k, n): every n-th shard from the k-th on.
        progress: called as progress(shards done, their number, {}).

    Raises:
        FileNotFoundError: the set is missing or unfinished.
        ValueError: names the shards that are not as they should be.
    """
    generators = [generators] if isinstance(generators, Generator) else list(generators)
    folder = ShardFolder(out_dir)
    settings, index = read_json(folder.settings), folder.read_index()
    config = from_dict(ShardConfig(), settings["config"], str(folder.settings))
    preprocessing = Preprocessing.from_dict(settings["preprocessing"])
    agree(folder, describe(generators, config, preprocessing, teacher, centers))
    make = BlockMaker(generators, config, preprocessing, teacher, centers)
    if [record["shard"] for record in index["shards"]] != list(range(config.num_shards)):
        raise ValueError(
            f"{folder.index}: does not list the shards 0 to {config.num_shards - 1}, each once. "
            "Delete it and run the same command without verification"
        )
    faults = []
    records = index["shards"][part[0] :: part[1]]
    for done, record in enumerate(records):
        fault = _fault(folder, record, config, make)
        if fault:
            faults.append(f"{record['file']}: {fault}")
        if progress is not None:
            progress(done + 1, len(records), {})
    if faults:
        raise ValueError(
            f"{folder.path}: {len(faults)} of {len(records)} shards are damaged: "
            f"{'; '.join(faults)}. Delete them and run the same command without verification"
        )


def _shape(members: dict[str, bytes]) -> tuple[int, ...] | None:
    """Of the image; None where it cannot be decoded."""
    try:
        return decode_image(members).shape
    except UNREADABLE:
        return None


def _fault(
    folder: ShardFolder, record: dict[str, Any], config: ShardConfig, make: BlockMaker
) -> str:
    """What is wrong with a shard; empty: nothing."""
    path, number = folder.path / record["file"], record["shard"]
    if not path.is_file():
        return "is missing"
    if digest(path) != record["sha256"]:
        return "its sum is another one"
    indices = config.indices(number)
    blocks = -(-len(indices) // BLOCK)
    chosen = int(torch.randint(blocks, (), generator=stream(config.seed, _CHOICE, number)))
    block = make(indices.start // BLOCK + chosen)
    again = encode_block(block, config)
    found, last = [], -1
    images = 0
    for key, members in read_shard(path):
        facts, at = json.loads(members["json"]), int(key)
        if at != facts["index"] or at not in indices or at <= last:
            return f"image {key} is out of place"
        if int(members["cls"]) != facts["label"]:
            return f"image {key} has two labels"
        if _shape(members) != block.pixels.shape[1:]:
            return f"image {key} has another shape, or none"
        if at // BLOCK == block.first // BLOCK:
            found += [tar_member(f"{key}.{name}", data) for name, data in members.items()]
        images, last = images + 1, at
    if images != record["images"] or images + record["rejected"] != len(indices):
        return f"has {images} images"
    if b"".join(found) != again:
        return f"images from {block.first} on are not what the generator makes"
    return ""
