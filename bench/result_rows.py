"""Results as rows of a CSV file: what is there need not be computed again."""

from __future__ import annotations

import csv
import fcntl
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

KEY = ("seed", "method", "bits")


class Result(NamedTuple):
    """Top-1 (0..1), and the seconds that the network took to make."""

    top1: float
    seconds: float


def read_results(path: Path, key: Sequence[str] = KEY) -> dict[tuple, Result]:
    """Results by the values of the columns `key`; seeds are integers, the others strings.

    Raises:
        ValueError: the file has other columns.
    """
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        columns = [*key, *Result._fields]
        if rows.fieldnames != columns:
            raise ValueError(f"{path}: expected the columns {columns}, got {rows.fieldnames}")
        return {
            tuple(int(row[c]) if c == "seed" else row[c] for c in key): Result(
                float(row["top1"]), float(row["seconds"])
            )
            for row in rows
        }


def append_result(
    path: Path, row: tuple, top1: float, seconds: float, key: Sequence[str] = KEY
) -> None:
    """Adds a row; several processes may do so at once.

    Args:
        row: the values of the columns `key`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        writer = csv.writer(file, lineterminator="\n")
        if file.seek(0, 2) == 0:
            writer.writerow([*key, *Result._fields])
        writer.writerow([*row, f"{top1:.4f}", f"{seconds:.1f}"])
