"""The command line: one command per stage, each writing a run folder (see runs.py)."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn
from torchvision.datasets.folder import IMG_EXTENSIONS
from typer.core import TyperGroup

from . import demo as demo_stage
from . import evaluation
from .config import PRESETS, QuantizeConfig, from_dict, preset, read_toml
from .data import Calibration, ImageSource, Preprocessing, draw, open_source
from .data.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from .deploy import PackedModel, load_packed, pack
from .gallery import save_gallery
from .generator import Generator
from .models import SHIPPED
from .ops import backend_info
from .quantization.bits import Bits
from .quantization.finetune import quantize as quantize_stage
from .runs import (
    RunFolder,
    digest,
    display,
    environment,
    load_quantized,
    load_recorded_teacher,
    read_config,
    save_quantized,
    teacher_record,
)
from .statistics import collect_centers, frozen
from .synthesis import train_generator
from .writing import synthesize as write_images

# Everything that a user can get wrong ends in one of these; any other exception is a bug.
_USER_ERRORS = (ValueError, OSError)
_USAGE_ERROR = typer.BadParameter.__bases__[0]
_MAX_MESSAGE = 600
_BATCH = 32


class _Commands(TyperGroup):
    """Bad input is one line on stderr and exit code 2, an interruption exit code 130."""

    def main(self, *args: Any, **kwargs: Any) -> None:
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except _USAGE_ERROR as error:
            code = _complain(error.format_message())
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `| head` is no error; typer leaves quietly
            raise
        except _USER_ERRORS as error:
            raise typer.Exit(_complain(error)) from error
        except KeyboardInterrupt as error:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from error


def _complain(error: object) -> int:
    message = " ".join(str(error).split()) or type(error).__name__
    if len(message) > _MAX_MESSAGE:
        message = message[:_MAX_MESSAGE] + " ..."
    print(f"error: {message}", file=sys.stderr)
    return 2


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Low-bit quantisation of CNNs from a few real images, and integer inference.",
)


def main() -> None:
    app(prog_name="fdda-fast")


Model = Annotated[
    str,
    typer.Option(
        help=f"Teacher: {', '.join(sorted(SHIPPED))}, a torchvision name, or module:factory."
    ),
]
Weights = Annotated[
    Path | None, typer.Option(help="Teacher's weights: .safetensors or a PyTorch state dict.")
]
NumClasses = Annotated[
    int | None, typer.Option(min=1, help="Passed to the teacher's factory.", show_default=False)
]
Data = Annotated[
    str, typer.Option(help="digits, fashion-mnist, or a folder (class/image files, or IDX files).")
]
ImageSize = Annotated[int, typer.Option(help="For folders: side of the network's input.")]
Resize = Annotated[
    int | None,
    typer.Option(help="For folders: shorter side before the crop; default 8/7 of image size."),
]
Mean = Annotated[
    str, typer.Option(help="For folders: mean per channel; one value reads images as grey.")
]
Std = Annotated[str, typer.Option(help="For folders: standard deviation per channel.")]
PerClass = Annotated[int, typer.Option(help="Calibration images per class.")]
Seed = Annotated[
    int | None, typer.Option(min=0, help="Decides every draw; default as in the settings (0).")
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default PyTorch's choice.")]
Preset = Annotated[str, typer.Option(help=f"Settings to start from: {', '.join(PRESETS)}.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="TOML file with the settings of QuantizeConfig that differ from the preset's; "
        "table synthesis: the generator's, table bits: per-layer widths.",
    ),
]
Out = Annotated[Path, typer.Option(help="Run folder to write.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the unfinished run in --out, if there is one.")
]
Limit = Annotated[int | None, typer.Option(help="Test images to use, evenly spread.")]

_MEAN, _STD = (",".join(map(str, values)) for values in (IMAGENET_MEAN, IMAGENET_STD))


@dataclass(frozen=True)
class _Inputs:
    """The teacher, its data and the calibration draw, with their record for config.toml."""

    teacher: nn.Module
    source: ImageSource
    calibration: Calibration
    num_classes: int
    record: dict[str, Any]

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """One per logit; None where the data set has fewer classes than the network."""
        names = self.source.class_names
        return names if len(names) == self.num_classes else None


def _open_inputs(
    model: str,
    weights: Path | None,
    num_classes: int | None,
    data: str,
    image_size: int,
    resize: int | None,
    mean: str,
    std: str,
    per_class: int,
    seed: int,
) -> _Inputs:
    if weights is not None and not weights.is_file():
        raise FileNotFoundError(f"{weights}: no such weights file")
    teacher_table = teacher_record(model, weights, num_classes)
    teacher = load_recorded_teacher(teacher_table)
    source = open_source(
        data,
        "train",
        image_size=image_size,
        resize=resize,
        mean=_numbers("--mean", mean),
        std=_numbers("--std", std),
    )
    calibration = draw(source, per_class, seed)
    with frozen(teacher), torch.no_grad():
        try:
            logits = teacher(calibration.images[:1])
        except RuntimeError as error:
            shape = tuple(calibration.images.shape[1:])
            raise ValueError(f"{model} cannot take images of shape {shape}: {error}") from error
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        raise ValueError(f"{model} must return one tensor of logits [N, K]")
    if source.num_classes > logits.shape[1]:
        raise ValueError(
            f"{source.name} has {source.num_classes} classes, {model} only {logits.shape[1]}"
        )
    inputs = _Inputs(teacher, source, calibration, logits.shape[1], {})
    inputs.record.update(
        teacher=teacher_table,
        data={
            "source": str(Path(data).resolve()) if Path(data).is_dir() else data,
            "per_class": per_class,
            "seed": seed,
        },
        preprocessing=source.preprocessing.to_dict(),
        class_names=inputs.class_names,
    )
    return inputs


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option}: expected numbers with commas between, got {text!r}") from None


def _settings(
    name: str, file: Path | None, seed: int | None, bits: Bits | None = None
) -> tuple[QuantizeConfig, Bits]:
    """Preset, then the file, then the seed."""
    config, bits = preset(name), bits or Bits()
    if file is not None:
        values = read_toml(file)
        bits = from_dict(bits, values.pop("bits", {}), "bits")
        config = from_dict(config, values, str(file))
    if seed is not None:
        config = config.replace(seed=seed, synthesis=config.synthesis.replace(seed=seed))
    return config, bits


def parse_bits(text: str) -> Bits:
    """`W4A4`, or `W4A4F8L8` with the first and the last layer at 8 bits."""
    match = re.fullmatch(r"W(\d+)A(\d+)(?: ?F(\d+)L(\d+))?", text.strip(), re.IGNORECASE)
    if match is None or match[3] != match[4]:
        raise ValueError(f"bits must look like W4A4 or W4A4F8L8 (first = last), got {text!r}")
    return Bits(int(match[1]), int(match[2]), int(match[3]) if match[3] else None)


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


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


def _already_finished(run: RunFolder) -> bool:
    if run.finished:
        print(f"{run.path} is finished already")
    return run.finished


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for module:factory; an installed script does not look there
    if version:
        print(f"fdda-fast {environment()['fdda_fast']}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


@app.command()
def centers(
    model: Model,
    data: Data,
    out: Out,
    weights: Weights = None,
    num_classes: NumClasses = None,
    image_size: ImageSize = 224,
    resize: Resize = None,
    mean: Mean = _MEAN,
    std: Std = _STD,
    per_class: PerClass = 1,
    seed: Seed = None,
    threads: Threads = None,
    resume: Resume = False,
) -> None:
    """Draw calibration images and collect the BNS center of every class."""
    _use_threads(threads)
    inputs = _open_inputs(
        model, weights, num_classes, data, image_size, resize, mean, std, per_class, seed or 0
    )
    run = RunFolder(out, "centers", inputs.record, resume=resume)
    if _already_finished(run):
        return
    calibration = inputs.calibration
    result = collect_centers(
        inputs.teacher, calibration.images, calibration.labels, inputs.num_classes
    )
    run.begin()
    calibration.save_record(run.path / "calibration.csv")
    result.save(run.result)
    print(
        f"{len(calibration.labels)} images, {result.num_layers} BN layers; "
        f"{int(result.reliable.sum())} of {result.num_classes} classes have a reliable center"
    )
    print(run.result)


@app.command()
def synthesize(
    model: Model,
    data: Data,
    out: Out,
    num_images: Annotated[int, typer.Option(min=1, help="Synthetic images to write.")] = 1000,
    weights: Weights = None,
    num_classes: NumClasses = None,
    image_size: ImageSize = 224,
    resize: Resize = None,
    mean: Mean = _MEAN,
    std: Std = _STD,
    per_class: PerClass = 1,
    steps: Annotated[int | None, typer.Option(min=0, help="Training steps.")] = None,
    seed: Seed = None,
    threads: Threads = None,
    preset: Preset = "fast",
    config_file: ConfigFile = None,
    resume: Resume = False,
) -> None:
    """Train the generator and write a synthetic data set."""
    _use_threads(threads)
    settings, _ = _settings(preset, config_file, seed)
    config = settings.synthesis
    if steps is not None:
        config = config.replace(steps=steps)
    inputs = _open_inputs(
        model, weights, num_classes, data, image_size, resize, mean, std, per_class, config.seed
    )
    record = {**inputs.record, "num_images": num_images, "synthesis": config}
    run = RunFolder(out, "synthesize", record, resume=resume)
    if _already_finished(run):
        return
    calibration = inputs.calibration
    generator_file = run.path / "generator.safetensors"
    with _interruptible(run):
        if generator_file.is_file():
            generator = Generator.load(generator_file)
        else:
            collected = collect_centers(
                inputs.teacher, calibration.images, calibration.labels, inputs.num_classes
            )
            with run.following("generator") as progress:
                generator = train_generator(
                    inputs.teacher,
                    collected,
                    config,
                    checkpoint=run.checkpoint,
                    resume=resume,
                    progress=progress,
                )
            run.begin()
            calibration.save_record(run.path / "calibration.csv")
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
def quantize(
    model: Model,
    data: Data,
    out: Out,
    bits: Annotated[str, typer.Option(help="W4A4; W4A4F8L8: first and last layer 8 bits.")],
    generator: Annotated[
        Path | None, typer.Option(help="Finished generator; default: one is trained along the way.")
    ] = None,
    ptq: Annotated[
        bool, typer.Option("--ptq", help="Activation ranges only: no generator, no tuning.")
    ] = False,
    weights: Weights = None,
    num_classes: NumClasses = None,
    image_size: ImageSize = 224,
    resize: Resize = None,
    mean: Mean = _MEAN,
    std: Std = _STD,
    per_class: PerClass = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Fine-tuning steps.")] = None,
    warmup_steps: Annotated[
        int | None, typer.Option(min=0, help="Generator steps before fine-tuning.")
    ] = None,
    seed: Seed = None,
    threads: Threads = None,
    preset: Preset = "fast",
    config_file: ConfigFile = None,
    resume: Resume = False,
) -> None:
    """Quantise a network and fine-tune it on calibration and synthetic images."""
    _use_threads(threads)
    if ptq and (steps is not None or warmup_steps is not None or generator is not None):
        raise ValueError("--ptq takes no --steps, --warmup-steps or --generator")
    config, widths = _settings(preset, config_file, seed, parse_bits(bits))
    if ptq:
        config = config.replace(steps=0)
    if steps is not None:
        config = config.replace(steps=steps)
    if warmup_steps is not None:
        config = config.replace(warmup_steps=warmup_steps)
    inputs = _open_inputs(
        model, weights, num_classes, data, image_size, resize, mean, std, per_class, config.seed
    )
    config = config.replace(flip=config.flip and inputs.source.flip)
    record = {**inputs.record, "bits": widths, "quantize": config}
    loaded = None
    if generator is not None:
        loaded = _fitting_generator(generator, inputs)
        record["generator"] = {"file": str(generator.resolve()), "sha256": digest(generator)}
    run = RunFolder(out, "quantize", record, resume=resume)
    if _already_finished(run):
        return
    calibration = inputs.calibration
    with _interruptible(run), run.following("quantize") as progress:
        student = quantize_stage(
            inputs.teacher,
            (calibration.images, calibration.labels),
            widths,
            config,
            loaded,
            checkpoint=run.checkpoint,
            resume=resume,
            progress=progress,
        )
        run.begin()
        calibration.save_record(run.path / "calibration.csv")
        save_quantized(run, student)
    print(run.result)


def _fitting_generator(path: Path, inputs: _Inputs) -> Generator:
    generator = Generator.load(path)
    shape = tuple(inputs.calibration.images.shape[1:])
    if (generator.num_classes, generator.image_shape) != (inputs.num_classes, shape):
        raise ValueError(
            f"{path}: makes {generator.num_classes} classes of {generator.image_shape} images, "
            f"the teacher reads {inputs.num_classes} classes of {shape}"
        )
    return generator


RunDir = Annotated[Path, typer.Argument(help="Folder of a finished `quantize` run.")]


@app.command("pack")
def pack_command(
    run_dir: RunDir,
    out: Annotated[
        Path | None, typer.Option(help="File to write; default RUN_DIR/model.fdda.")
    ] = None,
    threads: Threads = None,
) -> None:
    """Lower a quantised network to integers and write it as one file."""
    _use_threads(threads)
    config = read_config(run_dir, "quantize")
    preprocessing = Preprocessing.from_dict(config["preprocessing"])
    size = preprocessing.image_size
    packed = pack(
        load_quantized(run_dir),
        torch.zeros(1, preprocessing.channels, size, size),
        preprocessing,
        config.get("class_names"),
    )
    out = out or run_dir / "model.fdda"
    if out.is_dir():
        raise IsADirectoryError(f"{out}: is a folder; --out names a file")
    packed.save(out)
    _print_table(f"{out}: {out.stat().st_size:,} bytes", _summary(packed))


def _summary(packed: PackedModel) -> Table:
    table = Table()
    for name in ("node", "op", "domain", "output"):
        table.add_column(name)
    for name in ("bits", "bytes", "MACs"):
        table.add_column(name, justify="right")
    for row in packed.summary():
        shape = "x".join(map(str, row.output_shape[1:]))
        width = "" if row.bits is None else str(row.bits)
        numbers = (f"{row.weight_bytes}", f"{row.macs:,}" if row.macs else "")
        table.add_row(escape(row.name), row.op, row.domain, shape, width, *numbers)
    return table


def _print_table(title: str, table: Table) -> None:
    # What is not a terminal has no width; the usual guess of 80 columns would fold rows.
    print(title)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


@app.command()
def evaluate(
    target: Annotated[Path, typer.Argument(help="A `quantize` run folder or a .fdda file.")],
    packed: Annotated[
        Path | None, typer.Option(help="Packed model; default that in the run folder, if any.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Data set, test split; default that of the run.")
    ] = None,
    limit: Limit = None,
    threads: Threads = None,
) -> None:
    """Top-1 accuracy on the test split, and agreement with the FP32 teacher."""
    _use_threads(threads)
    if not target.exists():
        raise FileNotFoundError(f"{target}: no such run folder or file")
    networks: dict[str, Any] = {}
    if target.is_dir():
        config = read_config(target, "quantize")
        preprocessing = Preprocessing.from_dict(config["preprocessing"])
        names = config.get("class_names")
        data = data or config["data"]["source"]
        teacher = load_recorded_teacher(config["teacher"])
        networks["FP32"] = teacher
        networks["fake-quantised"] = load_quantized(target, teacher)
        default = target / "model.fdda"
        packed = packed or (default if default.is_file() else None)
        if packed is not None:
            networks["packed"] = load_packed(packed)
    else:
        if packed is not None or data is None:
            raise ValueError("with a packed file, name the data set (--data) and nothing else")
        model = networks["packed"] = load_packed(target)
        preprocessing, names = model.preprocessing, model.class_names
    source = _test_source(data, preprocessing, names)
    predicted = {n: evaluation.predictions(f, source, limit) for n, f in networks.items()}
    labels = source.labels[evaluation.rows(source, limit)]
    table = Table()
    table.add_column("network")
    for column in ("top-1 %", *(f"agrees with {n} %" for n in networks if n != "packed")):
        table.add_column(column, justify="right")
    for name, values in predicted.items():
        others = [v for n, v in predicted.items() if n != "packed"]
        shares = [evaluation.share_equal(values, other) for other in (labels, *others)]
        table.add_row(name, *(f"{100 * share:.2f}" for share in shares))
    _print_table(f"{source.name}, {len(labels)} test images", table)


def _test_source(
    data: str, preprocessing: Preprocessing | None, class_names: Sequence[str] | None
) -> ImageSource:
    """The test split, prepared as the network wants it."""
    if preprocessing is None:
        raise ValueError("the packed model does not say how images are to be prepared")
    source = open_source(
        data,
        "test",
        image_size=preprocessing.image_size,
        resize=preprocessing.resize,
        mean=preprocessing.mean,
        std=preprocessing.std,
    )
    if source.preprocessing != preprocessing:
        raise ValueError(
            f"{data} makes inputs as {source.preprocessing}, the network wants {preprocessing}"
        )
    if class_names is not None and tuple(class_names) != source.class_names:
        raise ValueError(f"{data} does not have the classes that the network was made for")
    return source


@app.command()
def run(
    model: Annotated[Path, typer.Argument(help="Packed model, .fdda.")],
    paths: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    top: Annotated[int, typer.Option(min=1, help="Classes to show per image.")] = 1,
    threads: Threads = None,
) -> None:
    """Classify images: path, then class and probability, separated by tabs."""
    _use_threads(threads)
    packed = load_packed(model)
    if packed.preprocessing is None:
        raise ValueError(f"{model}: does not say how images are to be prepared")
    files = [file for path in paths for file in _image_files(path)]
    for start in range(0, len(files), _BATCH):
        batch = files[start : start + _BATCH]
        images = torch.stack([_read_image(file, packed.preprocessing) for file in batch])
        probabilities = packed(images).softmax(1)
        best = probabilities.topk(min(top, probabilities.shape[1]))
        for file, values, classes in zip(batch, best.values, best.indices, strict=True):
            cells = [str(file)]
            for value, label in zip(values.tolist(), classes.tolist(), strict=True):
                name = packed.class_names[label] if packed.class_names else str(label)
                cells += [name, f"{value:.4f}"]
            print("\t".join(cells))


def _image_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder")
    files = [p for p in path.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and p.is_file()]
    if not files:
        raise ValueError(f"{path}: no image files in it")
    return sorted(files)


def _read_image(path: Path, preprocessing: Preprocessing) -> torch.Tensor:
    try:
        with Image.open(path) as image:
            return preprocessing(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # PIL raises all three
        raise ValueError(f"{path}: not a readable image ({error})") from error


@app.command()
def info() -> None:
    """Versions, instruction sets and threads in use."""
    for name, value in {**environment(), **backend_info()}.items():
        print(f"{name}: {', '.join(value) if isinstance(value, list) else value}")


@app.command()
def demo(
    dataset: Annotated[
        str, typer.Option(help=f"One of {', '.join(demo_stage.RECIPES)}.")
    ] = "digits",
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; default fdda-demo-DATASET.")
    ] = None,
    bits: Annotated[str, typer.Option(help="W2A3, or W4A4F8L8 ...")] = demo_stage.BITS,
    threads: Threads = None,
) -> None:
    """From a shipped teacher to integers, with a table of what every stage costs and gains."""
    _use_threads(threads)
    if dataset not in demo_stage.RECIPES:
        raise ValueError(f"--dataset must be one of {list(demo_stage.RECIPES)}, got {dataset!r}")
    out = out or Path(f"fdda-demo-{dataset}")
    result = demo_stage.run_demo(demo_stage.RECIPES[dataset], out, parse_bits(bits))
    _print_table(f"{result.recipe.model}, {result.images} test images", demo_stage.table(result))
    for line in demo_stage.remarks(result):
        print(line)
