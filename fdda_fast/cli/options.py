"""Options that several commands take, and what they stand for."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import typer
from torch import nn

from ..config import PRESETS, QuantizeConfig, from_dict, preset, read_toml
from ..data import Calibration, ImageSource, draw, every, open_source
from ..data.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from ..data.sources import FASHION_MNIST_MEAN, FASHION_MNIST_STD
from ..fingerprints import check_teacher, fingerprint
from ..generator import Generator
from ..models import SHIPPED
from ..ops import backend_info
from ..quantization.bits import Bits
from ..runs import file_record, load_recorded_teacher, teacher_record
from ..shards.plan import IMAGE_FORMATS, ShardConfig
from ..statistics import BNSCenters, collect_centers, teacher_with_norms

_MEAN, _STD, _IDX_MEAN, _IDX_STD = (
    ",".join(map(str, values))
    for values in (IMAGENET_MEAN, IMAGENET_STD, FASHION_MNIST_MEAN, FASHION_MNIST_STD)
)

CentersFile = Annotated[
    Path | None, typer.Option(help="Finished centers, in place of those of drawn images.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default PyTorch's choice.")]


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Lets a command take dataclasses: each field becomes an option of the command."""
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    options: list[inspect.Parameter] = []

    def add(name: str, default: Any, annotation: Any) -> None:
        kind = inspect.Parameter.KEYWORD_ONLY
        options.append(inspect.Parameter(name, kind, default=default, annotation=annotation))

    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            add(name, parameter.default, hints[name])
            continue
        types = get_type_hints(groups[name], include_extras=True)
        for field in fields(groups[name]):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            add(field.name, default, types[field.name])

    @functools.wraps(command)
    def call(**values: Any) -> None:
        made = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**made, **values)

    call.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    call.__annotations__ = {option.name: option.annotation for option in options}
    return call


