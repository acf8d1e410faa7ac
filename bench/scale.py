"""Images per second of synthesis to shards, against the loop that one would write without it.

    python bench/scale.py                  # 1 and 2 ranks, 224 and 32 px; pins to cores 0 and 1
    python bench/scale.py --ranks 1 --cores 0

Loop and ranks take turns, `--rounds` times; medians are printed, and the median of the ratios. What
a loop in registers makes of the same ranks at the same time, which waits for no memory, is what the
processor and its other users leave to be had.
The plain loop: the generator written plainly in PyTorch (bench/reference_step.py) in eval mode,
torchvision's save_image for every image. Weights are random. Of the shares, `compute` is the
generator and the way to pixels, `encode` PNG and tar, `write` the sums, the file and its fsync.
"""

from __future__ import annotations

import argparse
import os
import statistics
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
from torch import nn
from torchvision.utils import save_image

from fdda_fast.data import Preprocessing
from fdda_fast.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from fdda_fast.generator import Generator
from fdda_fast.memory import resident_memory
from fdda_fast.ops._library import peak_macs_per_second
from fdda_fast.shards import ShardConfig, synthesize_shards
from fdda_fast.shards.blocks import BlockMaker
from fdda_fast.shards.plan import BLOCK
from fdda_fast.shards.writer import ShardWriter, encode_block

_CLASSES = 10
_WARM_UP = 2  # blocks
_REGISTERS_SECONDS = 1.0


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
    for norm in generator.modules():  # statistics of one batch: else images were black and white
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0
    with torch.no_grad():
        generator(torch.randn(16, 100), torch.randint(_CLASSES, (16,)))
    return generator.eval()


def config_of(case: Case, images: int) -> ShardConfig:
    return ShardConfig(num_images=images, shard_size=BLOCK * max(1, case.images // BLOCK // 8))


class PlainLoop:
    """Calling it gives the seconds per image."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case = case
        self.generator = PlainGenerator(_CLASSES, (3, case.pixels, case.pixels)).eval()
        self.generator.load_state_dict(generator_of(case).state_dict())
        mean_and_std = (IMAGENET_MEAN, IMAGENET_STD)
        self.mean, self.std = (torch.tensor(v)[:, None, None] for v in mean_and_std)

    def __call__(self, clock: Clock) -> float:
        case, images = self.case, self.case.images // 16
        with tempfile.TemporaryDirectory() as folder:
            self.run(Path(folder), case.batch)
            start = clock()
            self.run(Path(folder), images)
            return (clock() - start) / images

    def run(self, folder: Path, images: int) -> None:
        for start in range(0, images, self.case.batch):
            labels = torch.arange(start, start + self.case.batch) % _CLASSES
            with torch.no_grad():
                batch = self.generator(torch.randn(self.case.batch, 100), labels)
            for index, image in enumerate(batch, start):
                save_image(image * self.std + self.mean, folder / f"{index:08d}.png")


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
        timed("write", writer._sync)
    return {stage: value / blocks / BLOCK for stage, value in seconds.items()}


def work(pixels: int, core: int) -> None:
    """A rank: gets ready, does its part of the set in every folder that it is told of.

    Told of none, it runs the loop in registers. It answers with seconds used, or runs of the loop.
    """
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    case = CASES[pixels]
    generator, preprocessing = generator_of(case), preprocessing_of(case)
    with tempfile.TemporaryDirectory() as warm:
        config = config_of(case, _WARM_UP * BLOCK)
        synthesize_shards(generator, warm, config, preprocessing=preprocessing)
    print("ready", flush=True)
    config = config_of(case, case.images)
    for line in sys.stdin:
        folder, start = line.strip(), time.process_time()
        if folder:
            synthesize_shards(generator, folder, config, preprocessing=preprocessing)
        print(time.process_time() - start if folder else register_loops(), flush=True)


def register_loops() -> int:
    """How many there is time for."""
    end, count = time.perf_counter() + _REGISTERS_SECONDS, 0
    while time.perf_counter() < end:
        peak_macs_per_second()
        count += 1
    return count


class Ranks:
    """A process on each core, which end with the block."""

    def __init__(self, case: Case, cores: Sequence[int]) -> None:
        self.case = case
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--work", str(case.pixels), str(core)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for core in cores
        ]
        for process in self.processes:
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("a rank failed")

    def seconds(self, count: int, clock: Clock) -> tuple[float, float]:
        """Per image, of the first `count` ranks, and what share of its core a rank had."""
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            used = self._ask(count, folder)
            elapsed = time.perf_counter() - start
        mean = sum(used) / count  # whoever is held up by other processes takes fewer shards
        seconds = mean if clock is time.process_time else elapsed
        return seconds / self.case.images, mean / elapsed

    def register_loops(self, count: int) -> float:
        """Of the first `count` ranks together."""
        return sum(self._ask(count, ""))

    def _ask(self, count: int, line: str) -> list[float]:
        ranks = self.processes[:count]
        for rank in ranks:
            rank.stdin.write(f"{line}\n")
            rank.stdin.flush()
        return [float(rank.stdout.readline()) for rank in ranks]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.stdin.close()
            if process.wait():
                raise RuntimeError("a rank failed")


def compare(
    case: Case, counts: Sequence[int], cores: Sequence[int], clock: Clock, rounds: int
) -> None:
    """Prints images per second of the plain loop, and of so many ranks."""
    plain = PlainLoop(case)
    rows, shares, loops = [], *({count: [] for count in counts} for _ in range(2))
    with Ranks(case, cores[: max(counts)]) as ranks:
        for _ in range(rounds):
            row = {"plain": plain(clock)}
            for count in counts:
                row[count], share = ranks.seconds(count, clock)
                shares[count].append(share)
                loops[count].append(ranks.register_loops(count))
            rows.append(row)
    rates = {name: 1 / statistics.median(row[name] for row in rows) for name in rows[0]}
    print(f"{case.pixels} px: plain loop {rates['plain']:.1f} images/s")
    for count in counts:
        ratios = ", ".join(
            f"{statistics.median(row[other] / row[count] for row in rows):.2f} x {other}"
            for other in ("plain", counts[0])
        )
        share = statistics.median(shares[count])
        registers = statistics.median(
            own / first for own, first in zip(loops[count], loops[counts[0]], strict=True)
        )
        print(
            f"  {count} rank(s): {rates[count]:.1f} images/s, {ratios}; each had "
            f"{100 * share:.0f} % of its core; in registers {registers:.2f} x {counts[0]}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pixels", type=int, nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cores", type=int, nargs="+", default=[0, 1])
    parser.add_argument(
        "--cpu-time", action="store_true", help="leaves out what other processes take of a core"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(*options.work)
    if max(options.ranks) > len(options.cores):
        parser.error("--cores: one per rank")
    os.sched_setaffinity(0, {options.cores[0]})
    torch.set_num_threads(1)
    clock = time.process_time if options.cpu_time else time.perf_counter
    print(*describe(), sep="\n")
    for pixels in options.pixels:
        case = CASES[pixels]
        compare(case, options.ranks, options.cores, clock, options.rounds)
        stages = stage_seconds(case, clock)
        total = sum(stages.values())
        shares = ", ".join(f"{name} {100 * s / total:.1f} %" for name, s in stages.items())
        print(f"  stages {1e3 * total:.2f} ms per image: {shares}")


if __name__ == "__main__":
    main()
