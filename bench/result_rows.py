"""Results as rows of a CSV file: what is there need not be computed again."""

from __future__ import annotations

import csv
import fcntl
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

KEY = ("seed", "method", "bits")


class Result(NamedTuple):
    """Top-1 (0..1), and the seconds that the network took to make."""

    top1: float
    seconds: float


Kind = TypeVar("Kind", bound=NamedTuple)


def read_results(
    path: Path, key: Sequence[str] = KEY, kind: type[Kind] = Result
) -> dict[tuple, Kind]:
    """Results by the values of the columns `key`; seeds are integers, the others strings.

    Args:
        kind: a named tuple of floats; its fields are the columns behind.

    Raises:
        ValueError: the file has other columns.
    """
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        columns = [*key, *kind._fields]
        if rows.fieldnames != columns:
            raise ValueError(f"{path}: expected the columns {columns}, got {rows.fieldnames}")
        return {
            tuple(int(row[c]) if c == "seed" else row[c] for c in key): kind(
                *(float(row[c]) for c in kind._fields)
            )
            for row in rows
        }


def append_result(path: Path, row: tuple, result: NamedTuple, key: Sequence[str] = KEY) -> None:
    """Adds a row; several processes may do so at once.

    Args:
        row: the values of the columns `key`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        writer = csv.writer(file, lineterminator="\n")
        if file.seek(0, 2) == 0:
            writer.writerow([*key, *result._fields])
        writer.writerow([*row, *(f"{value:.4f}" for value in result)])
