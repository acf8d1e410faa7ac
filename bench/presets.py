"""The preset `fast` against `reference`, the paper's recipe in full: `python bench/presets.py`.

The shipped network on scikit-learn's digits, one real image per class, all layers at the named
bits, the paper's placement of quantisers (which `reference` asks for) in both, the generator
trained along. Fake-quantised accuracy on the 540 test images, and wall time. The paper's 80,000
generator and 70,000 fine-tuning steps take the better part of an hour on one core.

Rows already in the CSV file are not computed again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from accuracy import COLUMNS, append_result, read_results
from rich.console import Console
from rich.table import Table

import fdda_fast as fdda
from fdda_fast.config import PRESETS, preset
from fdda_fast.data import draw, open_source
from fdda_fast.evaluation import accuracy
from fdda_fast.models import load_teacher
from fdda_fast.runs import display

RESULTS = Path(__file__).parent / "results" / "presets.csv"


def run(seed: int, name: str, bits: fdda.Bits) -> tuple[float, float]:
    """Top-1 (0..1) and seconds."""
    source = open_source("digits", "train")
    few = draw(source, 1, seed)
    config = preset(name).replace(placement="paper", flip=source.flip, seed=seed)
    teacher = load_teacher("digits-resnet8")
    start = time.monotonic()
    with display(f"{name} {bits}") as progress:
        student = fdda.quantize(teacher, (few.images, few.labels), bits, config, progress=progress)
    seconds = time.monotonic() - start
    return accuracy(student, open_source("digits", "test")), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--bits", nargs="+", choices=list(COLUMNS), default=["W3A3", "W4A4"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = Table(title="digits, ResNet-8")
    for column in ("seed", "bits", "preset", "top-1 %", "seconds"):
        table.add_column(column, justify="right")
    for seed in args.seeds:
        for text in args.bits:
            for name in PRESETS:
                row = seed, name, text
                if row not in read_results(args.results):
                    append_result(args.results, row, *run(seed, name, COLUMNS[text]))
                top1, seconds = read_results(args.results)[row]
                table.add_row(str(seed), text, name, f"{100 * top1:.2f}", f"{seconds:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
