"""Networks at 224 px: this library at low bits, its peers at 8, PyTorch in float32."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import runtimes
import torch
from models import images, network, onnx_int8, packed
from rich.console import Console
from rich.table import Table
from timing import Clock, bursts
from torch import nn
from torch.fx.experimental.optimization import fuse

import fdda_fast as fdda

FLOAT = "PyTorch float32"
# Root of the mean squared difference to float32's logits, over their standard deviation. Of 8 bits:
# what computes another network has 1.4.
_LARGEST_ERROR = 0.3
_SLOWEST = 12  # layers to name


def report(console: Console, args: argparse.Namespace) -> None:
    for name in args.networks:
        model = network(name)
        with tempfile.TemporaryDirectory() as folder:
            files = _Files(model, args.bits, Path(folder))
            for threads in args.threads:
                torch.set_num_threads(threads)
                for batch in args.batch:
                    _report(console, args, name, files, batch, threads)


class _Files:
    """One network as every runtime reads it.

    paths: label -> (runtime, file). macs: multiply-adds for one image.
    """

    def __init__(self, model: nn.Module, bits: list[int], folder: Path) -> None:
        self.model = fuse(model).to(memory_format=torch.channels_last)
        self.paths = {}
        for b in bits:
            path = folder / f"w{b}a{b}.fdda"
            self.macs = sum(row.macs for row in packed(model, b, path).summary())
            self.paths[f"{runtimes.OURS} {fdda.Bits(b, b)}"] = runtimes.OURS, path
        if peers := runtimes.peers():
            onnx_int8(model, folder / "int8.onnx")
            self.paths |= {peer: (peer, folder / "int8.onnx") for peer in peers}

    def load(self, batch: int, threads: int) -> dict[str, runtimes.Runtime]:
        loaded = {
            label: runtimes.load(runtime, path, batch, threads)
            for label, (runtime, path) in self.paths.items()
        }
        return loaded | {FLOAT: runtimes.Runtime(self._run_float)}

    def _run_float(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x.contiguous(memory_format=torch.channels_last))


@torch.inference_mode()
def _report(
    console: Console,
    args: argparse.Namespace,
    name: str,
    files: _Files,
    batch: int,
    threads: int,
) -> None:
    loaded, x = files.load(batch, threads), images(batch, seed=100)
    errors = _errors({label: runtime.run(x) for label, runtime in loaded.items()})
    runs = {label: lambda run=runtime.run: run(x) for label, runtime in loaded.items()}
    seconds = bursts(runs, args.rounds, args.clock)
    ours = [label for label in loaded if label.startswith(runtimes.OURS)]
    table = Table(title=f"{name}, batch {batch}, {threads} thread(s)")
    table.add_column("", no_wrap=True)
    columns = ["ms", "GMAC/s", "x float32", *(f"time / {label.split()[-1]}'s" for label in ours)]
    for column in (*columns, "error"):
        table.add_column(column, justify="right")
    for label, value in seconds.items():
        table.add_row(
            label,
            f"{1e3 * value:.2f}",
            f"{batch * files.macs / value / 1e9:.0f}",
            f"{seconds[FLOAT] / value:.2f}",
            *(f"{value / seconds[other]:.2f}" for other in ours),
            f"{errors[label]:.3f}",
        )
    console.print(table)
    for label, runtime in loaded.items():
        if runtime.kernels:
            console.print(f"{label} runs: {runtime.kernels}", highlight=False)
    if args.split:
        for label in ours:
            _print_split(console, label, loaded[label].run, x, args.rounds, args.clock)


def _errors(logits: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of all logits against float32's.

    Raises:
        RuntimeError: they are not finite, or a peer's are not those of the same network.
    """
    expected, errors = logits[FLOAT], {}
    for label, y in logits.items():
        errors[label] = float((y - expected).square().mean().sqrt() / expected.std())
        if not y.isfinite().all():
            raise RuntimeError(f"{label}: logits that are not finite")
        if label in runtimes.MODULES and errors[label] > _LARGEST_ERROR:
            raise RuntimeError(f"{label}: logits differ from float32's by {errors[label]:.2f}")
    return errors


def _print_split(
    console: Console,
    label: str,
    model: fdda.PackedModel,
    x: torch.Tensor,
    rounds: int,
    clock: Clock,
) -> None:
    """The slowest nodes of a packed model, and what all of a kind take together."""
    seconds: dict[str, list[float]] = {}

    def observe(node, *_) -> None:
        nonlocal last
        now = clock()
        seconds.setdefault(node.name, []).append(now - last)
        last = clock()

    for _ in range(5 * rounds):
        last = clock()
        model.execute(x, observe)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    whole = sum(medians.values())
    rows = {row.name: row for row in model.summary()}
    table = Table(title=f"{label}: slowest of {len(rows)} nodes, {1e3 * whole:.2f} ms in all")
    for column in ("node", "operation", "input", "output"):
        table.add_column(column, no_wrap=True)
    for column in ("ms", "%", "GMAC/s"):
        table.add_column(column, justify="right")
    for name in sorted(medians, key=medians.get, reverse=True)[:_SLOWEST]:
        row, value = rows[name], medians[name]
        rate = len(x) * row.macs / value / 1e9
        shapes = ("x".join(map(str, shape[1:])) for shape in (row.input_shape, row.output_shape))
        table.add_row(
            name, row.op, *shapes, f"{1e3 * value:.3f}", f"{100 * value / whole:.0f}", f"{rate:.1f}"
        )
    kinds: dict[str, float] = {}
    for name, value in medians.items():
        kinds[rows[name].op] = kinds.get(rows[name].op, 0) + value
    console.print(table)
    shares = (f"{kind} {1e3 * value:.2f}" for kind, value in kinds.items())
    console.print("ms by operation: " + ", ".join(shares), highlight=False)
