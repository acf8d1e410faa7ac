"""Images per second of synthesis to shards, against the loop that one would write without it.

    python bench/scale.py                  # 1 and 2 ranks, 224 and 32 px; pins to cores 0 and 1
    python bench/scale.py --ranks 1 --cores 0

The plain loop: the generator written plainly in PyTorch (bench/reference_step.py) in eval mode,
torchvision's save_image for every image. Weights are random. Of the shares, `compute` is the
generator and the way to pixels, `encode` PNG and tar, `write` the sums, the file and its fsync.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from machine import describe
from reference_step import PlainGenerator
from timing import Clock
from torchvision.utils import save_image

from fdda_fast.data import Preprocessing
from fdda_fast.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from fdda_fast.generator import Generator
from fdda_fast.memory import resident_memory
from fdda_fast.shards import ShardConfig, synthesize_shards
from fdda_fast.shards.blocks import BlockMaker
from fdda_fast.shards.plan import BLOCK
from fdda_fast.shards.writer import ShardWriter, encode_block

_CLASSES = 10
_WARM_UP = 2  # blocks


@dataclass(frozen=True)
class Case:
    pixels: int
    images: int
    batch: int  # of the plain loop; as the library's


CASES = {c.pixels: c for c in (Case(224, 1024, 16), Case(32, 16384, 64))}


def preprocessing_of(case: Case) -> Preprocessing:
    return Preprocessing(case.pixels, case.pixels, IMAGENET_MEAN, IMAGENET_STD)


def generator_of(case: Case) -> Generator:
    torch.manual_seed(0)
    generator = Generator(_CLASSES, (3, case.pixels, case.pixels)).train()
    with torch.no_grad():  # running statistics, so that images are not all black and white
        for _ in range(20):
            generator(torch.randn(16, 100), torch.randint(_CLASSES, (16,)))
    return generator.eval()


def config_of(case: Case, images: int) -> ShardConfig:
    return ShardConfig(num_images=images, shard_size=BLOCK * max(1, case.images // BLOCK // 16))


def plain_seconds(case: Case, clock: Clock) -> float:
    """Per image."""
    torch.manual_seed(0)
    generator = PlainGenerator(_CLASSES, (3, case.pixels, case.pixels)).eval()
    generator.load_state_dict(generator_of(case).state_dict())
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))

    def run(folder: Path, images: int) -> None:
        for start in range(0, images, case.batch):
            labels = torch.arange(start, start + case.batch) % _CLASSES
            with torch.no_grad():
                batch = generator(torch.randn(case.batch, 100), labels)
            for index, image in enumerate(batch, start):
                save_image(image * std + mean, folder / f"{index:08d}.png")

    images = case.images // 8
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), case.batch)
        start = clock()
        run(Path(folder), images)
        return (clock() - start) / images


def stage_seconds(case: Case, clock: Clock) -> dict[str, float]:
    """Per image, each stage by itself."""
    blocks = case.images // 4 // BLOCK
    config = config_of(case, blocks * BLOCK)
    make = BlockMaker([generator_of(case)], config, preprocessing_of(case), None, None)
    seconds = dict.fromkeys(("compute", "encode", "write"), 0.0)

    def timed(stage: str, function: Callable, *arguments: object) -> object:
        start = clock()
        result = function(*arguments)
        seconds[stage] += clock() - start
        return result

    with resident_memory(), tempfile.TemporaryFile() as file:
        for number in range(_WARM_UP):
            encode_block(make(number), config)
        writer = ShardWriter(file, config)
        for number in range(blocks):
            block = timed("compute", make, number)
            data = timed("encode", encode_block, block, config)
            timed("write", writer._write, data)
        timed("write", lambda: (file.flush(), os.fsync(file.fileno())))
    return {stage: value / blocks / BLOCK for stage, value in seconds.items()}


def work(pixels: int, core: int, folder: str) -> None:
    """A rank: gets ready, waits for a line, does its part."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    case = CASES[pixels]
    generator, preprocessing = generator_of(case), preprocessing_of(case)
    with tempfile.TemporaryDirectory() as warm:
        config = config_of(case, _WARM_UP * BLOCK)
        synthesize_shards(generator, warm, config, preprocessing=preprocessing)
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.process_time()
    synthesize_shards(generator, folder, config_of(case, case.images), preprocessing=preprocessing)
    print(time.process_time() - start, flush=True)


def ranks_seconds(case: Case, cores: Sequence[int], clock: Clock) -> float:
    """Per image, of a rank on each core."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, "--work", str(case.pixels), str(core), folder],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for core in cores
        ]
        for rank in ranks:
            if rank.stdout.readline() != "ready\n":
                raise RuntimeError("a rank failed")
        start = clock()
        for rank in ranks:
            rank.stdin.write("\n")
            rank.stdin.flush()
        used = [float(rank.stdout.readline()) for rank in ranks]
        # Whoever is held up by other processes takes fewer shards.
        seconds = sum(used) / len(used) if clock is time.process_time else clock() - start
        if any(rank.wait() for rank in ranks):
            raise RuntimeError("a rank failed")
        return seconds / case.images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pixels", type=int, nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cores", type=int, nargs="+", default=[0, 1])
    parser.add_argument(
        "--cpu-time", action="store_true", help="leaves out what other processes take of a core"
    )
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        pixels, core, folder = options.work
        return work(int(pixels), int(core), folder)
    if max(options.ranks) > len(options.cores):
        parser.error("--cores: one per rank")
    os.sched_setaffinity(0, {options.cores[0]})
    torch.set_num_threads(1)
    clock = time.process_time if options.cpu_time else time.perf_counter
    print(*describe(), sep="\n")
    for pixels in options.pixels:
        case = CASES[pixels]
        plain = plain_seconds(case, clock)
        print(f"{pixels} px: plain loop {1 / plain:.1f} images/s")
        stages = stage_seconds(case, clock)
        total = sum(stages.values())
        shares = ", ".join(f"{name} {100 * s / total:.1f} %" for name, s in stages.items())
        print(f"  stages {1e3 * total:.2f} ms per image: {shares}")
        one = None
        for count in options.ranks:
            seconds = ranks_seconds(case, options.cores[:count], clock)
            one = one or seconds
            print(
                f"  {count} rank(s): {1 / seconds:.1f} images/s, "
                f"{plain / seconds:.2f} x plain, {one / seconds:.2f} x {options.ranks[0]}"
            )


if __name__ == "__main__":
    main()
