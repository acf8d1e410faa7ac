"""Run folders: what a command was asked to do, how far it got and what came out.

A folder holds:

    config.toml             every setting; on resume they must be the same
    environment.toml        versions, instruction set, threads
    metrics.csv             one row per training step (metrics-I.csv: of generator I of several)
    checkpoint.safetensors  until the result of training is written (likewise)
    calibration.csv         which real images were drawn
    ...                     results; the one in RESULTS is written last and marks the end
"""

from __future__ import annotations

import csv
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torchvision
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text
from torch import fx, nn

from .checkpoint import load_tensors, save_tensors
from .config import QuantizeConfig, from_dict, read_toml, to_dict, write_toml
from .data.preprocessing import Preprocessing
from .files import digest, written_whole
from .models import load_teacher
from .ops import backend_info
from .quantization.bits import Bits
from .quantization.prepare import prepare
from .training import Metrics, Progress

RESULTS = {
    "centers": "centers.safetensors",
    "synthesize": "gallery.png",
    "train-generator": "generators.json",
    "allocate": "bits.toml",
    "quantize": "quantized.safetensors",
    "demo": "results.csv",
}
# What the readers of a run rely on.
_REQUIRED = {
    "quantize": ("teacher.model", "data.source", "preprocessing", "bits.weight", "quantize.steps")
}
_FORMAT = "fdda-fast run 1"
_STUDENT_FORMAT = "fdda-fast quantized 1"
_LINE_SECONDS = 10.0


class RunFolder:
    """The folder of one run. Nothing is written before `begin`.

    Args:
        path: the folder.
        command: a key of RESULTS.
        settings: everything that decides the results.
        records: files that `begin` writes besides, by name, and what writes them to a path.
        resume: go on with what the folder holds.
        overwrite: replace the results of the same command.

    Raises:
        ValueError: the folder holds something else, or a run that must not be touched.
        NotADirectoryError: it is a file.
    """

    def __init__(
        self,
        path: Path,
        command: str,
        settings: Mapping[str, Any],
        records: Mapping[str, Callable[[Path], None]] | None = None,
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.path = path
        given = {name: value for name, value in settings.items() if value is not None}
        self.settings = to_dict({"format": _FORMAT, "command": command, **given})
        self.result = path / RESULTS[command]
        self.checkpoint = path / "checkpoint.safetensors"
        self._records = records or {}
        self._resume = resume
        self._begun = False
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"{path}: is a file, not a run folder")
        # Hidden: what processes that share the folder write beside it.
        if path.is_dir() and any(not p.name.startswith(".") for p in path.iterdir()):
            self._check_existing(command, resume, overwrite)

    @property
    def finished(self) -> bool:
        return self.result.is_file()

    def _check_existing(self, command: str, resume: bool, overwrite: bool) -> None:
        found = read_config(self.path)
        if found["command"] != command:
            raise ValueError(f"{self.path}: holds a {found['command']!r} run, choose another --out")
        if overwrite:
            return
        if not resume and self.finished:
            raise ValueError(f"{self.path}: holds a finished run, choose another --out")
        if not resume:
            raise ValueError(
                f"{self.path}: holds an unfinished run; --resume goes on with it, or choose "
                "another --out"
            )
        differing = _differences(found, self.settings)
        if differing:
            raise ValueError(f"{self.path}: was started with other settings: {differing}")

    def begin(self) -> None:
        """Creates the folder and its records, unless this was done already."""
        if self._begun:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        # First, since it makes this a run folder for processes that start a moment later.
        write_toml(self.path / "config.toml", self.settings)
        environment_file = self.path / "environment.toml"
        if self._resume and environment_file.is_file():
            changes = _differences(read_toml(environment_file), environment())
            if changes:
                print(f"warning: last bits may differ, {changes}", file=sys.stderr)
        else:
            write_toml(environment_file, environment())
        for name, write in self._records.items():
            write(self.path / name)
        self._begun = True

    @contextmanager
    def following(
        self, title: str, metrics: str = "metrics.csv", *, shown: bool = True
    ) -> Iterator[Progress]:
        """A progress callback that appends to the file `metrics` and shows a bar."""
        metrics_file = MetricsFile(self.path / metrics)
        with display(title) if shown else nullcontext(lambda *_: None) as show:

            def progress(done: int, total: int, metrics: Metrics) -> None:
                self.begin()
                metrics_file.append(done, metrics)
                show(done, total, metrics)

            try:
                yield progress
            finally:
                metrics_file.close()


