"""Commands on a quantised network: pack, evaluate, run; and info and demo."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.table import Table
from torchvision.datasets.folder import IMG_EXTENSIONS

from .. import demo as demo_stage
from .. import evaluation, gpu_report
from ..data import ImageSource, Preprocessing, open_source
from ..data.calibration import from_record
from ..data.preprocessing import read_image
from ..deploy import PackedModel, load_packed, pack
from ..deploy.fidelity import Fidelity, layer_fidelity
from ..files import written_whole
from ..ops import backend_info
from ..ops._library import peak_macs_per_second
from ..quantization.equalization import equalized
from ..runs import environment, load_quantized, load_recorded_teacher, read_config
from .app import app, print_table
from .options import Threads, check_compiled, parse_bits, use_threads

_BATCH = 32
_LAYER_IMAGES = 256

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
    use_threads(threads)
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
    print_table(f"{out}: {out.stat().st_size:,} bytes", _summary(packed))


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


@app.command()
def evaluate(
    target: Annotated[Path, typer.Argument(help="A `quantize` run folder or a .fdda file.")],
    packed: Annotated[
        Path | None, typer.Option(help="Packed model; default that in the run folder, if any.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Data set, test split; default that of the run.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Test images to use, evenly spread.")] = None,
    per_class: Annotated[
        Path | None, typer.Option(help="CSV file to write: accuracy of every class.")
    ] = None,
    per_layer: Annotated[
        Path | None,
        typer.Option(
            help="CSV file to write, and table: noise ratio and cosine of every layer's output "
            f"against FP32, of a run folder, on {_LAYER_IMAGES} of the images.",
        ),
    ] = None,
    threads: Threads = None,
) -> None:
    """Top-1 and top-5 accuracy on the test split, and agreement with the FP32 teacher."""
    use_threads(threads)
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
            model = networks["packed"] = load_packed(packed)
            if model.preprocessing not in (None, preprocessing):
                raise ValueError(
                    f"{packed}: reads images as {model.preprocessing}, {target} as {preprocessing}"
                )
    else:
        if packed is not None or data is None:
            raise ValueError("with a packed file, name the data set (--data) and nothing else")
        if per_layer is not None:
            raise ValueError("--per-layer needs a run folder: it compares with the FP32 teacher")
        model = networks["packed"] = load_packed(target)
        preprocessing, names = model.preprocessing, model.class_names
    source = _source(data, "test", preprocessing, names)
    scores = evaluation.evaluate(networks, source, limit)
    total = next(iter(scores.values())).top1.total
    others = [name for name in networks if name != "packed"]
    table = Table()
    table.add_column("network")
    for column in ("top-1 %", "95 % interval", "top-5 %", *(f"agrees with {n} %" for n in others)):
        table.add_column(column, justify="right")
    for name, score in scores.items():
        low, high = score.top1.interval()
        shares = [score.top5, *(score.agreement[other] for other in others)]
        table.add_row(
            name,
            f"{100 * score.top1.value:.2f}",
            f"{100 * low:.2f} .. {100 * high:.2f}",
            *(f"{100 * share.value:.2f}" for share in shares),
        )
    print_table(f"{source.name}, {total} test images", table)
    if per_class is not None:
        _write_per_class(per_class, scores, source.class_names)
        print(per_class)
    if per_layer is not None:
        rows = evaluation.rows(source, min(limit or _LAYER_IMAGES, _LAYER_IMAGES))
        exact = networks["FP32"]
        if config["quantize"]["equalize"]:  # the student's channels are those of a scaled one
            drawn_from = _source(config["data"]["source"], "train", preprocessing, names)
            exact = equalized(exact, from_record(drawn_from, target / "calibration.csv").images)
        found = layer_fidelity(
            exact,
            networks["fake-quantised"],
            source.images(rows),
            networks.get("packed"),
        )
        print_table(f"layers' outputs against FP32, {len(rows)} images", _layers(found))
        _write_per_layer(per_layer, found)
        print(per_layer)


def _write_per_class(
    path: Path, scores: Mapping[str, evaluation.Scores], class_names: Sequence[str]
) -> None:
    """A row per network and class: top-1 and the 95 % interval, 0..1; empty without images."""
    rows = []
    for name, score in scores.items():
        for label, share in zip(class_names, score.per_class, strict=True):
            figures = (share.value, *share.interval()) if share.total else ()
            cells = [f"{figure:.4f}" for figure in figures] or [""] * 3
            rows.append([name, label, share.total, *cells])
    _write_csv(path, ["network", "class", "images", "top1", "low", "high"], rows)


def _layers(found: Mapping[str, Mapping[str, Fidelity]]) -> Table:
    """A row per layer, of all networks beside each other."""
    table = Table()
    table.add_column("layer")
    for network in next(iter(found.values())):
        table.add_column(f"{network}: SQNR dB", justify="right")
        table.add_column("cosine", justify="right")
    for layer, networks in found.items():
        cells = ((f"{f.sqnr:.2f}", f"{f.cosine:.5f}") for f in networks.values())
        table.add_row(escape(layer), *(cell for pair in cells for cell in pair))
    return table


def _write_per_layer(path: Path, found: Mapping[str, Mapping[str, Fidelity]]) -> None:
    rows = [
        [network, layer, f"{fidelity.sqnr:.4f}", f"{fidelity.cosine:.6f}"]
        for layer, networks in found.items()
        for network, fidelity in networks.items()
    ]
    _write_csv(path, ["network", "layer", "sqnr_db", "cosine"], rows)


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        written_whole(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def _source(
    data: str, split: str, preprocessing: Preprocessing | None, class_names: Sequence[str] | None
) -> ImageSource:
    """A split, prepared as the network wants it."""
    if preprocessing is None:
        raise ValueError("the packed model does not say how images are to be prepared")
    source = open_source(
        data,
        split,
        image_size=preprocessing.image_size,
        resize=preprocessing.resize,
        mean=preprocessing.mean,
        std=preprocessing.std,
    )
    if class_names is not None and tuple(class_names) != source.class_names:
        raise ValueError(f"{data} does not have the classes that the network was made for")
    return source


@app.command()
def run(
    model: Annotated[Path, typer.Argument(help="Packed model, .fdda.")],
    paths: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    top: Annotated[int, typer.Option(min=1, help="Classes to show per image.")] = 1,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show what each node takes, on the first images.")
    ] = False,
    threads: Threads = None,
) -> None:
    """Classify images: path, then class and probability, separated by tabs."""
    use_threads(threads)
    if profile:
        check_compiled("--profile")
    packed = load_packed(model)
    if packed.preprocessing is None:
        raise ValueError(f"{model}: does not say how images are to be prepared")
    files = [file for path in paths for file in _image_files(path)]
    for start in range(0, len(files), _BATCH):
        batch = files[start : start + _BATCH]
        images = torch.stack([read_image(file, packed.preprocessing) for file in batch])
        logits, names = packed(images), packed.class_names
        if logits.ndim != 2 or (names and len(names) != logits.shape[1]):
            known = f"{len(names)} class names" if names else "classes"
            raise ValueError(f"{model}: expected logits of {known}, got {list(logits.shape)}")
        probabilities = logits.softmax(1)
        best = probabilities.topk(min(top, probabilities.shape[1]))
        for file, values, classes in zip(batch, best.values, best.indices, strict=True):
            cells = [str(file)]
            for value, label in zip(values.tolist(), classes.tolist(), strict=True):
                cells += [names[label] if names else str(label), f"{value:.4f}"]
            print("\t".join(cells))
        if profile and start == 0:
            first = images
    if profile:
        _print_profile(packed, first)


def _print_profile(packed: PackedModel, images: torch.Tensor) -> None:
    """Median time of every node; MACs per second against the processor's own dot products."""
    steps = packed.profile(images)
    peak = peak_macs_per_second()
    table = Table()
    for name in ("node", "kernel"):
        table.add_column(name)
    for name in ("ms", "time %", "GMAC/s", "peak %", "KiB"):
        table.add_column(name, justify="right")
    total = sum(step.seconds for step in steps)

    def add(name: str, kernel: str, seconds: float, macs: int, size: int) -> None:
        rate = macs / seconds
        speed = (
            f"{rate / 1e9:.1f}" if macs else "",
            f"{100 * rate / peak:.0f}" if macs and peak else "",
        )
        share = f"{100 * seconds / total:.1f}"
        table.add_row(name, kernel, f"{1e3 * seconds:.3f}", share, *speed, f"{size / 1024:.0f}")

    for step in steps:
        add(escape(step.node.name), step.kernel, step.seconds, step.macs, step.bytes)
    table.add_section()
    add("all", "", total, sum(s.macs for s in steps), sum(s.bytes for s in steps))
    shape = "x".join(map(str, images.shape))
    print_table(
        f"images {shape}, {torch.get_num_threads()} threads; peak {peak / 1e9:.0f} GMAC/s, 8 bits, "
        f"{backend_info()['isa']}",
        table,
    )


