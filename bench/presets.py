"""The preset `fast` against `reference`, the paper's recipe in full: `python bench/presets.py`.

The shipped network of scikit-learn's digits (default, 540 test images) or Fashion-MNIST (10,000),
one real image per class, all layers at the named bits, the paper's placement of quantisers (which
`reference` asks for) in both. Fake-quantised accuracy on the test set, and wall time; that of a
resumed run counts from its resumption. The paper's 80,000 generator and 70,000 fine-tuning steps
take half an hour on digits, five hours on Fashion-MNIST, on one core.

Rows already in the CSV file are not computed again, and an interrupted run is resumed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from accuracy import COLUMNS
from result_rows import Result, append_result, read_results
from rich.console import Console
from rich.table import Table

import fdda_fast as fdda
from fdda_fast.config import PRESETS, preset
from fdda_fast.data import draw, open_source
from fdda_fast.evaluation import accuracy
from fdda_fast.models import load_teacher
from fdda_fast.runs import display

RESULTS = Path(__file__).parent / "results"
NETWORKS = {"digits": "digits-resnet8", "fashion-mnist": "fashion-mnist-resnet20"}


def run(
    dataset: str, seed: int, name: str, bits: fdda.Bits, checkpoint: Path
) -> tuple[float, float]:
    """Top-1 (0..1) and seconds."""
    source = open_source(dataset, "train")
    few = draw(source, 1, seed)
    config = preset(name).replace(placement="paper", flip=source.flip, seed=seed)
    start = time.monotonic()
    with display(f"{name} {bits}") as progress:
        student = fdda.quantize(
            load_teacher(NETWORKS[dataset]),
            (few.images, few.labels),
            bits,
            config,
            checkpoint=checkpoint,
            resume=True,
            progress=progress,
        )
    seconds = time.monotonic() - start
    return accuracy(student, open_source(dataset, "test")), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", choices=list(NETWORKS), default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--bits", nargs="+", choices=list(COLUMNS), default=["W3A3", "W4A4"])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS)
    parser.add_argument("--results", type=Path, help="default: bench/results/presets-DATASET.csv")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = args.results or RESULTS / f"presets-{args.dataset}.csv"
    table = Table(title=NETWORKS[args.dataset])
    for column in ("seed", "bits", "preset", "top-1 %", "seconds"):
        table.add_column(column, justify="right")
    for seed in args.seeds:
        for text in args.bits:
            for name in args.presets:
                row = seed, name, text
                if row not in read_results(results):
                    file = results.with_suffix(f".{seed}-{name}-{text}.unfinished")
                    top1, seconds = run(args.dataset, seed, name, COLUMNS[text], file)
                    append_result(results, row, Result(top1, seconds))
                    file.unlink(missing_ok=True)
                top1, seconds = read_results(results)[row]
                table.add_row(str(seed), text, name, f"{100 * top1:.2f}", f"{seconds:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
