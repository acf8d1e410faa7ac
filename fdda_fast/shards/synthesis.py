"""Synthesis to shards by any number of processes that share a folder."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

from torch import nn

from ..claims import Claims
from ..data.preprocessing import Preprocessing
from ..files import remove_temporaries, written_whole
from ..generator import Generator
from ..memory import resident_memory
from ..statistics import BNSCenters
from ..training import Progress, deferred_interrupt
from .blocks import Block, BlockMaker
from .plan import BLOCK, FORMAT, ShardConfig, ShardFolder, read_json, write_json
from .settings import agree, describe
from .writer import ShardWriter

_WAITING_BLOCKS = 2  # made and not yet written


def synthesize_shards(
    generators: Generator | Sequence[Generator],
    out_dir: str | Path,
    config: ShardConfig,
    *,
    preprocessing: Preprocessing,
    teacher: nn.Module | None = None,
    centers: BNSCenters | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes images to tar files in WebDataset's layout, with an index, and sums them up.

    Image i depends on (its generator, seed, i) only and every file's bytes on the arguments only,
    whichever processes have a part in it: all that are started on the same folder share the work,
    with or without torchrun, and end when it is done. Each takes a shard that nobody has, writes it
    under a temporary name and renames it. Started again after a SIGKILL, with a full disk or a file
    that lost its end, they make what is missing. Bytes may differ between instruction sets and
    between versions of PyTorch and zlib.

    `out_dir` will hold shard-000000.tar, ..., a record (.json) of each, settings.json and
    index.json, which is written last. Members of image i, whose key is i in ten digits: .png or
    .image.npy (uint8 [H, W, C]), .cls, .json (index, seed, label, ...), and of a teacher
    .logits.npy (float32 [K]).

    Args:
        generators: one, or several that have the classes in turn: the second one's first class has
            the number of the first one's classes. All with the same image shape.
        preprocessing: of the teacher; its inverse makes pixels of what the generators return.
        teacher: gives soft labels, confidence and agreement, computed on the pixels as they are
            stored, and in one thread; without one there are none.
        centers: give the distance of the images' BNS from their class's.
        progress: called as progress(images done, num_images, {}), those of others included.

    Returns:
        The contents of index.json: `shards`, a list of records, and `summary`.

    Raises:
        ValueError: arguments that do not fit one another, or the folder holds another set.
        KeyboardInterrupt: Ctrl-C or SIGTERM came; a shard in work is given up.
        OSError: such as a full disk; likewise.
    """
    generators = [generators] if isinstance(generators, Generator) else list(generators)
    make = BlockMaker(generators, config, preprocessing, teacher, centers)
    settings = describe(generators, config, preprocessing, teacher, centers)
    folder = ShardFolder(out_dir)
    folder.path.mkdir(parents=True, exist_ok=True)
    with (
        Claims(folder.path / ".claims") as claims,
        deferred_interrupt() as interrupted,
        resident_memory(),
    ):
        with claims.held(Claims.WHOLE):
            agree(folder, settings)
        _Worker(folder, claims, config, make, interrupted, progress).run()
        with claims.held(Claims.WHOLE):
            remove_temporaries(folder.index)
            index = _index(folder, config)
            write_json(folder.index, index)
    return index


class _Worker:
    """One process's part: shard after shard that nobody has, until all are there."""

    def __init__(
        self,
        folder: ShardFolder,
        claims: Claims,
        config: ShardConfig,
        make: Callable[[int], Block],
        interrupted: Event,
        progress: Progress | None,
    ) -> None:
        self._folder, self._claims, self._config = folder, claims, config
        self._make, self._interrupted, self._progress = make, interrupted, progress
        self._done = 0

    def run(self) -> None:
        for shard in self._claims.work_through(
            self._config.num_shards, self._folder.finished, self._write, pause=self._leave_if_asked
        ):
            self._done += len(self._config.indices(shard))
            self._tell(0)

    def _write(self, shard: int) -> None:
        """The next blocks are made while one is encoded and written."""
        tar, record = self._folder.shard(shard), self._folder.record(shard)
        indices = self._config.indices(shard)
        for path in (tar, record):
            remove_temporaries(path)
        # An index that was there tells of a shard that is not.
        self._folder.index.unlink(missing_ok=True)
        with written_whole(tar) as temporary, temporary.open("wb") as file:
            writer = ShardWriter(file, self._config)
            waiting: deque[Future[None]] = deque()
            with ThreadPoolExecutor(1) as pool:
                try:
                    for start in range(indices.start, indices.stop, BLOCK):
                        waiting.append(pool.submit(writer.add, self._make(start // BLOCK)))
                        if len(waiting) > _WAITING_BLOCKS:
                            waiting.popleft().result()
                        self._leave_if_asked()
                        self._tell(min(start + BLOCK, indices.stop) - indices.start)
                    for future in waiting:
                        future.result()
                finally:
                    pool.shutdown(cancel_futures=True)
            values = writer.finish()
        write_json(record, {"shard": shard, "first": indices.start, **values})

    def _leave_if_asked(self) -> None:
        if self._interrupted.is_set():
            raise KeyboardInterrupt

    def _tell(self, in_work: int) -> None:
        if self._progress is not None:
            self._progress(self._done + in_work, self._config.num_images, {})


def _index(folder: ShardFolder, config: ShardConfig) -> dict[str, Any]:
    records = []
    classes: Counter[str] = Counter()
    sums: Counter[str] = Counter()
    for shard in range(config.num_shards):
        record = read_json(folder.record(shard))
        classes.update(record.pop("classes"))
        sums.update(record.pop("sums"))
        records.append({"file": folder.shard(shard).name, **record})
    images, rejected, near = (
        sum(r[name] for r in records) for name in ("images", "rejected", "near_duplicates")
    )
    num_classes = sum(read_json(folder.settings)["class_counts"])
    counts = [classes[str(label)] for label in range(num_classes)]
    summary = {
        "images": images,
        "rejected": rejected,
        "bytes": sum(r["bytes"] for r in records),
        "fewest_per_class": min(counts),
        "most_per_class": max(counts),
        # Of the images that stayed: means, and the share that look like another of their shard.
        "near_duplicates": near / max(1, images),
        **{name: total / max(1, images) for name, total in sorted(sums.items())},
    }
    return {"format": FORMAT, "shards": records, "summary": summary}