class MetricsFile:
    """A CSV file with a row per step, whose rows an interruption never doubles or mangles.

    The first row appended drops those of the same and later steps, left by a run that got further
    than its last checkpoint. A name that was not seen before becomes a new column.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = None
        self._columns: list[str] = ["step"]

    def append(self, step: int, metrics: Metrics) -> None:
        if self._file is None or not metrics.keys() <= set(self._columns):
            self._rewrite(step, metrics)
        values = [format(metrics[c], ".6g") if c in metrics else "" for c in self._columns[1:]]
        self._writer.writerow([step, *values])

    def _rewrite(self, before: int, metrics: Metrics) -> None:
        """Keeps the rows of steps below `before`, with columns for all of `metrics`."""
        self.close()
        rows: list[list[str]] = []
        if self._path.is_file():
            with self._path.open(newline="", encoding="utf-8") as file:
                header, *rows = list(csv.reader(file)) or [["step"]]
            rows = [r for r in rows if len(r) == len(header) and 0 < int(r[0]) < before]
            self._columns = header
        self._columns = [*self._columns, *(n for n in metrics if n not in self._columns)]
        padded = [row + [""] * (len(self._columns) - len(row)) for row in rows]
        with (
            written_whole(self._path) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            csv.writer(file, lineterminator="\n").writerows([self._columns, *padded])
        # Line by line, so that whoever kills the process leaves whole rows behind.
        self._file = self._path.open("a", newline="", encoding="utf-8", buffering=1)
        self._writer = csv.writer(self._file, lineterminator="\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


@contextmanager
def display(title: str) -> Iterator[Progress]:
    """A progress callback for people, on stderr: a bar on a terminal, else a line now and then."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(title)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        # Metrics get the width that is left, and are cut first where there is none.
        TextColumn(
            "{task.fields[metrics]}", markup=False, table_column=Column(ratio=1, no_wrap=True)
        ),
    )
    with RichProgress(*columns, console=console, expand=True) as bar:

        def show(done: int, total: int, metrics: Metrics) -> None:
            if not bar.tasks:  # a resumed run must not take earlier steps for speed
                bar.add_task(title, total=total, completed=done - 1, metrics="")
            bar.update(bar.task_ids[0], completed=done, metrics=_text(metrics))

        yield show


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f}/s" if speed else "")


