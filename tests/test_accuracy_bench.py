"""bench/accuracy.py: which rows it computes, which generators they share, what the table says."""

import csv
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import accuracy
from accuracy_methods import ABLATIONS, EVERY, METHODS
from accuracy_table import Measured, gap_closed, table
from result_rows import Result, append_result, read_results

import fdda_fast as fdda

NETWORK = "digits-resnet8"


@dataclass(frozen=True)
class Made:
    """A generator that knows what it was made from."""

    config: fdda.SynthesisConfig
    centers: int
    images: int


@pytest.fixture
def calls(monkeypatch):
    """Instead of training: generators made, and arguments of quantisations, refined images' too."""
    generators, students = [], []
    refined = []

    def train_generator(model, centers, config):
        made = Made(config, int((centers.count > 0).sum()), int(centers.count.sum()))
        generators.append(made)
        return made

    def refine(model, calibration, *, seed, flip):
        refined.append(("refined", seed, flip, len(calibration[0])))
        return refined[-1]

    def quantize(model, calibration, bits, config, *, generator=None, synthetic=None):
        students.append((len(calibration[0]), bits, config, generator or synthetic, config.method))
        return model

    monkeypatch.setattr(fdda, "train_generator", train_generator)
    monkeypatch.setattr(fdda, "refine", refine)
    monkeypatch.setattr(fdda, "quantize", quantize)
    monkeypatch.setattr(accuracy, "NETWORKS", (NETWORK, "fashion-mnist-resnet20"))
    return generators, students


def bench(path, *words):
    accuracy.main(["--networks", NETWORK, "--results", str(path), *words])


def test_images_are_shared_and_rows_kept(calls, tmp_path, capsys):
    generators, students = calls
    path = tmp_path / "rows.csv"
    few = ["--methods", "real", "fdda", "fdda+reconstruct", "zero-shot", "--bits", "W4A4", "W2A2"]
    bench(path, *few, "--seeds", "1")
    assert [made.config.seed for made in generators] == [1]
    assert [s[4] for s in students] == ["fdda"] * 4 + ["fdda+reconstruct"] * 2 + ["fdda"] * 2
    refined = ("refined", 1, False, 10)
    assert [s[3] for s in students] == [None] * 2 + [refined] * 4 + generators * 2
    assert all(s[3] is students[2][3] for s in students[2:6])  # FDDA's two methods share them
    before = path.read_bytes()
    bench(path, *few, "--seeds", "1")  # nothing is left to compute
    assert (path.read_bytes(), len(students)) == (before, 8)
    bench(path, *few, "--seeds", "1", "2")
    assert [s[2].seed for s in students[8:]] == [2] * 8
    with path.open(newline="") as file:
        rows = [(r["network"], r["method"], r["bits"], r["seed"]) for r in csv.DictReader(file)]
    assert len(rows) == len(set(rows)) == 17
    assert rows[0] == (NETWORK, "fp32", "FP32", "0")
    capsys.readouterr()
    bench(path, *few, "--seeds", "3", "--table")
    assert len(students) == 16
    assert "seeds [3]" in capsys.readouterr().out


