"""Resident memory that loading and running ResNet-18 adds, batch 1, one thread.

A process of its own for each runtime; counted from after the imports. The anonymous part leaves out
pages of files: code of the runtime that is loaded late, a model file that stays mapped.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import runtimes
import torch
from models import images, network, onnx_int8, packed
from rich.console import Console
from rich.table import Table

BITS = 4
_FIELDS = ("VmRSS", "RssAnon")
_RUNS = 10


def report(console: Console) -> None:
    table = Table(title="resident memory, resnet18, batch 1")
    table.add_column("", no_wrap=True)
    for column in ("MiB", "of it anonymous", "model file"):
        table.add_column(column, justify="right")
    model = network("resnet18")
    with tempfile.TemporaryDirectory() as folder:
        low, int8 = Path(folder, "low.fdda"), Path(folder, "int8.onnx")
        packed(model, BITS, low)
        paths = {runtimes.OURS: low}
        if peers := runtimes.peers():
            onnx_int8(model, int8)
            paths |= dict.fromkeys(peers, int8)
        for name, path in paths.items():
            command = [sys.executable, __file__, name, str(path)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            added = [float(value) for value in done.stdout.split()]
            megabytes = [*added, path.stat().st_size / 2**20]
            label = f"{name} W{BITS}A{BITS}" if name == runtimes.OURS else name
            table.add_row(label, *(f"{value:.1f}" for value in megabytes))
    console.print(table)


@torch.inference_mode()
def _print_added(name: str, path: Path) -> None:
    """MiB of `_FIELDS`."""

    def kibibytes() -> list[int]:
        text = Path("/proc/self/status").read_text()
        return [int(text.split(field + ":")[1].split()[0]) for field in _FIELDS]

    torch.set_num_threads(1)
    runtimes.import_runtime(name)
    x = images(1, 0)
    before = kibibytes()
    run = runtimes.load(name, path, batch=1, threads=1).run
    for _ in range(_RUNS):
        run(x)
    after = kibibytes()
    print(*((b - a) / 2**10 for a, b in zip(before, after, strict=True)))


if __name__ == "__main__":
    _print_added(sys.argv[1], Path(sys.argv[2]))
