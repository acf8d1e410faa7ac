"""Commands that learn: centers, synthesize, quantize."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..files import digest
from ..gallery import save_gallery
from ..generator import Generator
from ..quantization.finetune import quantize as quantize_stage
from ..runs import RunFolder, display, save_quantized
from ..statistics import BNSCenters, collect_centers
from ..synthesis import train_generator
from ..writing import synthesize as write_images
from .app import app
from .options import (
    InputOptions,
    Inputs,
    RunOptions,
    SettingsOptions,
    grouped,
    parse_bits,
    use_threads,
)


@contextmanager
def _interruptible(run: RunFolder) -> Iterator[None]:
    """On Ctrl-C says what is kept and how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        kept = f"{run.checkpoint} holds all steps done" if run.checkpoint.is_file() else ""
        advice = "the same command with --resume goes on" if run.path.is_dir() else ""
        told = "; ".join(part for part in ("interrupted", kept, advice) if part)
        print(told, file=sys.stderr)
        raise typer.Exit(130) from error


def _open_run(to: RunOptions, stage: str, record: dict[str, Any]) -> RunFolder:
    """The folder of the run; ends the command where it is finished already."""
    run = RunFolder(to.out, stage, record, resume=to.resume)
    if run.finished:
        print(f"{run.path} is finished already")
        raise typer.Exit
    return run


def _begin(run: RunFolder, inputs: Inputs) -> None:
    """Makes the run folder, with what any command puts there first."""
    run.begin()
    inputs.calibration.save_record(run.path / "calibration.csv")


def _collect_centers(inputs: Inputs) -> BNSCenters:
    calibration = inputs.calibration
    return collect_centers(
        inputs.teacher, calibration.images, calibration.labels, inputs.num_classes
    )


@app.command()
@grouped
def centers(where: InputOptions, to: RunOptions) -> None:
    """Draw calibration images and collect the BNS center of every class."""
    use_threads(to.threads)
    inputs = where.open(to.seed or 0)
    run = _open_run(to, "centers", inputs.record)
    result = _collect_centers(inputs)
    _begin(run, inputs)
    result.save(run.result)
    print(
        f"{len(inputs.calibration.labels)} images, {result.num_layers} BN layers; "
        f"{int(result.reliable.sum())} of {result.num_classes} classes have a reliable center"
    )
    print(run.result)


@app.command()
@grouped
def synthesize(
    where: InputOptions,
    to: RunOptions,
    settings: SettingsOptions,
    num_images: Annotated[int, typer.Option(min=1, help="Synthetic images to write.")] = 1000,
    steps: Annotated[int | None, typer.Option(min=0, help="Training steps.")] = None,
) -> None:
    """Train the generator and write a synthetic data set."""
    use_threads(to.threads)
    config = settings.load(to.seed)[0].synthesis
    if steps is not None:
        config = config.replace(steps=steps)
    inputs = where.open(config.seed)
    record = {**inputs.record, "num_images": num_images, "synthesis": config}
    run = _open_run(to, "synthesize", record)
    generator_file = run.path / "generator.safetensors"
    with _interruptible(run):
        if generator_file.is_file():
            generator = Generator.load(generator_file)
        else:
            collected = _collect_centers(inputs)
            with run.following("generator") as progress:
                generator = train_generator(
                    inputs.teacher,
                    collected,
                    config,
                    checkpoint=run.checkpoint,
                    resume=to.resume,
                    progress=progress,
                )
            _begin(run, inputs)
            generator.save(generator_file)
        preprocessing = inputs.source.preprocessing
        with display("images") as progress:
            write_images(
                generator,
                run.path / "images",
                num_images=num_images,
                preprocessing=preprocessing,
                seed=config.seed,
                progress=progress,
            )
        save_gallery(run.result, generator, preprocessing, inputs.class_names, seed=config.seed)
    print(generator_file, run.path / "images", run.result, sep="\n")


@app.command()
@grouped
def quantize(
    where: InputOptions,
    to: RunOptions,
    settings: SettingsOptions,
    bits: Annotated[str, typer.Option(help="W4A4; W4A4F8L8: first and last layer 8 bits.")],
    generator: Annotated[
        Path | None, typer.Option(help="Finished generator; default: one is trained along the way.")
    ] = None,
    ptq: Annotated[
        bool, typer.Option("--ptq", help="Activation ranges only: no generator, no tuning.")
    ] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Fine-tuning steps.")] = None,
    warmup_steps: Annotated[
        int | None, typer.Option(min=0, help="Generator steps before fine-tuning.")
    ] = None,
) -> None:
    """Quantise a network and fine-tune it on calibration and synthetic images."""
    use_threads(to.threads)
    if ptq and (steps is not None or warmup_steps is not None or generator is not None):
        raise ValueError("--ptq takes no --steps, --warmup-steps or --generator")
    config, widths = settings.load(to.seed, parse_bits(bits))
    if ptq:
        config = config.replace(steps=0)
    if steps is not None:
        config = config.replace(steps=steps)
    if warmup_steps is not None:
        config = config.replace(warmup_steps=warmup_steps)
    inputs = where.open(config.seed)
    config = config.replace(flip=config.flip and inputs.source.flip)
    record = {**inputs.record, "bits": widths, "quantize": config}
    loaded = None
    if generator is not None:
        loaded = _fitting_generator(generator, inputs)
        record["generator"] = {"file": str(generator.resolve()), "sha256": digest(generator)}
    run = _open_run(to, "quantize", record)
    with _interruptible(run), run.following("quantize") as progress:
        student = quantize_stage(
            inputs.teacher,
            (inputs.calibration.images, inputs.calibration.labels),
            widths,
            config,
            loaded,
            checkpoint=run.checkpoint,
            resume=to.resume,
            progress=progress,
        )
        _begin(run, inputs)
        save_quantized(run, student)
    print(run.result)


def _fitting_generator(path: Path, inputs: Inputs) -> Generator:
    generator = Generator.load(path)
    shape = tuple(inputs.calibration.images.shape[1:])
    if (generator.num_classes, generator.image_shape) != (inputs.num_classes, shape):
        raise ValueError(
            f"{path}: makes {generator.num_classes} classes of {generator.image_shape} images, "
            f"the teacher reads {inputs.num_classes} classes of {shape}"
        )
    return generator