@dataclass(frozen=True)
class Inputs:
    """The teacher, its data and the calibration draw, with their record for config.toml."""

    teacher: nn.Module
    source: ImageSource
    calibration: Calibration
    num_classes: int
    record: dict[str, Any]
    centers_file: Path | None = None

    @functools.cached_property
    def centers(self) -> BNSCenters:
        """Those of the file, or of the calibration images.

        Raises:
            ValueError: the file holds centers of another teacher.
        """
        if self.centers_file is None:
            images, labels = self.calibration.images, self.calibration.labels
            return collect_centers(self.teacher, images, labels, self.num_classes)
        centers = BNSCenters.load(self.centers_file)
        teacher = teacher_with_norms(self.teacher, self.image_shape)
        found = _described(
            centers.first_class, centers.num_classes, centers.image_shape, centers.mean
        )
        own = _described(0, self.num_classes, self.image_shape, [m.mean for m in teacher.running])
        if found != own:
            raise ValueError(f"{self.centers_file}: holds {found}, the teacher has {own}")
        check_teacher(str(self.centers_file), centers.teacher, teacher.fingerprint)
        return centers

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of what the teacher reads."""
        size = self.source.preprocessing.image_size
        return (self.source.preprocessing.channels, size, size)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """One per logit; None where the data set has fewer classes than the network."""
        names = self.source.class_names
        return names if len(names) == self.num_classes else None


@dataclass(frozen=True)
class InputOptions:
    """Which teacher, on which data."""

    model: Annotated[
        str,
        typer.Option(
            help=f"Teacher: {', '.join(sorted(SHIPPED))}, a torchvision name, or module:factory."
        ),
    ]
    data: Annotated[
        str,
        typer.Option(help="digits, fashion-mnist, or a folder (class/image files, or IDX files)."),
    ]
    weights: Annotated[
        Path | None, typer.Option(help="Teacher's weights: .safetensors or a PyTorch state dict.")
    ] = None
    num_classes: Annotated[
        int | None,
        typer.Option(min=1, help="Passed to the teacher's factory.", show_default=False),
    ] = None
    image_size: Annotated[
        int | None,
        typer.Option(help="For image files: side of the network's input; default 224."),
    ] = None
    resize: Annotated[
        int | None,
        typer.Option(
            help="For image files: shorter side before the crop; default 8/7 of image size."
        ),
    ] = None
    mean: Annotated[
        str | None,
        typer.Option(
            help="For folders: mean per channel; one value reads images as grey. Default "
            f"{_MEAN} (ImageNet) for image files, {_IDX_MEAN} (Fashion-MNIST) for IDX files."
        ),
    ] = None
    std: Annotated[
        str | None,
        typer.Option(
            help=f"For folders: standard deviation per channel; default {_STD} or {_IDX_STD}."
        ),
    ] = None
    per_class: Annotated[int, typer.Option(help="Calibration images per class.")] = 1

    def open(self, seed: int, *, whole: bool = False, centers: Path | None = None) -> Inputs:
        """Loads the teacher and draws the calibration images.

        Args:
            seed: of the draw.
            whole: takes all images in its place.
            centers: a file of them, so that no images are needed.
        """
        drawn = not whole and centers is None
        if not drawn and self.per_class != 1:
            option = "--all" if whole else "--centers"
            raise ValueError(f"{option} takes no --per-class, got {self.per_class}")
        if self.weights is not None and not self.weights.is_file():
            raise FileNotFoundError(f"{self.weights}: no such weights file")
        teacher_table = teacher_record(self.model, self.weights, self.num_classes)
        teacher = load_recorded_teacher(teacher_table)
        source = open_source(
            self.data,
            "train",
            image_size=self.image_size,
            resize=self.resize,
            mean=_numbers("--mean", self.mean),
            std=_numbers("--std", self.std),
        )
        calibration = every(source) if whole else draw(source, self.per_class, seed)
        num_classes = self._count_logits(teacher, calibration)
        if source.num_classes > num_classes:
            raise ValueError(
                f"{source.name} has {source.num_classes} classes, {self.model} only {num_classes}"
            )
        inputs = Inputs(teacher, source, calibration, num_classes, {}, centers)
        inputs.record.update(
            teacher=teacher_table,
            data={
                "source": str(Path(self.data).resolve()) if Path(self.data).is_dir() else self.data,
                **({"per_class": self.per_class, "seed": seed} if drawn else {}),
            },
            preprocessing=source.preprocessing.to_dict(),
            class_names=inputs.class_names,
            centers=file_record(centers) if centers is not None else None,
        )
        return inputs

    def _count_logits(self, teacher: nn.Module, calibration: Calibration) -> int:
        """How many the teacher returns per image."""
        with torch.no_grad():
            image = calibration.source.images(calibration.indices[:1])
            try:
                logits = teacher(image)
            except RuntimeError as error:
                raise ValueError(
                    f"{self.model} cannot take images of shape {tuple(image.shape[1:])}: {error}"
                ) from error
        if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
            raise ValueError(f"{self.model} must return one tensor of logits [N, K]")
        return logits.shape[1]


def _described(
    first: int, classes: int, shape: tuple[int, int, int], layers: Sequence[torch.Tensor]
) -> str:
    channels = sum(values.shape[1] for values in layers)
    return (
        f"classes {first}..{first + classes - 1} of {shape} images, {len(layers)} BN layers of "
        f"{channels} channels"
    )


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option}: expected numbers with commas between, got {text!r}") from None


@dataclass(frozen=True)
class RunOptions:
    """Where the run goes and what decides its draws."""

    out: Annotated[Path, typer.Option(help="Run folder to write.")]
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the unfinished run in --out, if there is one."),
    ] = False
    seed: Annotated[
        int | None, typer.Option(min=0, help="Decides every draw; default as in the settings (0).")
    ] = None
    threads: Threads = None


@dataclass(frozen=True)
class SettingsOptions:
    """The settings that a training stage starts from."""

    preset: Annotated[str, typer.Option(help=f"Settings to start from: {', '.join(PRESETS)}.")] = (
        "fast"
    )
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML file with the settings of QuantizeConfig that differ from the preset's; "
            "table synthesis: the generator's, table bits.overrides: per-layer widths, which win "
            "over those of --bits.",
        ),
    ] = None

    def load(self, seed: int | None, bits: Bits | None = None) -> tuple[QuantizeConfig, Bits]:
        """Preset, then the file, then the options."""
        settings, bits = preset(self.preset), bits or Bits()
        if self.config is not None:
            values = read_toml(self.config)
            single = from_dict(Bits(), values.pop("bits", {}), "bits").overrides
            bits = replace(bits, overrides={**bits.overrides, **single})
            settings = from_dict(settings, values, str(self.config))
        if seed is not None:
            settings = settings.replace(seed=seed, synthesis=settings.synthesis.replace(seed=seed))
        return settings, bits


@dataclass(frozen=True)
class ShardOptions:
    """Whether and how images go to tar files."""

    shards: Annotated[
        bool, typer.Option("--shards", help="Tar files (WebDataset), not a tree of PNG files.")
    ] = False
    shard_size: Annotated[
        int, typer.Option(help="With --shards: indices per file, a multiple of 64.")
    ] = 1024
    format: Annotated[str, typer.Option(help=f"With --shards: {' or '.join(IMAGE_FORMATS)}.")] = (
        IMAGE_FORMATS[0]
    )
    distribution: Annotated[
        str,
        typer.Option(help="With --shards: balanced, or a JSON file, a list of weights by class."),
    ] = "balanced"
    min_confidence: Annotated[
        float, typer.Option(help="With --shards: leave out images below this probability.")
    ] = 0.0
    logits: Annotated[
        bool, typer.Option("--logits/--no-logits", help="With --shards: soft labels, quality.")
    ] = True
    verify: Annotated[
        bool, typer.Option("--verify", help="With --shards: check those that are there.")
    ] = False

    def check(self, generators: int) -> None:
        """Raises ValueError for options that need --shards without it."""
        given = {f.name for f in fields(self) if getattr(self, f.name) != f.default}
        if given and not self.shards:
            raise ValueError(f"--{min(given).replace('_', '-')} needs --shards")
        if generators > 1 and not self.shards:
            raise ValueError("several --generator need --shards")

    def config(self, num_images: int, seed: int, num_classes: int) -> ShardConfig:
        """Raises ValueError for a value out of range, FileNotFoundError for a missing file."""
        return ShardConfig(
            num_images=num_images,
            shard_size=self.shard_size,
            image_format=self.format,
            seed=seed,
            class_weights=self._weights(num_classes),
            min_confidence=self.min_confidence,
        )

    def _weights(self, num_classes: int) -> tuple[float, ...]:
        if self.distribution == "balanced":
            return ()
        path = Path(self.distribution)
        if not path.is_file():
            raise FileNotFoundError(f"--distribution: 'balanced' or a file, got {path}")
        try:
            weights = tuple(float(weight) for weight in json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: not a list of numbers ({error})") from error
        if len(weights) != num_classes:
            raise ValueError(f"{path}: has {len(weights)} weights for {num_classes} classes")
        return weights


def parse_bits(text: str) -> Bits:
    """`W4A4`, `W4A4F8L8` with the first and the last layer at 8 bits, or a TOML file's `bits`."""
    if text.endswith(".toml"):
        values = read_toml(text)
        if "bits" not in values:
            raise ValueError(f"{text}: has no table bits")
        return from_dict(Bits(), values["bits"], f"{text}: bits")
    match = re.fullmatch(r"W(\d+)A(\d+)(?: ?F(\d+)L(\d+))?", text.strip(), re.IGNORECASE)
    if match is None or match[3] != match[4]:
        raise ValueError(f"bits must look like W4A4 or W4A4F8L8 (first = last), got {text!r}")
    return Bits(int(match[1]), int(match[2]), int(match[3]) if match[3] else None)


def use_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def check_compiled(option: str) -> None:
    """Raises ValueError where the compiled operators, whose time the option asks for, are not."""
    if backend_info()["isa"] is None:
        raise ValueError(f"{option}: expected the compiled operators, which are not loaded")


def fitting_generators(files: Sequence[Path], inputs: Inputs) -> list[Generator]:
    """Raises ValueError unless they are the teacher's: its classes, images that it reads."""
    generators = [Generator.load(file) for file in files]
    if not generators:
        return []
    shape = inputs.image_shape
    classes = sum(generator.num_classes for generator in generators)
    other = next((g.image_shape for g in generators if g.image_shape != shape), shape)
    if (classes, other) != (inputs.num_classes, shape):
        raise ValueError(
            f"{', '.join(map(str, files))}: makes {classes} classes of {other} images, "
            f"the teacher reads {inputs.num_classes} classes of {shape}"
        )
    own = fingerprint({}, inputs.teacher)
    for file, generator in zip(files, generators, strict=True):
        check_teacher(str(file), generator.teacher, own)
    return generators
