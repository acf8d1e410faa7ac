"""What the compilers make of the Triton kernels, without a GPU: `python bench/triton_report.py`.

Compiles a kernel's plainest and fullest variant in both dtypes and memory orders, aligned and not,
for every target; `--all`: every configuration. A row is the worst of them: registers and spills per
thread, shared memory per program; bytes moved per element of a float32 tensor, and the least the
task needs, in the configuration that does most; whether every access to a tensor is one of 128 bits
where rows start on 16 bytes.
"""

from __future__ import annotations

from argparse import ArgumentParser
from itertools import product

from rich.console import Console
from rich.progress import track
from rich.table import Table

from fdda_fast.kernels import offline


def row(entry: offline.Entry, target: str, configurations: list) -> list[str]:
    """Name, target, configurations, registers, spills, shared memory, bytes, 128-bit accesses."""
    found = []
    wide = True
    for constants, dtype in configurations:
        binary = offline.build(entry, constants, dtype, offline.TARGETS[target])
        found.append(offline.resources(binary))
        if entry.passes and constants["ALIGN"] == 16:
            wide &= found[-1].wide_passes(constants, dtype) >= entry.passes(constants)
    worst = [
        str(max(getattr(f, name) for f in found)) for name in ("registers", "spills", "shared")
    ]
    moved = least = ""
    if entry.passes:
        fullest = configurations[-1][0]
        moved = str(4 * entry.passes(fullest))
        least = str(4 * (entry.least or entry.passes)(fullest))
    wide_text = ("yes" if wide else "no") if entry.passes else ""
    return [entry.name, target, str(len(found)), *worst, moved, least, wide_text]


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every configuration")
    every = parser.parse_args().all
    table = Table("kernel", "target")
    for heading in ("configurations", "registers", "spills", "shared bytes"):
        table.add_column(heading, justify="right")
    table.add_column("bytes per element", justify="right")
    table.add_column("least", justify="right")
    table.add_column("128 bits")
    pairs = list(product(offline.TABLE, offline.TARGETS))
    for entry, target in track(pairs, "compiling", console=Console(stderr=True)):
        table.add_row(*row(entry, target, list(entry.every if every else entry.some)))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
