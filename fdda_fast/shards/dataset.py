"""Reading shards."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from ..data.preprocessing import Preprocessing
from ..seeding import stream
from .plan import ShardFolder, read_json

UNREADABLE = (OSError, SyntaxError, ValueError, KeyError)  # what damaged members raise
_SHARD_ORDER, _IMAGE_ORDER = 30, 31


class ShardDataset(IterableDataset):
    """The images of a folder that `synthesize_shards` wrote.

    Whole shards are dealt out to the processes of torch.distributed, if it is initialised, and to
    the workers of a DataLoader; each image is read once. Those of one shard are in memory at a
    time where they are shuffled.

    Args:
        folder: with index.json.
        transform: applied to every image, a uint8 tensor [C, H, W]; by default the preprocessing
            of the teacher, which makes it float32.
        shuffle: shards and the images within one come in an order of the epoch's own.
        seed: of that order.

    Yields:
        {"image": ..., "label": int, "index": int} and, if there was a teacher, "logits": float32
        [K].

    Raises:
        FileNotFoundError: no index, so the set is missing or unfinished.
        ValueError: a file is damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        transform: Callable[[torch.Tensor], Any] | None = None,
        *,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        self._folder = ShardFolder(folder)
        index = self._folder.read_index()
        settings = read_json(self._folder.settings)
        self._records = index["shards"]
        self._images = int(index["summary"]["images"])
        self.preprocessing = Preprocessing.from_dict(settings["preprocessing"])
        self.num_classes = sum(settings["class_counts"])
        self._transform = transform or (lambda image: self.preprocessing.normalize(image[None])[0])
        self._shuffle, self._seed, self.epoch = shuffle, seed, 0

    def __len__(self) -> int:
        """Images of all processes."""
        return self._images

    def set_epoch(self, epoch: int) -> None:
        """Another order; before the iteration, in every process."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        shards = list(range(len(self._records)))
        if self._shuffle:
            shards = self._order(len(shards), _SHARD_ORDER)
        part, parts = _own_part()
        for number in shards[part::parts]:
            path = self._folder.path / self._records[number]["file"]
            images = self._images_of(path, self._records[number]["images"])
            if self._shuffle:
                whole = list(images)
                order = self._order(len(whole), _IMAGE_ORDER, number)
                images = (whole[k] for k in order)
            for key, members in images:
                yield self._decoded(path, key, members)

    @staticmethod
    def _images_of(path: Path, expected: int) -> Iterator[tuple[str, dict[str, bytes]]]:
        """A tar file may end behind any member and still look whole."""
        found = 0
        for found, image in enumerate(read_shard(path), 1):  # noqa: B007
            yield image
        if found != expected:
            raise ValueError(f"{path}: damaged (holds {found} of {expected} images)")

    def _order(self, count: int, *purpose: int) -> list[int]:
        rng = stream(self._seed, *purpose, self.epoch)
        return torch.randperm(count, generator=rng).tolist()

    def _decoded(self, path: Path, key: str, members: dict[str, bytes]) -> dict[str, Any]:
        try:
            facts = json.loads(members["json"])
            pixels = torch.from_numpy(decode_image(members)).permute(2, 0, 1)
            sample = {"label": facts["label"], "index": facts["index"]}
            if "logits.npy" in members:
                sample["logits"] = torch.from_numpy(_decode_npy(members["logits.npy"]))
        except (*UNREADABLE, TypeError) as error:
            raise ValueError(f"{path}: damaged (image {key}: {error!r})") from error
        return {"image": self._transform(pixels), **sample}


def read_shard(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members by extension, image by image.

    Raises:
        ValueError: not a tar file, or its end is missing.
    """
    try:
        with tarfile.open(path, "r|") as archive:
            key, members = None, {}
            for entry in archive:
                own, extension = entry.name.split(".", 1)
                if own != key:
                    if members:
                        yield key, members
                    key, members = own, {}
                members[extension] = archive.extractfile(entry).read()
            if members:
                yield key, members
    except tarfile.TarError as error:
        raise ValueError(f"{path}: damaged ({error})") from error


def decode_image(members: dict[str, bytes]) -> np.ndarray:
    """uint8 [H, W, C]"""
    if "image.npy" in members:
        return _decode_npy(members["image.npy"])
    with Image.open(io.BytesIO(members["png"])) as image:
        pixels = np.array(image)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _decode_npy(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data), allow_pickle=False)


def _own_part() -> tuple[int, int]:
    """Which of how many parts this worker of this process reads."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if distributed else 0
    ranks = torch.distributed.get_world_size() if distributed else 1
    worker = get_worker_info()
    if worker is None:
        return rank, ranks
    return rank * worker.num_workers + worker.id, ranks * worker.num_workers
