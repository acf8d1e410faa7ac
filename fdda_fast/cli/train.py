"""Commands that learn: centers, train-generator, synthesize, quantize."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..center_parts import CenterParts
from ..claims import Claims
from ..config import METHODS, SynthesisConfig
from ..distributed import ALONE, Ranks, process_group
from ..files import digest, written_whole
from ..gallery import GALLERY_CLASSES, GALLERY_IMAGES, save_gallery
from ..generator import Generator, sample
from ..quantization.quantize import quantize as quantize_stage
from ..runs import RunFolder, display, file_record, save_quantized
from ..shards import ShardConfig, synthesize_shards, verify_shards
from ..statistics import BNSCenters
from ..synthesis import batch_sizes, train_generator
from ..training import Progress
from ..writing import synthesize as write_images
from .app import app
from .options import (
    CentersFile,
    InputOptions,
    Inputs,
    RunOptions,
    SettingsOptions,
    ShardOptions,
    fitting_generators,
    grouped,
    parse_bits,
    use_threads,
)

_SHARDS = "shards"  # folder of a run
_POLL_SECONDS = 0.5


@contextmanager
def _interruptible(run: RunFolder) -> Iterator[None]:
    """On Ctrl-C says what is kept and how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        kept = f"{run.checkpoint} holds all steps done" if run.checkpoint.is_file() else ""
        advice = "the same command with --resume goes on" if run.path.is_dir() else ""
        told = "; ".join(part for part in ("interrupted", kept, advice) if part)
        if _rank()[0] == 0:
            print(told, file=sys.stderr)
        raise typer.Exit(130) from error


def _open_run(
    to: RunOptions, stage: str, record: dict[str, Any], inputs: Inputs, *, ends: bool = True
) -> RunFolder:
    """The folder of the run; `ends` the command where it is finished already."""
    drawn = inputs.centers_file is None
    records = {"calibration.csv": inputs.calibration.save_record} if drawn else {}
    run = RunFolder(to.out, stage, record, records, resume=to.resume)
    if run.finished and ends:
        if _rank()[0] == 0:
            print(f"{run.path} is finished already")
        raise typer.Exit
    return run


