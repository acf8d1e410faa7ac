"""The whole way on a shipped teacher: centers, images, quantisation, packing, comparison."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.table import Table

from . import evaluation
from .checkpoint import save_tensors
from .config import QuantizeConfig
from .data import draw, open_source
from .deploy import load_packed, pack
from .files import written_whole
from .gallery import save_gallery
from .models import load_teacher
from .quantization.bits import Bits
from .quantization.quantize import quantize
from .refinement import refine
from .runs import RunFolder, display
from .statistics import collect_centers

BITS = "W2A3"


@dataclass(frozen=True)
class Recipe:
    """What one demo does.

    Args:
        dataset, model: shipped ones.
        per_class: calibration images.
        config: of images and quantisation; images are mirrored where the data set allows it.
    """

    dataset: str
    model: str
    per_class: int
    config: QuantizeConfig = field(default_factory=QuantizeConfig)


RECIPES = {
    "digits": Recipe("digits", "digits-resnet8", 1),
    "fashion-mnist": Recipe("fashion-mnist", "fashion-mnist-resnet20", 1),
}


@dataclass(frozen=True)
class Line:
    """One network of the comparison; None where there is nothing to measure.

    Args:
        top1, agreement: 0..1, on the test split; agreement is with FP32.
        file_bytes: on disk. seconds: median latency, batch 1.
    """

    network: str
    top1: float
    agreement: float
    file_bytes: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class DemoResult:
    """All figures of a demo; `same` of `images` are classified alike by packed and fake."""

    recipe: Recipe
    bits: Bits
    lines: tuple[Line, ...]
    same: int
    images: int
    reliable: int
    folder: Path


def run_demo(recipe: Recipe, out: Path, bits: Bits) -> DemoResult:
    """Runs the stages, writes their results to `out` and measures them.

    Raises:
        ValueError: `out` holds something else than an earlier demo.
    """
    teacher = load_teacher(recipe.model)
    source = open_source(recipe.dataset, "train")
    test = open_source(recipe.dataset, "test")
    run = RunFolder(out, "demo", {"recipe": recipe, "bits": bits}, overwrite=True)
    config = recipe.config.replace(flip=source.flip)
    calibration = draw(source, recipe.per_class, config.seed)
    images, labels = calibration.images, calibration.labels
    centers = collect_centers(teacher, images, labels, source.num_classes)
    run.begin()
    calibration.save_record(out / "calibration.csv")
    centers.save(out / "centers.safetensors")

    with display("images") as progress:
        synthetic = refine(
            teacher, (images, labels), config.refine,
            seed=config.seed, flip=config.flip, progress=progress,
        )  # fmt: skip
    save_gallery(out / "gallery.png", *synthetic, source.preprocessing, source.class_names)

    # With and without this package's own calibration, so that the table does not credit the
    # training with what calibration alone does.
    calibrated = quantize(teacher, (images, labels), bits, config.replace(steps=0))
    minmax = quantize(teacher, (images, labels), bits, config.plain_minmax())
    with display("quantize") as progress:
        student = quantize(
            teacher, (images, labels), bits, config, synthetic=synthetic, progress=progress
        )

    teacher_file, packed_file = out / "teacher.safetensors", out / "model.fdda"
    save_tensors(teacher_file, teacher.state_dict(), {})
    pack(student, images[:1], source.preprocessing, source.class_names).save(packed_file)
    packed = load_packed(packed_file)

    networks = {"fp32": teacher, "minmax": minmax, "calibrated": calibrated}
    networks |= {"fdda": student, "packed": packed}
    predicted = {n: evaluation.predictions(f, test) for n, f in networks.items()}
    seconds = evaluation.latency({"fp32": teacher, "packed": packed}, test.images([0]))

    def line(network: str, name: str, file: Path | None = None) -> Line:
        top1, agreement = (
            evaluation.share_equal(predicted[name], other)
            for other in (test.labels, predicted["fp32"])
        )
        return Line(
            network, top1, agreement, file.stat().st_size if file else None, seconds.get(name)
        )

    lines = (
        line("FP32, PyTorch", "fp32", teacher_file),
        line(f"{bits} min-max fake-quantised", "minmax"),
        line(f"{bits} calibrated, untrained", "calibrated"),
        line(f"{bits} FDDA fake-quantised", "fdda"),
        line(f"{bits} FDDA packed integers", "packed", packed_file),
    )
    _write_results(run.result, lines)
    same = int((predicted["packed"] == predicted["fdda"]).sum())
    reliable = int(centers.reliable.sum())
    return DemoResult(recipe, bits, lines, same, len(test), reliable, out)


def _write_results(path: Path, lines: tuple[Line, ...]) -> None:
    with (
        written_whole(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["network", "top1", "agreement", "file_bytes", "seconds"])
        rows.writerows([x.network, x.top1, x.agreement, x.file_bytes, x.seconds] for x in lines)


def table(result: DemoResult) -> Table:
    """The comparison."""
    made = Table()
    made.add_column("network")
    for column in ("top-1 %", "as FP32 %", "file bytes", "median ms"):
        made.add_column(column, justify="right")
    for line in result.lines:
        made.add_row(
            line.network,
            f"{100 * line.top1:.2f}",
            f"{100 * line.agreement:.2f}",
            "" if line.file_bytes is None else f"{line.file_bytes:,}",
            "" if line.seconds is None else f"{1000 * line.seconds:.3f}",
        )
    return made


def remarks(result: DemoResult) -> list[str]:
    """What the table does not say."""
    count = result.recipe.per_class
    classes = open_source(result.recipe.dataset, "train").num_classes
    return [
        "as FP32: share of test images that get the same class",
        f"{count} real image{'s' if count > 1 else ''} per class; "
        f"{result.reliable} of {classes} classes with a reliable center",
        f"packed and fake-quantised agree on {result.same} of {result.images} test images",
        f"latency: median, batch 1, {torch.get_num_threads()} threads, calls taking turns",
        f"synthetic images: {result.folder / 'gallery.png'}",
        f"packed model: {result.folder / 'model.fdda'}",
    ]
