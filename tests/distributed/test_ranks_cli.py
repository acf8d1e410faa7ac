"""Commands by one process and by torchrun."""

import csv
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from fdda_fast.cli import app
from fdda_fast.generator import Generator
from fdda_fast.models import load_teacher
from fdda_fast.runs import load_quantized
from fdda_fast.statistics import BNSCenters

DIGITS = ["--model", "digits-resnet8", "--data", "digits"]
# A teacher that ends the process of rank 1 by SIGKILL in its second step, the first time.
DEADLY = """
import os
import signal

import torch.distributed as dist

from fdda_fast.models import load_teacher


def make():
    calls, plain = [], dist.all_reduce
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) != ("1", "0"):
        return load_teacher("digits-resnet8")

    def all_reduce(*args, **kwargs):
        calls.append(None)
        if len(calls) == 12:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **kwargs)

    dist.all_reduce = all_reduce
    return load_teacher("digits-resnet8")
"""


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


def torchrun(processes, *arguments, restarts=0, cwd=None):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", processes, "--max-restarts", restarts,
               "-m", "fdda_fast", *arguments]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [str(part) for part in command],
        env=environment,
        cwd=cwd,
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


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The same by two."""
    out = tmp_path_factory.mktemp("cli") / "two"
    torchrun(2, "train-generator", *DIGITS, "--steps", 2, "--out", out)
    return out


def test_a_generator_by_two_ranks(one, two):
    expected, found = (losses(folder / "metrics.csv") for folder in (one, two))
    assert len(found) == 2
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}


def test_centers_of_all_images_by_two_ranks(tmp_path):
    options = ["centers", *DIGITS, "--all", "--out"]
    alone, shared = (tmp_path / name / "centers.safetensors" for name in ("alone", "shared"))
    told = run(*options, alone.parent).stdout
    assert "1257 images, " in told
    assert told.rstrip().endswith(str(alone))
    assert torchrun(2, *options, shared.parent).stdout.count("1257 images") == 1
    assert shared.read_bytes() == alone.read_bytes()
    assert int(BNSCenters.load(alone).count.sum()) == 1257
    options = ["train-generator", *DIGITS, "--centers", alone, "--steps", 1, "--out"]
    run(*options, tmp_path / "generator")
    assert not (tmp_path / "generator" / "calibration.csv").exists()


def shards_of(out):
    return {p.name: p.read_bytes() for p in (out / "shards").iterdir() if p.name != ".claims"}


def test_synthesize_to_shards_by_two_ranks(one, two, tmp_path):
    """They train one generator together, and share the images of it."""
    options = ["--num-images", 150, "--shards", "--shard-size", 64, "--out"]
    torchrun(2, "synthesize", *DIGITS, "--steps", 2, *options, tmp_path / "shared")
    made = tmp_path / "shared" / "generator.safetensors"
    assert len(losses(tmp_path / "shared" / "metrics.csv")) == 2
    assert made.read_bytes() == (two / made.name).read_bytes()
    assert made.read_bytes() != (one / made.name).read_bytes()  # rounding tells them apart
    run("synthesize", *DIGITS, "--generator", made, *options, tmp_path / "alone")
    assert shards_of(tmp_path / "alone") == shards_of(tmp_path / "shared")


def test_more_ranks_than_a_batch_has_images(tmp_path):
    """One of them trains, as one process does."""
    (tmp_path / "one.toml").write_text("[synthesis]\nbatch_size = 1\n")
    options = ["synthesize", *DIGITS, "--config", tmp_path / "one.toml", "--steps", 2,
               "--num-images", 150, "--shards", "--shard-size", 64, "--out"]  # fmt: skip
    run(*options, tmp_path / "alone")
    torchrun(2, *options, tmp_path / "shared")
    assert shards_of(tmp_path / "alone") == shards_of(tmp_path / "shared")


def test_processes_started_by_hand_train_one_generator(tmp_path):
    options = ["synthesize", *DIGITS, "--steps", 2, "--num-images", 150, "--shards", "--shard-size",
               64, "--out", tmp_path / "run"]  # fmt: skip
    command = [sys.executable, "-m", "fdda_fast", *map(str, options)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        told = process.communicate()[1]
        assert process.returncode == 0, told
    assert len(losses(tmp_path / "run" / "metrics.csv")) == 2
    assert len(shards_of(tmp_path / "run")) == 3 * 2 + 2


def test_a_rank_killed_and_started_again(two, tmp_path):
    (tmp_path / "deadly.py").write_text(DEADLY)
    save_file(load_teacher("digits-resnet8").state_dict(), tmp_path / "weights.safetensors")
    teacher = ["--model", "deadly:make", "--weights", "weights.safetensors", "--data", "digits"]
    options = ["--steps", 2, "--out", "again", "--resume"]
    told = torchrun(2, "train-generator", *teacher, *options, restarts=1, cwd=tmp_path).stderr
    assert "exitcode: -9" in told
    files = (folder / "generator.safetensors" for folder in (two, tmp_path / "again"))
    assert len({file.read_bytes() for file in files}) == 1


def test_quantize_by_two_ranks(one, tmp_path):
    (tmp_path / "short.toml").write_text('method = "fdda"\n[refine]\nimages = 0\n')
    options = ["quantize", *DIGITS, "--bits", "W4A4", "--steps", 2,
               "--config", tmp_path / "short.toml",
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