@app.command()
@grouped
def centers(
    where: InputOptions,
    to: RunOptions,
    whole: Annotated[
        bool, typer.Option("--all", help="Every image, in place of --per-class of each class.")
    ] = False,
) -> None:
    """Draw calibration images and collect the BNS center of every class.

    Images are read a batch at a time. The same command can run in many processes at once, by
    torchrun or by hand, and again after whatever ended it: they share the work.
    """
    use_threads(to.threads)
    inputs = where.open(to.seed or 0, whole=whole)
    parts = CenterParts(inputs.teacher, inputs.calibration, inputs.num_classes)
    record = {**inputs.record, "fingerprint": parts.fingerprint}
    run = _open_run(dataclasses.replace(to, resume=True), "centers", record, inputs, ends=False)
    if run.finished:  # perhaps by the others, before this one has looked
        result = BNSCenters.load(run.result)
        if _rank()[0] == 0:
            print(f"{run.path} is finished already")
    else:
        with _interruptible(run), _shown("images") as progress:
            run.begin()
            result = parts.collect(run.result, progress)
    if _rank()[0] == 0:
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
    into: ShardOptions,
    centers: CentersFile = None,
    num_images: Annotated[int, typer.Option(min=1, help="Synthetic images to write.")] = 1000,
    generator: Annotated[
        list[Path] | None,
        typer.Option(help="Finished generator, in place of training; several share the classes."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=0, help="Training steps.")] = None,
) -> None:
    """Train the generator and write a synthetic data set.

    With --shards, the same command can run in many processes at once, by torchrun or by hand, and
    again after whatever ended it: they share the work. Those of one torchrun train the generator
    together.
    """
    use_threads(to.threads)
    config = settings.load(to.seed)[0].synthesis
    if steps is not None:
        config = config.replace(steps=steps)
    files = generator or []
    if files and steps is not None:
        raise ValueError("--generator takes no --steps: it is trained already")
    into.check(len(files))
    if _rank()[1] > 1 and not into.shards:
        raise ValueError("several processes need --shards")
    inputs = where.open(config.seed, centers=centers)
    record = {**inputs.record, "num_images": num_images, "synthesis": config}
    generators = fitting_generators(files, inputs)
    if files:
        record["generators"] = [file_record(file) for file in files]
    if into.shards:
        record["shards"] = into.config(num_images, config.seed, inputs.num_classes)
        to = dataclasses.replace(to, resume=True)
    # Shards that are lost are made again, even those of a finished run.
    run = _open_run(to, "synthesize", record, inputs, ends=not into.shards)
    if into.verify and not run.finished:
        raise ValueError(f"{run.path}: no finished set to verify")
    preprocessing = inputs.source.preprocessing
    with _interruptible(run):
        if not generators:
            generators = [_own_generator(run, inputs, config, to.resume, shared=into.shards)]
        if into.verify:
            _verify_shards(run, inputs, into, generators)
            return
        run.begin()
        if into.shards:
            images = _write_shards(run, inputs, into, generators, record["shards"])
        else:
            images = run.path / "images"
            with display("images") as progress:
                write_images(
                    generators[0],
                    images,
                    num_images=num_images,
                    preprocessing=preprocessing,
                    seed=config.seed,
                    progress=progress,
                )
        names = inputs.class_names and inputs.class_names[: generators[0].num_classes]
        shown = torch.arange(min(GALLERY_CLASSES, generators[0].num_classes))
        shown = sample(generators[0], shown.repeat_interleave(GALLERY_IMAGES), config.seed)
        save_gallery(run.result, *shown, preprocessing, names)
    own = _generator_file(run)
    print(*([] if files else [own]), images, run.result, sep="\n")


@app.command("train-generator")
@grouped
def train_generators(
    where: InputOptions,
    to: RunOptions,
    settings: SettingsOptions,
    centers: CentersFile = None,
    class_groups: Annotated[
        int, typer.Option(min=1, help="Split the classes among that many generators.")
    ] = 1,
    steps: Annotated[int | None, typer.Option(min=0, help="Training steps of each.")] = None,
) -> None:
    """Train one generator, or several that share the classes, for `synthesize --generator`.

    Under torchrun the processes share every batch; with several generators each has its own
    processes, or a process trains one after the other.
    """
    use_threads(to.threads)
    config = settings.load(to.seed)[0].synthesis
    if steps is not None:
        config = config.replace(steps=steps)
    with process_group() as ranks:
        inputs = where.open(config.seed, centers=centers)
        groups = _class_groups(inputs.num_classes, class_groups)
        record = {**inputs.record, "class_groups": class_groups, "synthesis": config}
        run = _open_run(to, "train-generator", record, inputs)
        collected = inputs.centers
        for first, stop in groups:
            if not bool(collected.reliable[first:stop].any()):
                raise ValueError(
                    f"the teacher misclassifies the calibration images of all of the classes "
                    f"{first}..{stop - 1}; choose fewer --class-groups or more --per-class"
                )
        ranks.wait()  # all have looked at the folder as it was
        if ranks.first:
            run.begin()
        ranks.wait()
        team, numbers = ranks.teams(class_groups)
        with _interruptible(run):
            for number in numbers:
                _train_one(run, inputs, collected, config, groups, number, team)
            ranks.wait()
        files = [_generator_file(run, groups, number) for number in range(class_groups)]
        if ranks.first:
            _write_generators(run.result, files, groups)
            print(*files, run.result, sep="\n")