def test_all_means_every_network_and_the_ablations(calls, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(accuracy, "run", lambda rows, path: asked.extend(rows))
    accuracy.main(["--all", "--results", str(tmp_path / "none.csv")])
    assert len(asked) == len(set(asked)) == 3 * 2 * len(EVERY) * 4
    assert {row.network for row in asked} == set(accuracy.NETWORKS)
    assert {row.method for row in asked} == set(METHODS) | set(ABLATIONS)
    asked.clear()
    accuracy.main(["--results", str(tmp_path / "none.csv")])
    assert {row.network for row in asked} == {NETWORK}
    assert {row.method for row in asked} == set(METHODS)


def test_what_each_method_is_given(calls, tmp_path):
    generators, students = calls
    bench(tmp_path / "rows.csv", "--ablations", "--bits", "W3A3", "--seeds", "1")
    images, _, configs, made, kinds = (
        dict(zip([*METHODS, *ABLATIONS], values, strict=True))
        for values in zip(*students, strict=True)
    )
    assert len(generators) == len(ABLATIONS) - 2 + 2
    given = {name for name, m in made.items() if isinstance(m, tuple)}
    assert given == {"fdda", "fdda-bfloat16", "fdda+reconstruct", "equalized", "fdda-4", "fdda-16"}
    assert all(made[name] == ("refined", 1, False, images[name]) for name in given)
    few = {name: count for name, count in images.items() if count != 10}
    assert few == {"reconstruct-1024": 1020, "fdda-4": 40, "fdda-16": 160}
    assert not any(config.flip for config in configs.values())  # digits
    untrained = {name: c.correct_batch_norms for name, c in configs.items() if c.steps == 0}
    assert untrained == {"minmax": False, "mse": False, "calibrated": True}
    assert configs["mse"].ranges == configs["mse"].weight_ranges == "mse"
    assert configs["real"].real_batch == 32
    assert kinds["reconstruct-1024"] == kinds["reconstruct"] == "reconstruct"
    both = {name for name, kind in kinds.items() if kind == "fdda+reconstruct"}
    assert both == {"real+reconstruct", "zero-shot+reconstruct", "fdda+reconstruct", "equalized"}
    assert {name for name, config in configs.items() if config.equalize} == {"equalized"}
    assert made["zero-shot+reconstruct"] is made["zero-shot"]
    assert configs["real+reconstruct"] == configs["real"].replace(method="fdda+reconstruct")
    weights = {
        name: (m.config.distorted_weight, m.config.centralized_weight)
        for name, m in made.items()
        if isinstance(m, Made)
    }
    assert all(configs[name].refine.images == 0 for name in weights)
    assert weights["fdda-generator"] == weights["centers-70"] == (1.0, 0.1)
    assert weights["zero-shot"] == (0, 0)
    assert weights["without-centralized"] == (1, 0)
    assert weights["without-distorted"] == (0, 0.1)
    assert weights["distorted-4.0"] == (4, 0.1)
    assert weights["centralized-0.01"] == (1, 0.01)
    assert (made["centers-70"].centers, made["fdda-generator"].centers) == (7, 10)
    assert made["centers-70"].images == 7
    assert configs["fdda-bfloat16"].dtype == "bfloat16"


@pytest.mark.parametrize(("classes", "each"), [(10, 102), (128, 8), (5000, 1)])
def test_the_same_number_of_each_class(classes, each):
    assert METHODS["reconstruct-1024"].images_per_class(classes) == each
    assert METHODS["fdda"].images_per_class(classes) == 1


def known(**methods):
    """Results of W4A4 from lists of percentages by seed."""
    names = {"alone": "reconstruct", "ours": "fdda+reconstruct", "bound": "reconstruct-1024"}
    results = {("n", "fp32", "FP32", 0): Measured(0.95, 0.0, 0.0)}
    for name, values in methods.items():
        for seed, value in enumerate(values, 1):
            results["n", names[name], "W4A4", seed] = Measured(value / 100, 0.1 * seed, 10.0 * seed)
    return results


def test_gap_closed():
    results = known(alone=[90, 92], ours=[93, 93], bound=[94, 94, 50])
    assert gap_closed(results, "n", "W4A4", [1, 2, 3]) == pytest.approx(2 / 3)  # seeds 1 and 2
    assert gap_closed(results, "n", "W4A4", [1]) == pytest.approx(3 / 4)
    assert gap_closed(results, "n", "W2A2", [1, 2]) is None
    assert gap_closed(known(alone=[94], ours=[95], bound=[94]), "n", "W4A4", [1]) is None


def test_table():
    results = known(alone=[94.6, 94.8], ours=[94.71], bound=[94.2, 94.9])
    made = table(results, "n", ["reconstruct", "fdda+reconstruct", "fdda"], ["W4A4"], [1, 2])
    text = io.StringIO()
    Console(width=150, file=text).print(made)
    lines = text.getvalue().splitlines()
    assert "FP32 95.00 %" in lines[0]
    cells = {c[0].strip(): c for c in (line.split("│")[1:-1] for line in lines) if c}
    of = {title: [c.strip() for c in row[1:]] for title, row in cells.items()}
    assert of[EVERY["reconstruct"].title] == ["94.70 ± 0.14 (-0.30) ✓", "0.150", "15"]
    assert of[EVERY["fdda+reconstruct"].title] == ["94.71* (-0.29) ✓", "0.100", "10"]
    assert of[EVERY["fdda"].title] == ["", "", ""]


def test_rows_of_other_columns_are_refused(tmp_path):
    append_result(tmp_path / "old.csv", (1, "fdda", "W4A4"), Result(0.5, 1.0))
    assert read_results(tmp_path / "old.csv") == {(1, "fdda", "W4A4"): (0.5, 1.0)}
    with pytest.raises(ValueError, match=r"old\.csv: expected the columns \['network'"):
        read_results(tmp_path / "old.csv", accuracy.Row._fields)