def _lines(title: str) -> Progress:
    start = last = time.monotonic()
    first = 0

    def show(done: int, total: int, metrics: Metrics) -> None:
        nonlocal last, first
        first = first or done
        now = time.monotonic()
        if done < total and now - last < _LINE_SECONDS:
            return
        last = now
        rate = (done - first + 1) / max(now - start, 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if done < total else ""
        print(f"{title} {done}/{total} ({rate:.1f}/s{left}) {_text(metrics)}", file=sys.stderr)

    return show


def _text(metrics: Metrics) -> str:
    return " ".join(f"{name}={value:.3g}" for name, value in metrics.items())


def environment() -> dict[str, Any]:
    """Versions, processor and threads, as far as results and speed depend on them."""
    from importlib.metadata import version

    info = backend_info()
    return {
        "fdda_fast": version("fdda-fast"),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "compiled_operators": info["extension"],
        "isa": info["isa"] or "none",
    }


def read_config(run_dir: str | Path, command: str | None = None) -> dict[str, Any]:
    """The settings of a run.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: not a run folder, or not one of `command`.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir}: no such run folder")
    if not (run_dir / "config.toml").is_file():
        raise ValueError(f"{run_dir}: not a run folder (it has no config.toml)")
    config = read_toml(run_dir / "config.toml")
    if config.get("format") != _FORMAT or config.get("command") not in RESULTS:
        raise ValueError(f"{run_dir}: not a run folder (config.toml is no {_FORMAT!r})")
    if command is not None and config["command"] != command:
        raise ValueError(f"{run_dir}: holds a {config['command']!r} run, not a {command!r} run")
    missing = [name for name in _REQUIRED.get(command, ()) if not _has(config, name)]
    if missing:
        raise ValueError(f"{run_dir}: damaged config.toml, without {missing}")
    return config


def _has(config: Any, dotted: str) -> bool:
    for name in dotted.split("."):
        if not isinstance(config, Mapping) or name not in config:
            return False
        config = config[name]
    return True


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> str:
    """Where two settings differ, in words; empty where they do not."""
    parts = []
    for name in sorted({*found, *wanted}):
        a, b = found.get(name), wanted.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            parts.append(_differences(a, b, f"{prefix}{name}."))
        elif a != b:
            was, now = ("not set" if v is None else repr(v) for v in (a, b))
            parts.append(f"{prefix}{name} was {was}, now {now}")
    return "; ".join(part for part in parts if part)


def teacher_record(model: str, weights: Path | None, num_classes: int | None) -> dict[str, Any]:
    """What `load_recorded_teacher` needs, whatever folder it is called from."""
    record: dict[str, Any] = {"model": model}
    if num_classes is not None:
        record["num_classes"] = num_classes
    if weights is not None:
        record |= {"weights": str(weights.resolve()), "weights_sha256": digest(weights)}
    return record


def file_record(path: Path) -> dict[str, str]:
    """Raises FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return {"file": str(path.resolve()), "sha256": digest(path)}


def load_recorded_teacher(record: Mapping[str, Any]) -> nn.Module:
    """Raises FileNotFoundError or ValueError where model or weights are not what they were."""
    weights = record.get("weights")
    teacher = load_teacher(record["model"], weights, record.get("num_classes"))
    if weights is not None and digest(weights) != record.get("weights_sha256"):
        raise ValueError(f"{weights}: the file has changed since the run")
    return teacher


def save_quantized(run: RunFolder, student: fx.GraphModule) -> None:
    # One entry only: safetensors shuffles metadata, and equal runs are to give equal files.
    save_tensors(run.result, student.state_dict(), {"format": _STUDENT_FORMAT})


def load_quantized(run_dir: str | Path, teacher: nn.Module | None = None) -> fx.GraphModule:
    """The fake-quantised student of a finished `quantize` run, in eval mode.

    Args:
        teacher: of that run, where it is loaded already.

    Raises:
        FileNotFoundError: no such folder, or the run is unfinished.
        ValueError: not such a run, or its files do not belong together.
    """
    run_dir = Path(run_dir)
    config = read_config(run_dir, "quantize")
    path = run_dir / RESULTS["quantize"]
    tensors, metadata = load_tensors(path)
    if metadata.get("format") != _STUDENT_FORMAT:
        raise ValueError(f"{path}: not a quantised network ({_STUDENT_FORMAT!r})")
    bits = from_dict(Bits(), config["bits"], "bits")
    settings = from_dict(QuantizeConfig(), config["quantize"], "quantize")
    teacher = teacher or load_recorded_teacher(config["teacher"])
    read = Preprocessing.from_dict(config["preprocessing"])
    student = prepare(
        teacher,
        bits,
        placement=settings.placement,
        keep_float=settings.keep_float,
        image_shape=(read.channels, read.image_size, read.image_size),
    )
    try:
        student.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path}: does not fit the network of config.toml: {error}") from error
    return student.eval()
