"""train-generator and quantize, by one process and by torchrun."""

import csv
import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from fdda_fast.cli import app
from fdda_fast.generator import Generator
from fdda_fast.runs import load_quantized

DIGITS = ["--model", "digits-resnet8", "--data", "digits"]


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


def torchrun(processes, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", processes, "-m", "fdda_fast", *arguments]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [str(part) for part in command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result


def losses(path):
    with path.open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the ranks have: sums of several threads end in other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A generator of all classes, by one process."""
    out = tmp_path_factory.mktemp("cli") / "one"
    run("train-generator", *DIGITS, "--steps", 2, "--out", out)
    return out


def test_a_generator(one):
    (entry,) = json.loads((one / "generators.json").read_text())
    assert (entry["file"], entry["first_class"], entry["classes"]) == (
        "generator.safetensors", 0, 10
    )  # fmt: skip
    assert Generator.load(one / entry["file"]).num_classes == 10
    assert (
        "finished already"
        in run("train-generator", *DIGITS, "--steps", 2, "--out", one, "--resume").output
    )


def test_several_generators_give_the_same_bytes_on_two_ranks(tmp_path):
    """Three for two ranks: each is trained by one, so there is nothing to round."""
    options = ["train-generator", *DIGITS, "--steps", 2, "--class-groups", 3, "--out"]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    run(*options, alone)
    torchrun(2, *options, shared)
    made = json.loads((alone / "generators.json").read_text())
    assert [(e["first_class"], e["classes"]) for e in made] == [(0, 3), (3, 3), (6, 4)]
    names = {p.name for p in alone.iterdir()}
    assert names == {p.name for p in shared.iterdir()}
    for name in names:
        assert (alone / name).read_bytes() == (shared / name).read_bytes(), name
    weights = [Generator.load(alone / e["file"]).fc.weight for e in made]
    assert not torch.equal(weights[0], weights[1])  # each has its own draws
    files = [part for e in made for part in ("--generator", alone / e["file"])]
    images = ["--num-images", 64, "--shard-size", 64, "--shards", "--no-logits"]
    run("synthesize", *DIGITS, *files, *images, "--out", tmp_path / "images")


def test_one_run_on_two_ranks(one, tmp_path):
    torchrun(2, "train-generator", *DIGITS, "--steps", 2, "--out", tmp_path / "two")
    expected, found = (losses(folder / "metrics.csv") for folder in (one, tmp_path / "two"))
    assert len(found) == 2
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    assert {p.name for p in one.iterdir()} == {p.name for p in (tmp_path / "two").iterdir()}
    options = ["quantize", *DIGITS, "--bits", "W4A4", "--steps", 2,
               "--generator", one / "generator.safetensors", "--out"]  # fmt: skip
    run(*options, tmp_path / "student")
    torchrun(2, *options, tmp_path / "students")
    expected, found = (losses(tmp_path / f / "metrics.csv") for f in ("student", "students"))
    assert len(found) == 2
    assert found[0] == pytest.approx(expected[0], rel=0.05)  # activations are rounded to 4 bits
    alone, shared = (load_quantized(tmp_path / f).state_dict() for f in ("student", "students"))
    for key, value in alone.items():
        torch.testing.assert_close(shared[key], value, rtol=0.05, atol=0.01)


def test_bad_groups(tmp_path):
    options = ["train-generator", *DIGITS, "--out", tmp_path / "bad"]
    result = run(*options, "--class-groups", 11, code=2)
    assert "--class-groups: expected at most 10 (classes), got 11" in result.output
    assert not (tmp_path / "bad").exists()
