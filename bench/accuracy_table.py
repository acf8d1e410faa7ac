"""The tables of `bench/accuracy.py`: mean and deviation, drop from FP32, targets, gap closed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from accuracy_methods import EVERY
from rich.table import Table

# Points below FP32.
TARGETS = {"W4A4": 0.3, "W3A3": 1.0, "W2A4": 1.5, "W2A2": 6.0}
GAP_TARGET = 0.8
FP32 = ("fp32", "FP32", 0)


class Measured(NamedTuple):
    """On the test set.

    Args:
        top1: 0..1.
        logit_error: mean squared difference of the logits to FP32's, each image's mean difference
            taken out: it varies less than top-1 does.
        seconds: that the network took to make.
    """

    top1: float
    logit_error: float
    seconds: float


Results = Mapping[tuple, Measured]


def table(
    results: Results,
    network: str,
    methods: Sequence[str],
    columns: Sequence[str],
    seeds: Sequence[int],
) -> Table:
    """What is known of one network; a cell without any row is empty.

    Args:
        results: by (network, method, bits, seed), FP32's included.
    """
    fp32 = 100 * results[(network, *FP32)].top1
    targets = ", ".join(f"{bits} {TARGETS[bits]}" for bits in columns)
    made = Table(
        title=f"{network}, FP32 {fp32:.2f} %, seeds {list(seeds)}",
        caption=f"✓: not more points below FP32 than {targets}; *: not all seeds yet",
    )
    made.add_column("method")
    for bits in columns:
        made.add_column(f"{bits} top-1 %", justify="right")
        made.add_column("logit error", justify="right")
    made.add_column("seconds per run", justify="right")
    for method in methods:
        rows = [_rows(results, network, method, bits, seeds) for bits in columns]
        cells = [
            cell
            for found, bits in zip(rows, columns, strict=True)
            for cell in (_cell(found, fp32, bits, seeds), _error(found))
        ]
        times = [row.seconds for found in rows for row in found.values()]
        made.add_row(
            EVERY[method].title, *cells, f"{statistics.median(times):.0f}" if times else ""
        )
    shares = [gap_closed(results, network, bits, seeds) for bits in columns]
    if any(share is not None for share in shares):
        made.add_section()
        cells = ["" if s is None else f"{100 * s:.0f} %{_mark(s >= GAP_TARGET)}" for s in shares]
        apart = [text for cell in cells for text in (cell, "")]
        made.add_row(f"gap closed (✓: >= {100 * GAP_TARGET:.0f} %)", *apart, "")
    return made


def gap_closed(results: Results, network: str, bits: str, seeds: Sequence[int]) -> float | None:
    """Of what 1,024 real images bring reconstruction, the share that FDDA's images bring.

    Over the seeds of which all three are known; None where there are none, or no gap.
    """
    names = ("reconstruct", "fdda+reconstruct", "reconstruct-1024")
    found = [_rows(results, network, method, bits, seeds) for method in names]
    common = [seed for seed in seeds if all(seed in rows for rows in found)]
    if not common:
        return None
    alone, ours, bound = (statistics.mean(rows[s].top1 for s in common) for rows in found)
    return (ours - alone) / (bound - alone) if bound > alone else None


def _rows(
    results: Results, network: str, method: str, bits: str, seeds: Sequence[int]
) -> dict[int, Measured]:
    keys = {seed: (network, method, bits, seed) for seed in seeds}
    return {seed: results[key] for seed, key in keys.items() if key in results}


def _cell(found: Mapping[int, Measured], fp32: float, bits: str, seeds: Sequence[int]) -> str:
    if not found:
        return ""
    top1 = [100 * row.top1 for row in found.values()]
    mean = statistics.mean(top1)
    spread = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
    partial = "*" if len(found) < len(seeds) else ""
    mark = _mark(round(fp32 - mean, 2) <= TARGETS[bits])
    return f"{mean:.2f}{spread}{partial} ({mean - fp32:+.2f}){mark}"


def _error(found: Mapping[int, Measured]) -> str:
    return f"{statistics.mean(row.logit_error for row in found.values()):.3f}" if found else ""


def _mark(met: bool) -> str:
    return " ✓" if met else "  "
