"""Accuracy from one real image per class: `python bench/accuracy.py`, everything with `--all`.

Compares, `full_integer` placement and all layers at the named bits, on the whole test set: min-max
quantisation on the calibration images; ranges of least squared error from them, untrained, without
and with BatchNorm correction; fine-tuning on these images alone; the same plus the images of a
generator trained without L_C and L_D (zero-shot data), of FDDA's generator, and refined images as
the preset `fast` makes them, these also with `dtype = "bfloat16"`; block-wise reconstruction on the
calibration images alone; reconstruction and then fine-tuning, from the calibration images alone,
from zero-shot images, too, and from refined ones, which is what the preset `fast` does, without and
with channels equalised beforehand; and reconstruction on 1,024 real images, for what more images
would bring. The same number of fine-tuning steps and images per step for all that are fine-tuned.
`--ablations` adds generators without one of the losses, with other weights of them and with centers
for some classes only, and refinement with more real images.

Networks: the three shipped ones of Fashion-MNIST, and the ResNet-20 of 128 classes of glyphs
(bench/glyphs.py, which is run where need be). The settings were chosen on Fashion-MNIST's ResNet-20
with seed 0, which is therefore not among the default seeds, those of reconstruction on the digits'
test set and on errors of units of seed 1, those of refinement with seeds 0 and 1 on 10,000 images
of the training set.

Every result is kept as a row of the CSV file and not computed again, so the work can be stopped,
resumed, and split by seed over processes, which may share the file. The seconds of a row include
its synthetic images', which methods and bit widths share. `--table` shows what is there so far.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Sequence
from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple

import glyphs
import torch
from accuracy_methods import ABLATIONS, EVERY, METHODS, Method
from accuracy_table import FP32, Measured, table
from result_rows import append_result, read_results
from rich.console import Console
from torch import nn

import fdda_fast as fdda
from fdda_fast.data import draw, open_source
from fdda_fast.evaluation import share_equal
from fdda_fast.generator import Generator
from fdda_fast.models import load_teacher
from fdda_fast.models.train import RECIPES
from fdda_fast.seeding import stream

COLUMNS = {
    "W4A4": fdda.Bits(4, 4),
    "W3A3": fdda.Bits(3, 3),
    "W2A4": fdda.Bits(2, 4),
    "W2A2": fdda.Bits(2, 2),
}
NETWORKS = (
    "fashion-mnist-resnet20",
    "fashion-mnist-mobilenetv2",
    "fashion-mnist-regnetx",
    "glyphs-resnet20",
)
# bench/results/accuracy.csv and its neighbours are of earlier versions and have other columns.
RESULTS = Path(__file__).parent / "results" / "accuracy-networks.csv"
_CENTERS_STREAM = 41


class Row(NamedTuple):
    network: str
    method: str
    bits: str
    seed: int


class Network:
    """A shipped teacher and its data."""

    def __init__(self, name: str) -> None:
        dataset = RECIPES[name].dataset
        if dataset == str(glyphs.FOLDER):
            glyphs.make_once()
        self.teacher = load_teacher(name)
        self.train, self.test = (open_source(dataset, split) for split in ("train", "test"))
        self.logits = self.logits_of(self.teacher)

    @torch.no_grad()
    def logits_of(self, network: nn.Module) -> torch.Tensor:
        """Of the test set."""
        batches = torch.arange(len(self.test)).split(250)
        return torch.cat([network(self.test.images(rows.tolist())) for rows in batches])

    def measure(self, network: nn.Module, seconds: float) -> Measured:
        logits = self.logits_of(network)
        apart = logits - self.logits
        error = (apart - apart.mean(1, keepdim=True)).square().mean().item()
        return Measured(share_equal(logits.argmax(1), self.test.labels), error, seconds)


class Experiment:
    """One network and seed; keeps synthetic images for all methods and bits that share them."""

    def __init__(self, network: Network, seed: int) -> None:
        self.network, self.seed = network, seed
        self._made: dict[tuple, tuple[dict[str, Any], float]] = {}

    def student(self, method: Method, bits: fdda.Bits) -> tuple[nn.Module, float]:
        """The network and the seconds that it took, its synthetic images' included."""
        synthetic, seconds = self._synthetic(method)
        start = time.monotonic()
        config = method.config.replace(seed=self.seed, flip=self.network.train.flip)
        calibration = self._calibration(method)
        student = fdda.quantize(self.network.teacher, calibration, bits, config, **synthetic)
        return student, time.monotonic() - start + seconds

    def _calibration(self, method: Method) -> tuple[torch.Tensor, torch.Tensor]:
        train = self.network.train
        few = draw(train, method.images_per_class(train.num_classes), self.seed)
        return few.images, few.labels

    def _synthetic(self, method: Method) -> tuple[dict[str, Any], float]:
        """What `quantize` takes of synthetic images, and the seconds that they took."""
        if method.images not in self._made:
            start, made = time.monotonic(), {}
            if method.synthesis is not None:
                made["generator"] = self._generator(method)
            elif method.refined:
                flip, calibration = self.network.train.flip, self._calibration(method)
                made["synthetic"] = fdda.refine(
                    self.network.teacher, calibration, seed=self.seed, flip=flip
                )
            self._made[method.images] = made, time.monotonic() - start
        return self._made[method.images]

    def _generator(self, method: Method) -> Generator:
        teacher, num_classes = self.network.teacher, self.network.train.num_classes
        images, labels = self._calibration(method)
        order = torch.randperm(num_classes, generator=stream(self.seed, _CENTERS_STREAM))
        given = torch.isin(labels, order[: round(method.centers * num_classes)])
        centers = fdda.collect_centers(teacher, images[given], labels[given], num_classes)
        return fdda.train_generator(teacher, centers, method.synthesis.replace(seed=self.seed))


def run(rows: Sequence[Row], results: Path) -> None:
    """Computes the rows that the file does not have, and FP32's."""
    known = read_results(results, Row._fields, Measured)
    missing = [row for row in rows if row not in known]
    opened = functools.cache(Network)
    for name in dict.fromkeys(row.network for row in rows):
        row = Row(name, *FP32)
        if row not in known:
            found = opened(name).measure(opened(name).teacher, 0.0)
            append_result(results, row, found, Row._fields)
    done = 0
    for (name, seed), group in groupby(missing, lambda row: (row.network, row.seed)):
        experiment = Experiment(opened(name), seed)
        for row in group:
            student, seconds = experiment.student(EVERY[row.method], COLUMNS[row.bits])
            found = opened(name).measure(student, seconds)
            append_result(results, row, found, Row._fields)
            done += 1
            figures = f"{100 * found.top1:.2f} %, {found.logit_error:.3f}, {seconds:.0f} s"
            print(f"{done} of {len(missing)}: {' '.join(map(str, row))}: {figures}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="all networks, and the ablations")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS)
    parser.add_argument("--methods", nargs="+", choices=EVERY, default=list(METHODS))
    parser.add_argument("--ablations", action="store_true", help="these besides the methods")
    parser.add_argument("--bits", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print what the file has")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    networks = args.networks or NETWORKS[: None if args.all else 1]
    more = ABLATIONS if args.all or args.ablations else ()
    methods = list(dict.fromkeys([*args.methods, *more]))
    if not args.table:
        orders = product(args.seeds, networks, methods, args.bits)
        run([Row(*order, seed) for seed, *order in orders], args.results)
    found = read_results(args.results, Row._fields, Measured)
    for network in networks:
        if (network, *FP32) in found:
            Console(width=170).print(table(found, network, methods, args.bits, args.seeds))


if __name__ == "__main__":
    main()
