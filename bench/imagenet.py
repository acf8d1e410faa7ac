"""The paper's table on ImageNet, with these settings: `python bench/imagenet.py --data imagenet/`.

Quantises torchvision's networks from one real image per class, all layers at the named bits or
the first and last one at 8, and counts the validation images that the packed networks put into
their classes: min-max quantisation on the calibration images; ranges and BatchNorm correction from
them (`calibrated`); rounding learned block by block and fine-tuning, both on them and on refined
images, as the preset `fast` does (`fdda`). `--weights` is a folder with torchvision's files as it
downloads them, `resnet18-f37072fd.pth` and so on. Any ImageFolder tree with train/ and val/ and
networks trained on it will do.

Every result is kept as a row of a CSV file per network and not computed again; an interrupted
training is resumed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from result_rows import Result, append_result, read_results
from rich.console import Console
from rich.table import Table
from torch import nn

import fdda_fast as fdda
from fdda_fast.checkpoint import load_tensors, save_tensors
from fdda_fast.cli.options import parse_bits
from fdda_fast.config import from_dict, read_toml
from fdda_fast.data import draw, open_source
from fdda_fast.evaluation import accuracy
from fdda_fast.models import load_teacher
from fdda_fast.runs import display

MODELS = ("resnet18", "mobilenet_v2", "regnet_x_400mf")
BITS = ("W4A4", "W4A4F8L8", "W5A5", "W5A5F8L8")
METHODS = ("minmax", "calibrated", "fdda")
Batch = tuple[torch.Tensor, torch.Tensor]


class Network:
    """One teacher, its data and what has been found out about it.

    Args:
        name: of a torchvision architecture.
    """

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        files = sorted(args.weights.glob(f"{name}[-.]*"))
        if len(files) != 1:
            raise SystemExit(f"{args.weights}: expected one file {name}*.pth, got {len(files)}")
        self.name, self.args = name, args
        size = {"image_size": args.image_size}
        self.train, self.test = (open_source(args.data, s, **size) for s in ("train", "test"))
        self.teacher = load_teacher(name, files[0], self.train.num_classes)
        self.results = args.out / f"{name}.csv"

    def run(self, seed: int) -> None:
        if self._missing(0, "fp32", "FP32"):
            self._note(0, "fp32", "FP32", self.teacher, time.monotonic())
        few = None
        for method in METHODS:
            for bits in self.args.bits:
                if self._missing(seed, method, bits):
                    few = few or draw(self.train, self.args.per_class, seed)
                    start = time.monotonic()
                    packed = self._packed(seed, method, bits, (few.images, few.labels))
                    self._note(seed, method, bits, packed, start)
                    self._checkpoint(seed, bits).unlink(missing_ok=True)

    def _checkpoint(self, seed: int, bits: str) -> Path:
        return self.args.out / f"{self.name}-{seed}-{bits}.checkpoint"

    def _missing(self, seed: int, method: str, bits: str) -> bool:
        return (seed, method, bits) not in read_results(self.results)

    def _note(self, seed: int, method: str, bits: str, network: nn.Module, start: float) -> None:
        """Seconds are those before the images are counted."""
        seconds = time.monotonic() - start
        top1 = accuracy(network, self.test, self.args.limit, batch_size=64)
        append_result(self.results, (seed, method, bits), Result(top1, seconds))
        print(f"{self.name} seed {seed} {method} {bits}: {100 * top1:.2f} %, {seconds:.0f} s")

    def _packed(self, seed: int, method: str, bits: str, calibration: Batch) -> fdda.PackedModel:
        config = self.args.settings
        config = config.replace(seed=seed)
        synthetic = None
        if method == "fdda":
            synthetic = self._synthetic(config, calibration)
        else:
            config = config.plain_minmax() if method == "minmax" else config.replace(steps=0)
        with display(f"{self.name} {method} {bits}") as progress:
            student = fdda.quantize(
                self.teacher,
                calibration,
                parse_bits(bits),
                config,
                synthetic=synthetic,
                checkpoint=self._checkpoint(seed, bits),
                resume=True,
                progress=progress,
            )
        return fdda.pack(student, calibration[0][:1], self.train.preprocessing)

    def _synthetic(self, config: fdda.QuantizeConfig, calibration: Batch) -> Batch:
        """The same for all bits."""
        file = self.args.out / f"{self.name}-{config.seed}.images.safetensors"
        if not file.is_file():
            checkpoint = file.with_suffix(".checkpoint")
            with display(f"{self.name} images") as progress:
                images, labels = fdda.refine(
                    self.teacher,
                    calibration,
                    config.refine,
                    seed=config.seed,
                    flip=config.flip,
                    checkpoint=checkpoint,
                    resume=True,
                    progress=progress,
                )
            save_tensors(file, {"images": images, "labels": labels}, {})
            checkpoint.unlink(missing_ok=True)
        tensors, _ = load_tensors(file)
        return tensors["images"], tensors["labels"]


def table(networks: Sequence[Network], seeds: Sequence[int], bits: Sequence[str]) -> Table:
    """Mean over the seeds of top-1 in percent."""
    made = Table()
    for column in ("network", "method", *bits):
        made.add_column(column, justify="left" if column in ("network", "method") else "right")
    for network in networks:
        found = {row: 100 * top1 for row, (top1, _) in read_results(network.results).items()}
        made.add_row(network.name, f"FP32 {found[0, 'fp32', 'FP32']:.2f}")
        for method in METHODS:
            means = (sum(found[s, method, b] for s in seeds) / len(seeds) for b in bits)
            made.add_row("", method, *(f"{mean:.2f}" for mean in means))
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder with train/ and val/")
    parser.add_argument("--weights", type=Path, required=True, help="folder of weights files")
    parser.add_argument("--out", type=Path, default=Path("imagenet-results"))
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--bits", nargs="+", default=list(BITS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--per-class", type=int, default=1)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--limit", type=int, help="validation images, evenly spread; default all")
    parser.add_argument("--config", type=Path, help="TOML of settings, as for fdda-fast quantize")
    args = parser.parse_args(arguments)
    # Crops are what the teachers were trained with; of every class there is an image.
    images = fdda.RefineConfig(images=1024)
    args.settings = fdda.QuantizeConfig(augmentation="crop", refine=images)
    if args.config is not None:
        args.settings = from_dict(args.settings, read_toml(args.config), str(args.config))
    args.out.mkdir(parents=True, exist_ok=True)
    networks = [Network(name, args) for name in args.models]
    for network in networks:
        for seed in args.seeds:
            network.run(seed)
    Console(width=120).print(table(networks, args.seeds, args.bits))


if __name__ == "__main__":
    main()
