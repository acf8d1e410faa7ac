"""The command that chooses bit widths: allocate."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape
from rich.table import Table

from ..config import to_dict, write_toml
from ..deploy.costs import packed_costs
from ..generator import sample
from ..quantization.allocation import allocate
from ..quantization.bits import Bits, check_bits
from ..quantization.prepare import prepare
from ..quantization.sensitivity import sensitivity
from ..runs import RunFolder, display
from .app import app, print_table
from .options import (
    InputOptions,
    RunOptions,
    check_compiled,
    file_record,
    fitting_generators,
    grouped,
    use_threads,
)

# Budget option -> the cost that it limits, and the option's unit in the cost's.
_KINDS = {
    "size_bytes": ("bytes", 1.0),
    "average_bits": ("average_bits", 1.0),
    "bit_operations": ("bit_operations", 1.0),
    "latency_ms": ("seconds", 1e-3),
}


@dataclass(frozen=True)
class BudgetOptions:
    """What the network must not exceed; one of them."""

    size_bytes: Annotated[float | None, typer.Option(help="Budget: size of the packed file.")] = (
        None
    )
    average_bits: Annotated[float | None, typer.Option(help="Budget: mean bits of a weight.")] = (
        None
    )
    bit_operations: Annotated[
        float | None,
        typer.Option(help="Budget: MACs of an image x weight bits x input bits, summed up."),
    ] = None
    latency_ms: Annotated[
        float | None, typer.Option(help="Budget: time that an image takes, measured on this CPU.")
    ] = None

    def cost_and_limit(self) -> tuple[str, float]:
        """Raises ValueError unless one option is given, which can be measured."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        given = {name: limit for name, limit in given.items() if limit is not None}
        if len(given) != 1:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in _KINDS)
            raise ValueError(f"expected one budget of {names}, got {len(given)}")
        ((name, limit),) = given.items()
        kind, unit = _KINDS[name]
        if kind == "seconds":
            check_compiled("--latency-ms")
        return kind, limit * unit


@app.command("allocate")
@grouped
def allocate_command(
    where: InputOptions,
    to: RunOptions,
    budget: BudgetOptions,
    weight_bits: Annotated[str, typer.Option(help="Widths that weights may have.")] = "2,3,4,8",
    input_bits: Annotated[
        str | None, typer.Option(help="Widths that inputs may have; default those of weights.")
    ] = None,
    keep_float: Annotated[
        list[str] | None,
        typer.Option(help="Layer that stays in float, as `keep_float` in a settings file has it."),
    ] = None,
    generator: Annotated[
        Path | None, typer.Option(help="Finished generator: measure on images of it as well.")
    ] = None,
    num_images: Annotated[
        int, typer.Option(min=1, help="With --generator: images of it, all classes alike.")
    ] = 64,
) -> None:
    """Choose every layer's bit widths: those of the least loss under a budget.

    `quantize --bits OUT/bits.toml` takes them. What was measured stays in the folder: the same
    command with --resume and another budget does not measure losses again.
    """
    use_threads(to.threads)
    kind, limit = budget.cost_and_limit()
    weights = _widths("--weight-bits", weight_bits)
    activations = weights if input_bits is None else _widths("--input-bits", input_bits)
    inputs = where.open(to.seed or 0)
    images = inputs.calibration.images
    # The budget is not part of it: losses do not depend on it.
    kept = tuple(keep_float or ())
    prepare(inputs.teacher, Bits(), keep_float=kept)  # refused before there is a folder
    record = {
        **inputs.record, "weight_bits": weights, "input_bits": activations, "keep_float": kept
    }  # fmt: skip
    if generator is not None:
        (loaded,) = fitting_generators([generator], inputs)
        labels = torch.arange(num_images) % inputs.num_classes
        images = torch.cat([images, sample(loaded, labels, to.seed or 0)[0]])
        record |= {"generator": file_record(generator), "num_images": num_images}
    run = RunFolder(to.out, "allocate", record, resume=to.resume)
    run.begin()
    with display("losses") as progress:
        found = sensitivity(
            inputs.teacher,
            images,
            weights,
            input_widths=activations,
            keep_float=kept,
            checkpoint=run.path / "losses.json",
            progress=progress,
        )
    with display("costs") as progress:
        cost = packed_costs(inputs.teacher, images[:1], found.loss, kind, progress, keep_float=kept)
    chosen = allocate(found.loss, cost, limit, found.groups).overrides
    write_toml(run.result, {"bits": {"overrides": to_dict(chosen)}})
    table = Table()
    table.add_column("layer")
    label = kind.replace("_", " ")
    for column in ("weight bits", "input bits", "loss", label):
        table.add_column(column, justify="right")
    for name, pair in chosen.items():
        figures = (f"{found.loss[name][pair]:.4g}", f"{cost[name][pair]:.6g}")
        table.add_row(escape(name), *map(str, pair), *figures)
    total = sum(cost[name][pair] for name, pair in chosen.items())
    print_table(f"{label}: {total:g} of {limit:g}; the first layer's contain the network's", table)
    print(run.result)


def _widths(option: str, text: str) -> list[int]:
    """Sorted, each once."""
    try:
        return sorted({check_bits(option, int(part)) for part in text.split(",")})
    except ValueError:
        raise ValueError(
            f"{option}: expected widths of 2 to 8 bits, as 2,4,8, got {text!r}"
        ) from None