def _class_groups(num_classes: int, count: int) -> list[tuple[int, int]]:
    """First class and the one after the last, group by group."""
    if count > num_classes:
        raise ValueError(f"--class-groups: expected at most {num_classes} (classes), got {count}")
    bounds = [num_classes * i // count for i in range(count + 1)]
    return list(itertools.pairwise(bounds))


def _train_one(
    run: RunFolder,
    inputs: Inputs,
    collected: BNSCenters,
    config: SynthesisConfig,
    groups: Sequence[tuple[int, int]],
    number: int,
    team: Ranks,
) -> None:
    """Generator `number` of the run, by the team, unless it is there. Each has its own draws."""
    file = _generator_file(run, groups, number)
    if file.is_file():
        return
    suffix = file.stem.removeprefix("generator")
    checkpoint = run.checkpoint.with_stem(f"checkpoint{suffix}")
    with run.following(f"generator{suffix}", f"metrics{suffix}.csv", shown=number == 0) as progress:
        generator = train_generator(
            inputs.teacher,
            collected.between(*groups[number]),
            config.replace(seed=config.seed + number),
            checkpoint=checkpoint,
            resume=True,
            progress=progress,
            ranks=team,
        )
    if team.first:
        generator.save(file)
        checkpoint.unlink(missing_ok=True)


def _write_generators(path: Path, files: Sequence[Path], groups: Sequence[tuple[int, int]]) -> None:
    """Which generator makes which classes."""
    made = [
        {"file": file.name, "sha256": digest(file), "first_class": first, "classes": stop - first}
        for file, (first, stop) in zip(files, groups, strict=True)
    ]
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def _judges(inputs: Inputs, into: ShardOptions) -> dict[str, Any]:
    """The teacher and the centers that measure the images, where they are to be measured."""
    if not into.logits:
        return {}
    return {"teacher": inputs.teacher, "centers": inputs.centers}


def _write_shards(
    run: RunFolder,
    inputs: Inputs,
    into: ShardOptions,
    generators: Sequence[Generator],
    config: ShardConfig,
) -> Path:
    """The folder of the shards; prints what was measured on them."""
    folder = run.path / _SHARDS
    with _shown("images") as progress:
        index = synthesize_shards(
            generators,
            folder,
            config,
            preprocessing=inputs.source.preprocessing,
            progress=progress,
            **_judges(inputs, into),
        )
    for name, value in index["summary"].items():
        print(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value:.4f}")
    return folder


def _verify_shards(
    run: RunFolder, inputs: Inputs, into: ShardOptions, generators: Sequence[Generator]
) -> None:
    folder = run.path / _SHARDS
    with _shown("verified shards") as progress:
        judges = _judges(inputs, into)
        verify_shards(folder, generators, part=_rank(), progress=progress, **judges)
    print(f"{folder}: as it should be")


def _generator_file(
    run: RunFolder, groups: Sequence[tuple[int, int]] = ((0, 0),), number: int = 0
) -> Path:
    """The run's generator, or one of several."""
    suffix = f"-{number:0{len(str(len(groups) - 1))}d}" if len(groups) > 1 else ""
    return run.path / f"generator{suffix}.safetensors"


@contextmanager
def _one_team_at_a_time(run: RunFolder, ranks: Ranks) -> Iterator[Claims]:
    """Of those that share the folder, one trains and the others find what it made."""
    if ranks.first:
        run.begin()
    ranks.wait()
    with Claims(run.path / ".claims") as claims:  # dropped at the end
        # The first one does not wait alone: the others' patience would end after half an hour.
        while not ranks.any(ranks.first and claims.take(Claims.WHOLE)):
            time.sleep(_POLL_SECONDS)
        yield claims


def _own_generator(
    run: RunFolder, inputs: Inputs, config: SynthesisConfig, resume: bool, *, shared: bool
) -> Generator:
    """The run's, trained unless it is there.

    `shared`: among whoever has the folder. Of torchrun's processes, as many train as a batch has
    images for.
    """
    own = _generator_file(run)
    if not shared:
        if own.is_file():
            return Generator.load(own)
        return _train_own(run, inputs, config, resume, ALONE)
    with process_group() as ranks, _one_team_at_a_time(run, ranks) as claims:
        if ranks.any(ranks.first and own.is_file()):
            return Generator.load(own)
        team = ranks.some(max(1, min(batch_sizes(config, inputs.centers).values())))
        if team is not None:
            return _train_own(run, inputs, config, resume, team)
        with claims.held(Claims.WHOLE):  # once the first one drops it
            return Generator.load(own)


def _train_own(
    run: RunFolder, inputs: Inputs, config: SynthesisConfig, resume: bool, ranks: Ranks
) -> Generator:
    collected = inputs.centers
    with run.following("generator", shown=ranks.first) as progress:
        generator = train_generator(
            inputs.teacher,
            collected,
            config,
            checkpoint=run.checkpoint,
            resume=resume,
            progress=progress,
            ranks=ranks,
        )
    if ranks.first:
        run.begin()
        generator.save(_generator_file(run))
        run.checkpoint.unlink(missing_ok=True)
    return generator


def _rank() -> tuple[int, int]:
    """Of how many processes that torchrun has started."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def _shown(title: str) -> Iterator[Progress | None]:
    """Progress, by one of the processes that torchrun has started."""
    if _rank()[0]:
        yield None
    else:
        with display(title) as progress:
            yield progress


@app.command()
@grouped
def quantize(
    where: InputOptions,
    to: RunOptions,
    settings: SettingsOptions,
    bits: Annotated[
        str,
        typer.Option(help="W4A4; W4A4F8L8: first and last layer 8 bits; or a file of `allocate`."),
    ],
    method: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(METHODS)}: fine-tune on calibration and synthetic images; learn "
            "rounding and ranges block by block from calibration images alone; both, which is "
            "what --preset fast does."
        ),
    ] = None,
    generator: Annotated[
        Path | None,
        typer.Option(help="Finished generator, of whose images the synthetic ones are made."),
    ] = None,
    ptq: Annotated[bool, typer.Option("--ptq", help="Activation ranges only: no tuning.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Fine-tuning steps.")] = None,
    warmup_steps: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Generator steps before fine-tuning, where one is trained along (--preset "
            "reference, or refine.images = 0 in --config).",
        ),
    ] = None,
) -> None:
    """Quantise a network and tune it on calibration and synthetic images.

    Under torchrun the processes share every batch.
    """
    use_threads(to.threads)
    tuned = method is not None or steps is not None or warmup_steps is not None
    if ptq and tuned:
        raise ValueError("--ptq takes no --method, --steps or --warmup-steps")
    config, widths = settings.load(to.seed, parse_bits(bits))
    if ptq:
        config = config.replace(method="fdda", steps=0)
    elif method is not None:
        config = config.replace(method=method)
    # Of a settings file, too.
    if config.method == "reconstruct" and (steps is not None or warmup_steps is not None):
        raise ValueError("--method reconstruct takes no --steps or --warmup-steps")
    if steps is not None:
        config = config.replace(steps=steps)
    if warmup_steps is not None:
        if generator is not None or config.refine.images:
            raise ValueError(
                "--warmup-steps needs a generator that is trained along: no --generator, and "
                "--preset reference or refine.images = 0 in --config"
            )
        config = config.replace(warmup_steps=warmup_steps)
    with process_group() as ranks:
        inputs = where.open(config.seed)
        config = config.replace(flip=config.flip and inputs.source.flip)
        record = {**inputs.record, "bits": widths, "quantize": config}
        loaded = None
        if generator is not None:
            (loaded,) = fitting_generators([generator], inputs)
            record["generator"] = file_record(generator)
        run = _open_run(to, "quantize", record, inputs)
        ranks.wait()  # all have looked at the folder as it was
        following = run.following("quantize", shown=ranks.first)
        with _interruptible(run), following as progress:
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
            if ranks.first:
                run.begin()
                save_quantized(run, student)
                run.checkpoint.unlink(missing_ok=True)
                print(run.result)