def _image_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder")
    files = [p for p in path.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and p.is_file()]
    if not files:
        raise ValueError(f"{path}: no image files in it")
    return sorted(files)


@app.command()
def info(
    report: Annotated[
        bool,
        typer.Option(
            "--gpu-report",
            help="What compilers made of the GPU kernels, and predicted times; needs no GPU.",
        ),
    ] = False,
) -> None:
    """Versions, instruction sets and threads in use."""
    for name, value in {**environment(), **backend_info()}.items():
        print(f"{name}: {', '.join(value) if isinstance(value, list) else value}")
    if report:
        print_gpu_report()


def print_gpu_report() -> None:
    """The tables of `gpu_report`, each as soon as it is made."""
    for title, table in gpu_report.report():
        if table is None:
            print(title)
        else:
            print_table(title, table)


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
    use_threads(threads)
    if dataset not in demo_stage.RECIPES:
        raise ValueError(f"--dataset must be one of {list(demo_stage.RECIPES)}, got {dataset!r}")
    out = out or Path(f"fdda-demo-{dataset}")
    result = demo_stage.run_demo(demo_stage.RECIPES[dataset], out, parse_bits(bits))
    print_table(f"{result.recipe.model}, {result.images} test images", demo_stage.table(result))
    for line in demo_stage.remarks(result):
        print(line)
