"""Every command on small cases, every kind of bad input, interruption and resuming."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fdda_fast.cli import app
from fdda_fast.cli.options import SettingsOptions, parse_bits
from fdda_fast.deploy import PackedModel, load_packed
from fdda_fast.deploy.graph import Node
from fdda_fast.deploy.integer import Reshape
from fdda_fast.generator import Generator
from fdda_fast.quantization.bits import Bits
from fdda_fast.runs import load_quantized
from fdda_fast.shards import ShardDataset
from fdda_fast.statistics import BNSCenters

FACTORY = """
import torch
from torch import nn


def make(num_classes=3):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AvgPool2d(4), nn.Flatten(), nn.Linear(8, num_classes),
    )


def images_only():
    return 3
"""
COLOURS = {"blue": (40, 40, 200), "green": (40, 200, 40), "red": (200, 40, 40)}
OWN = ["--model", "tiny_cli_model:make", "--weights", "tiny.safetensors", "--data", "tree",
       "--image-size", "16", "--resize", "16"]  # fmt: skip
DIGITS = ["--model", "digits-resnet8", "--data", "digits"]
SHORT = ["--config", "short.toml"]
TRAIN = ["--bits", "W4A4", "--steps", "3", *SHORT]


def run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def succeed(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def tree_of(folder):
    return {
        str(p.relative_to(folder)): p.stat().st_mtime_ns
        for p in folder.rglob("*")
        if "__pycache__" not in p.parts
    }


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with a user's own model, its weights, an image tree, and damaged files."""
    place = tmp_path_factory.mktemp("cli")
    (place / "tiny_cli_model.py").write_text(FACTORY)
    rng = torch.Generator().manual_seed(0)
    pixels, labels = [], []
    for label, (name, colour) in enumerate(COLOURS.items()):
        for index in range(8):
            noise = torch.randint(-30, 31, (16, 16, 3), generator=rng)
            array = (torch.tensor(colour) + noise).to(torch.uint8)
            folder = place / "tree" / ("train" if index < 4 else "test") / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array.numpy()).save(folder / f"{index}.png")
            pixels.append(array.permute(2, 0, 1) / 255 * 4 - 2)
            labels.append(label)
    save_file(trained(torch.stack(pixels), torch.tensor(labels)), place / "tiny.safetensors")

    whole = (place / "tiny.safetensors").read_bytes()
    (place / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (place / "flipped.pt").write_bytes(bytes(reversed(whole)))
    save_file({"other": torch.zeros(2)}, place / "other.safetensors")
    (place / "empty").mkdir()
    (place / "broken" / "a").mkdir(parents=True)
    (place / "broken" / "a" / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n rest is missing")
    (place / "occupied").mkdir()
    (place / "occupied" / "thesis.tex").write_text("mine")
    for name, text in {
        "bad": "steps = ", "unknown": "stepps = 3", "type": 'steps = "3"', "range": "lr = -1.0",
        "table": "synthesis = 3", "list": 'keep_float = ["no.such.layer"]', "float": "flip = 1",
        "bits": "[bits]\nweight = 11", "pair": "[bits.overrides]\nconv1 = 4", "dir": 'ranges = "x"',
        "blocks": 'method = "reconstruct"',
        "short": "[refine]\nimages = 4\nsteps = 2\n[reconstruct]\nimages = 32\nsteps = 2",
    }.items():  # fmt: skip
        (place / f"{name}.toml").write_text(text)
    return place


def trained(images, labels):
    """A few steps tell three colours apart."""
    scope = {}
    exec(FACTORY, scope)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = scope["make"]()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.state_dict()


@pytest.fixture(scope="session")
def results(place):
    """Runs that several tests read."""
    before = os.getcwd()
    os.chdir(place)
    try:
        succeed("synthesize", *OWN, "--steps", 2, "--num-images", 7, "--out", "synthetic")
        succeed("quantize", *OWN, *TRAIN, "--per-class", 2, "--out", "quantized")
        succeed("pack", "quantized")
    finally:
        os.chdir(before)
    packed = (place / "quantized" / "model.fdda").read_bytes()
    (place / "truncated.fdda").write_bytes(packed[:-100])
    (place / "flipped.fdda").write_bytes(packed[:-9] + bytes([packed[-9] ^ 1]) + packed[-8:])
    (place / "text.fdda").write_text("hello")
    return place


@pytest.fixture(autouse=True)
def inside(place, monkeypatch):
    monkeypatch.chdir(place)


def test_centers(tmp_path):
    out = tmp_path / "run"
    told = succeed("centers", *OWN, "--per-class", 2, "--out", out)
    assert "3 of 3 classes" in told
    assert {p.name for p in out.iterdir() if not p.name.startswith(".")} == {
        "calibration.csv", "centers.safetensors", "config.toml", "environment.toml"
    }  # fmt: skip
    assert BNSCenters.load(out / "centers.safetensors").count.tolist() == [2, 2, 2]
    again = succeed("centers", *OWN, "--per-class", 2, "--out", out)
    assert "finished already" in again
    assert "3 of 3 classes" in again


def test_centers_of_all_images(tmp_path):
    out = tmp_path / "run"
    assert "12 images" in succeed("centers", *OWN, "--all", "--out", out)
    assert len((out / "calibration.csv").read_text().splitlines()) == 1 + 12
    told = run("centers", *OWN, "--per-class", 2, "--out", out).stderr
    assert "was started with other settings: data.per_class was not set, now 2" in told


def test_synthesize_with_finished_centers(results, tmp_path):
    drawn, file = tmp_path / "drawn", tmp_path / "centers" / "centers.safetensors"
    succeed("centers", *OWN, "--out", file.parent)
    options = ["--steps", 2, "--num-images", 64, "--shards", "--shard-size", 64, "--out"]
    succeed("synthesize", *OWN, *options, drawn)
    succeed("synthesize", *OWN, "--centers", file, *options, tmp_path / "given")
    # The images are those that would be drawn.
    for name in ("generator.safetensors", "metrics.csv", "gallery.png"):
        assert (tmp_path / "given" / name).read_bytes() == (drawn / name).read_bytes()
    assert shards_of(tmp_path / "given") == shards_of(drawn)
    assert not (tmp_path / "given" / "calibration.csv").exists()
    told = run("synthesize", *OWN, *options, tmp_path / "given").stderr
    assert "centers was {" in told


def test_bad_centers(results, tmp_path):
    file = tmp_path / "centers" / "centers.safetensors"
    succeed("centers", *DIGITS, "--out", file.parent)
    for options, message in [
        (["--centers", file], "classes 0..9 of (1, 8, 8) images, 9 BN layers of 336 channels, the"),
        (["--centers", "nothing"], "no such file"),
        (["--centers", "tiny.safetensors"], "not a file of BNS centers"),
        (["--centers", file, "--per-class", 2], "--centers takes no --per-class, got 2"),
    ]:
        for command in ("synthesize", "train-generator"):
            assert message in refused(results, command, *OWN, *options, "--out", "new")
    told = refused(results, "centers", *OWN, "--all", "--per-class", 2, "--out", "new")
    assert "--all takes no --per-class, got 2" in told


def test_several_processes_need_shards(results, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = refused(results, "synthesize", *OWN, "--out", "new")
    assert "several processes need --shards" in told


def test_synthesize(results):
    out = results / "synthetic"
    assert len(list((out / "images").rglob("*.png"))) == 7
    with Image.open(out / "gallery.png") as image:
        assert image.height > 3 * 16
    assert len((out / "metrics.csv").read_text().splitlines()) == 3


def test_synthesize_goes_on_with_the_images(results):
    out = results / "synthetic"
    lost = out / "images" / "1" / "00000001.png"
    content = lost.read_bytes()
    lost.unlink()
    (out / "gallery.png").unlink()
    succeed("synthesize", *OWN, "--steps", 2, "--num-images", 7, "--out", out, "--resume")
    assert lost.read_bytes() == content


SHARDS = ["--steps", 2, "--num-images", 150, "--shards", "--shard-size", 64]


def shards_of(out):
    return {p.name: p.read_bytes() for p in (out / "shards").iterdir() if p.name != ".claims"}


@pytest.fixture(scope="session")
def sharded(results):
    before = os.getcwd()
    os.chdir(results)
    try:
        told = succeed("synthesize", *OWN, *SHARDS, "--out", "sharded")
    finally:
        os.chdir(before)
    assert "images: 150" in told
    assert "confidence: 0." in told
    return results / "sharded"


def test_synthesize_to_shards(sharded):
    data = ShardDataset(sharded / "shards")
    assert [sample["label"] for sample in data] == [i % 3 for i in range(150)]
    assert next(iter(data))["logits"].shape == (3,)
    assert (sharded / "gallery.png").is_file()
    whole = shards_of(sharded)
    command = ["synthesize", *OWN, *SHARDS, "--out", sharded]
    assert "images: 150" in succeed(*command)
    (sharded / "shards" / "shard-000001.tar").unlink()
    succeed(*command)
    assert shards_of(sharded) == whole


def test_verify(sharded, tmp_path):
    command = ["synthesize", *OWN, *SHARDS, "--verify", "--out"]
    assert "as it should be" in succeed(*command, sharded)
    assert "no finished set" in run(*command, tmp_path / "new").stderr
    copy = tmp_path / "copy"
    shutil.copytree(sharded, copy)
    shard = copy / "shards" / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    told = run(*command, copy)
    assert told.exit_code == 2
    assert "shard-000001.tar: its sum is another one" in told.stderr


def test_shards_of_several_generators(tmp_path):
    for seed, classes in enumerate((1, 2)):
        torch.manual_seed(seed)
        Generator(classes, (3, 16, 16)).save(tmp_path / f"{classes}.safetensors")
    (tmp_path / "weights.json").write_text("[0, 3, 1]")
    options = [
        "--num-images", 128, "--shards", "--generator", tmp_path / "1.safetensors",
        "--generator", tmp_path / "2.safetensors", "--distribution", tmp_path / "weights.json",
        "--format", "raw", "--no-logits",
    ]  # fmt: skip
    told = succeed("synthesize", *OWN, *options, "--out", tmp_path / "run")
    assert "confidence" not in told
    assert not (tmp_path / "run" / "generator.safetensors").exists()
    samples = list(ShardDataset(tmp_path / "run" / "shards"))
    counts = torch.tensor([s["label"] for s in samples]).bincount(minlength=3)
    assert counts[0] == 0
    assert abs(counts[1] - 96) <= 3
    assert "logits" not in samples[0]


def test_synthesize_refuses(results, tmp_path):
    (results / "weights.json").write_text("[1, 2]")
    generator = ["--generator", "synthetic/generator.safetensors"]
    for options, message in [
        (["--shard-size", 64], "--shard-size needs --shards"),
        (["--no-logits"], "--logits needs --shards"),
        (["--verify"], "--verify needs --shards"),
        (2 * generator, "several --generator need --shards"),
        ([*generator, "--steps", 7], "--generator takes no --steps"),
        (["--shards", "--shard-size", 65], "multiple of 64"),
        (["--shards", "--format", "jpg"], "image_format must be one of"),
        (["--shards", "--distribution", "even"], "'balanced' or a file"),
        (["--shards", "--distribution", "bad.toml"], "not a list of numbers"),
        (["--shards", "--distribution", "weights.json"], "has 2 weights for 3 classes"),
        (["--shards", *generator, *generator], "makes 6 classes"),
    ]:
        assert message in refused(results, "synthesize", *OWN, *options, "--out", "new")


def test_files_of_another_teacher(results, tmp_path):
    """Of the same shapes throughout."""
    weights = load_file(results / "tiny.safetensors")
    name = next(name for name in weights if name.endswith("running_mean"))
    weights[name] = weights[name] + 0.01
    save_file(weights, tmp_path / "moved.safetensors")
    other = [tmp_path / "moved.safetensors" if o == "tiny.safetensors" else o for o in OWN]
    succeed("centers", *OWN, "--out", tmp_path / "run")
    for command, option, file in (
        ("synthesize", "--centers", tmp_path / "run" / "centers.safetensors"),
        ("train-generator", "--centers", tmp_path / "run" / "centers.safetensors"),
        ("synthesize", "--generator", "synthetic/generator.safetensors"),
        ("quantize", "--generator", "synthetic/generator.safetensors"),
    ):
        bits = TRAIN if command == "quantize" else []
        told = refused(results, command, *other, *bits, option, file, "--out", "new")
        assert f"{file}: made with another teacher" in told


def test_quantize(results):
    out = results / "quantized"
    student = load_quantized(out)
    assert student(torch.zeros(2, 3, 16, 16)).shape == (2, 3)
    # A header, refinement, three units of reconstruction, fine-tuning.
    assert len((out / "metrics.csv").read_text().splitlines()) == 1 + 2 + 3 * 2 + 3
    assert len((out / "calibration.csv").read_text().splitlines()) == 1 + 6


def test_quantize_with_a_finished_generator(results, tmp_path):
    generator = results / "synthetic" / "generator.safetensors"
    options = ["--bits", "W3A3F8L8", *SHORT, "--steps", 2, "--generator", generator]
    succeed("quantize", *OWN, *options, "--out", tmp_path / "run")
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 + 3 * 2 + 2


def test_quantize_ranges_only(tmp_path):
    succeed("quantize", *DIGITS, "--bits", "W4A4", "--ptq", "--out", tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.csv").exists()
    load_quantized(tmp_path / "run")


@pytest.mark.parametrize(
    ("method", "rows"), [("reconstruct", 5 * 2), ("fdda+reconstruct", 2 * 2 + 5 * 2 + 3)]
)
def test_quantize_by_reconstruction(tmp_path, method, rows):
    file = tmp_path / "settings.toml"
    file.write_text(
        "steps = 3\n[refine]\nimages = 9\ngroup = 5\nsteps = 2\n"
        "[reconstruct]\nsteps = 2\nimages = 32\n"
    )
    options = ["--bits", "W4A4", "--method", method, "--config", file]
    succeed("quantize", *DIGITS, *options, "--out", tmp_path / "run")
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 1 + rows
    assert f'method = "{method}"' in (tmp_path / "run" / "config.toml").read_text()
    succeed("pack", tmp_path / "run", "--out", tmp_path / "m.fdda")
    images, packed = torch.randn(8, 1, 8, 8), load_packed(tmp_path / "m.fdda")
    torch.testing.assert_close(packed(images), load_quantized(tmp_path / "run")(images))


def test_settings_file(tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text("ranges = 'minmax'\n[bits.overrides]\nconv1 = [8, 8]\n[synthesis]\nlr = 0.01\n")
    options = ["--bits", "W4A4", "--ptq", "--config", file, "--seed", 5]
    succeed("quantize", *DIGITS, *options, "--out", tmp_path / "run")
    written = (tmp_path / "run" / "config.toml").read_text()
    assert "lr = 0.01" in written
    assert written.count("seed = 5") == 3
    assert load_quantized(tmp_path / "run").conv1.weight_bits == 8


def test_bits_of_options_and_of_the_settings_file(tmp_path):
    """Single layers' widths add up; an option wins over the file."""
    (tmp_path / "bits.toml").write_text(
        "[bits]\nactivation = 5\n[bits.overrides]\nconv1 = [2, 8]\nfc = [3, 4]\n"
    )
    (tmp_path / "settings.toml").write_text(
        "[bits]\nweight = 2\nfirst_last = 8\n[bits.overrides]\nconv1 = [8, 8]\n"
    )
    settings = SettingsOptions(config=tmp_path / "settings.toml")
    for bits, expected in [
        ("W3A4", Bits(3, 4, None, {"conv1": (8, 8)})),
        (str(tmp_path / "bits.toml"), Bits(4, 5, None, {"conv1": (8, 8), "fc": (3, 4)})),
    ]:
        assert settings.load(None, parse_bits(bits))[1] == expected


def test_pack(results, tmp_path):
    told = succeed("pack", results / "quantized", "--out", tmp_path / "deep" / "m.fdda")
    assert "PackedConv2d" in told
    assert f"{(tmp_path / 'deep' / 'm.fdda').stat().st_size:,} bytes" in told
    images = torch.randn(4, 3, 16, 16)
    packed = load_packed(tmp_path / "deep" / "m.fdda")
    assert packed.class_names == sorted(COLOURS)
    torch.testing.assert_close(packed(images), load_quantized(results / "quantized")(images))


def test_allocate_then_quantize_then_pack(tmp_path):
    """Within the budget to the end; another budget needs no new measurement."""
    command = ["allocate", *DIGITS, "--out", tmp_path / "widths", "--weight-bits", "2,8",
               "--input-bits", "4"]  # fmt: skip
    told = succeed(*command, "--size-bytes", 50_000)
    assert "fc" in told
    file = tmp_path / "widths" / "bits.toml"
    widths = parse_bits(str(file)).overrides
    assert {w for w, _ in widths.values()} == {2, 8}
    assert widths["conv1"][1] == 8
    assert {a for name, (_, a) in widths.items() if name != "conv1"} == {4}

    succeed("quantize", *DIGITS, "--bits", file, "--ptq", "--out", tmp_path / "run")
    succeed("pack", tmp_path / "run")
    packed = tmp_path / "run" / "model.fdda"
    assert 25_000 < packed.stat().st_size <= 50_000
    assert load_packed(packed).bits == widths

    measured = (tmp_path / "widths" / "losses.json").stat().st_mtime_ns
    succeed(*command, "--average-bits", 3, "--resume")
    assert (tmp_path / "widths" / "losses.json").stat().st_mtime_ns == measured
    assert parse_bits(str(file)).overrides != widths
    assert "finished run" in run(*command, "--average-bits", 3).stderr
    for budget, message in [
        (["--latency-ms", 0], "budget must be at least"),
        (["--bit-operations", 10], "budget must be at least"),
    ]:
        assert message in run(*command, *budget, "--resume").stderr


def test_allocate_on_images_of_a_generator(results, tmp_path):
    command = ["allocate", *OWN, "--average-bits", 4, "--out", tmp_path / "widths"]
    generator = results / "synthetic" / "generator.safetensors"
    more = ["--generator", generator, "--num-images", 5, "--keep-float", "8"]
    succeed(*command, "--weight-bits", "2,4", *more)
    assert list(parse_bits(str(tmp_path / "widths" / "bits.toml")).overrides) == ["0", "3"]
    config = (tmp_path / "widths" / "config.toml").read_text()
    assert "num_images = 5" in config
    assert "weight_bits = [\n    2,\n    4,\n]" in config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected one budget of --size-bytes, --average-bits"),
        (["--size-bytes", 9, "--latency-ms", 9], "got 2"),
        (["--size-bytes", "small"], "--size-bytes"),
        (["--size-bytes", 9, "--weight-bits", "2,9"], "--weight-bits: expected widths of 2 to 8"),
        (["--size-bytes", 9, "--input-bits", "x"], "--input-bits: expected widths of 2 to 8 bits"),
        (["--size-bytes", 9, "--generator", "nothing.safetensors"], "no such file"),
        (["--size-bytes", 9, "--keep-float", "9"], "keep_float names nothing in the model: ['9']"),
    ],
)
def test_bad_input_of_allocate(place, options, message):
    assert message in refused(place, "allocate", *OWN, "--out", "new", *options)


def test_evaluate_a_run(results):
    told = succeed("evaluate", results / "quantized")
    assert "tree, 12 test images" in told
    for name in ("FP32", "fake-quantised", "packed"):
        assert f"│ {name}" in told


def test_evaluate_writes_a_row_per_class(results, tmp_path):
    told = succeed("evaluate", results / "quantized", "--per-class", tmp_path / "new" / "c.csv")
    assert "95 % interval" in told
    header, *rows = (tmp_path / "new" / "c.csv").read_text().splitlines()
    assert header == "network,class,images,top1,low,high"
    assert [row.split(",")[1:3] for row in rows] == 3 * [[name, "4"] for name in sorted(COLOURS)]


def test_evaluate_writes_a_row_per_layer(results, tmp_path):
    told = succeed("evaluate", results / "quantized", "--per-layer", tmp_path / "new" / "l.csv")
    assert "layers' outputs against FP32, 12 images" in told
    header, *rows = (tmp_path / "new" / "l.csv").read_text().splitlines()
    assert header == "network,layer,sqnr_db,cosine"
    cells = [row.split(",") for row in rows]
    networks = ("fake-quantised", "packed")
    assert [row[:2] for row in cells] == [[n, layer] for layer in "038" for n in networks]
    assert all(float(sqnr) > 5 and float(cosine) > 0.8 for *_, sqnr, cosine in cells)


def test_layers_of_an_equalised_network_are_compared_in_its_own_scale(tmp_path):
    (tmp_path / "s.toml").write_text("equalize = true")
    options = ["--bits", "W8A8", "--ptq", "--config", tmp_path / "s.toml"]
    succeed("quantize", *DIGITS, *options, "--out", tmp_path / "run")
    succeed("evaluate", tmp_path / "run", "--limit", 20, "--per-layer", tmp_path / "l.csv")
    _, *rows = (tmp_path / "l.csv").read_text().splitlines()
    assert all(float(row.split(",")[2]) > 25 for row in rows)


def test_evaluate_a_packed_file(results):
    model = results / "quantized" / "model.fdda"
    assert "5 test images" in succeed("evaluate", model, "--data", "tree", "--limit", 5)


def test_evaluate_refuses_a_packed_file_that_reads_other_images(results, tmp_path):
    packed, file = load_packed(results / "quantized" / "model.fdda"), tmp_path / "other.fdda"
    other = dataclasses.replace(packed.preprocessing, mean=(0.1,) * 3)
    PackedModel(packed.graph, packed.tensors, other).save(file)
    told = refused(results, "evaluate", "quantized", "--packed", file)
    assert f"{file}: reads images as Preprocessing(" in told
    PackedModel(packed.graph, packed.tensors).save(file)  # which does not say how
    succeed("evaluate", "quantized", "--packed", file)


def test_run(results):
    model = results / "quantized" / "model.fdda"
    told = succeed("run", model, "tree/test/red", "tree/test/blue/5.png", "--top", 9)
    lines = [line.split("\t") for line in told.splitlines()]
    assert [line[0] for line in lines] == [
        *(f"tree/test/red/{i}.png" for i in (4, 5, 6, 7)), "tree/test/blue/5.png"
    ]  # fmt: skip
    for line in lines:
        assert set(line[1::2]) == set(COLOURS)
        assert sum(map(float, line[2::2])) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("shape", "names", "message"),
    [
        ((-1,), ["a", "b"], "expected logits of 2 class names, got [1, 3]"),
        ((3, 1), None, "expected logits of classes, got [1, 3, 1]"),
    ],
)
def test_run_of_a_model_that_makes_other_logits(results, tmp_path, shape, names, message):
    packed = load_packed(results / "quantized" / "model.fdda")
    graph = packed.graph
    view = Node("view", Reshape(shape=shape), (graph.output,))
    graph = dataclasses.replace(graph, nodes=(*graph.nodes, view), output=len(graph.nodes) + 1)
    other = PackedModel(graph, packed.tensors, packed.preprocessing, names)
    other.save(tmp_path / "other.fdda")
    assert message in refused(results, "run", tmp_path / "other.fdda", "tree/test/blue/5.png")


def test_run_profile(results):
    told = succeed("run", "quantized/model.fdda", "tree/test/red", "--profile")
    assert "GMAC/s" in told
    assert all(f" {kernel} " in told for kernel in ("quantize", "linear_s32"))


def test_times_need_the_compiled_operators(results, monkeypatch):
    monkeypatch.setattr("fdda_fast.cli.options.backend_info", lambda: {"isa": None})
    for option, arguments in {
        "--profile": ["run", "quantized/model.fdda", "tree/test/red", "--profile"],
        "--latency-ms": ["allocate", *OWN, "--latency-ms", 9, "--out", "new"],
    }.items():
        assert f"{option}: expected the compiled operators" in refused(results, *arguments)


def test_info_version_help():
    told = succeed("info")
    assert "isas_supported" in told
    assert f"threads: {torch.get_num_threads()}" in told
    assert succeed("--version").startswith("fdda-fast ")
    assert "synthesize" in succeed()
    assert "--per-class" in succeed("quantize", "--help")


def test_demo(tmp_path, monkeypatch):
    from dataclasses import replace

    from fdda_fast import demo
    from fdda_fast.config import from_dict, read_toml

    recipe = demo.RECIPES["digits"]
    config = from_dict(recipe.config, read_toml("short.toml")).replace(steps=2)
    monkeypatch.setitem(demo.RECIPES, "digits", replace(recipe, config=config))
    told = succeed("demo", "--out", tmp_path / "run", "--bits", "W4A4")
    assert "packed integers" in told
    assert str(tmp_path / "run" / "gallery.png") in told


def test_bits_notation():
    assert parse_bits("W4A4") == Bits(4, 4)
    assert parse_bits("w2a4f8l8") == Bits(2, 4, 8)
    assert parse_bits(str(Bits(3, 5, 8))) == Bits(3, 5, 8)


def own(**changes):
    """OWN with options replaced or, by None, left out."""
    options = dict(zip(OWN[::2], OWN[1::2], strict=True))
    options |= {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    return [str(x) for pair in options.items() if pair[1] is not None for x in pair]


BAD_INPUTS = {
    "unknown model": own(model="resnet1999", weights=None),
    "model without weights": own(weights=None),
    "missing weights": own(weights="nothing.safetensors"),
    "weights are a folder": own(weights="tree"),
    "weights do not fit": own(weights="other.safetensors"),
    "truncated weights": own(weights="truncated.safetensors"),
    "damaged state dict": own(weights="flipped.pt"),
    "unknown module": own(model="no_such_module:make"),
    "unknown factory": own(model="tiny_cli_model:build"),
    "factory of something else": own(model="tiny_cli_model:images_only"),
    "factory without classes": own(model="tiny_cli_model:images_only", num_classes=3),
    "unknown data set": own(data="imagenet"),
    "folder without images": own(data="empty"),
    "unreadable image": own(data="broken"),
    "too many images per class": own(per_class=5),
    "no image per class": own(per_class=0),
    "image size": own(image_size=0),
    "resize below image size": own(resize=8),
    "mean is no number": own(mean="grey"),
    "two channels": own(mean="0.5,0.5", std="0.5,0.5"),
    "wrong channels": own(mean="0.5", std="0.5"),
    "more classes than logits": own(model="digits-resnet8", num_classes=2, weights=None),
    "negative seed": own(seed=-1),
    "seed is no number": own(seed="x"),
    "no threads": own(threads=0),
    "unknown option": own(colour="red"),
    "out is a file": own(out="tiny.safetensors"),
    "out below a file": own(out="tiny.safetensors/run"),
    "out is not a run": own(out="occupied"),
    "no out": own(out=None),
}


@pytest.mark.parametrize("command", ["centers", "synthesize", "quantize"])
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_of_every_stage(place, command, case):
    arguments = list(BAD_INPUTS[case])
    if "--out" not in arguments and case != "no out":
        arguments += ["--out", "new"]
    refused(place, command, *arguments, *(TRAIN if command == "quantize" else []))


def refused(place, *arguments):
    """Exit code 2, one readable line, nothing written."""
    before = tree_of(place)
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert "Traceback" not in lines[0]
    assert tree_of(place) == before
    return lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config", "nothing.toml"], "no such file"),
        (["--config", "empty"], "no such file"),
        (["--config", "bad.toml"], "not valid TOML"),
        (["--config", "unknown.toml"], "unknown setting 'stepps'"),
        (["--config", "type.toml"], "must be int"),
        (["--config", "range.toml"], "lr must be > 0"),
        (["--config", "table.toml"], "must be a table"),
        (["--config", "list.toml"], "no.such.layer"),
        (["--config", "float.toml"], "must be bool"),
        (["--config", "bits.toml"], "bits.weight must be"),
        (["--config", "pair.toml"], "must be a list"),
        (["--config", "dir.toml"], "ranges must be"),
        (["--preset", "quick"], "preset must be one of"),
        (["--generator", "nothing.safetensors"], "no such file"),
        (["--generator", "tiny.safetensors"], "not a generator file"),
        (["--generator", "truncated.safetensors"], "not a valid safetensors file"),
        (["--ptq"], "--ptq takes no"),
        (["--method", "brecq"], "method must be one of"),
        (["--method", "reconstruct"], "--method reconstruct takes no"),
        (["--config", "blocks.toml"], "--method reconstruct takes no"),
        (["--bits", "W9A4"], "2..8"),
        (["--bits", "W4A1"], "2..8"),
        (["--bits", "four"], "must look like"),
        (["--bits", "nothing.toml"], "no such file"),
        (["--bits", "float.toml"], "has no table bits"),
        (["--bits", "pair.toml"], "must be a list"),
        (["--bits", "W4A4F8L4"], "must look like"),
        (["--steps", "0"], "--steps"),
        (["--warmup-steps", "-1"], "--warmup-steps"),
        (["--warmup-steps", "3"], "needs a generator that is trained along"),
    ],
)
def test_bad_input_of_quantize(place, options, message):
    assert message in refused(place, "quantize", *OWN, *TRAIN, "--out", "new", *options)


def test_generator_of_another_teacher(results):
    generator = results / "synthetic" / "generator.safetensors"
    told = refused(results, "quantize", *DIGITS, *TRAIN, "--out", "new", "--generator", generator)
    assert "the teacher reads 10 classes" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["synthesize", *OWN, "--out", "new", "--num-images", 0], "--num-images"),
        (["synthesize", *OWN, "--out", "new", "--config", "unknown.toml"], "unknown setting"),
        (["synthesize", *OWN, "--out", "synthetic"], "finished run"),
        (["synthesize", *OWN, "--out", "quantized", "--resume"], "holds a 'quantize' run"),
        (["quantize", *OWN, *TRAIN, "--out", "quantized"], "finished run"),
        (["quantize", *OWN, *TRAIN, "--out", "quantized", "--resume"], "per_class was 2, now 1"),
        (["centers", *DIGITS, "--image-size", 9, "--out", "new"], "image_size: expected 8, as"),
        (["centers", *DIGITS, "--mean", "0.5", "--out", "new"], "mean: expected (0.3053,), as"),
        (["pack", "nothing"], "no such run folder"),
        (["pack", "tree"], "not a run folder"),
        (["pack", "tiny.safetensors"], "no such run folder"),
        (["pack", "synthetic"], "not a 'quantize' run"),
        (["pack", "quantized", "--out", "tree"], "is a folder"),
        (["pack", "quantized", "--out", "tiny.safetensors/x"], ""),
        (["pack"], "argument"),
        (["pack", "quantized", "--threads", "x"], "--threads"),
        (["evaluate", "nothing"], "no such"),
        (["evaluate", "text.fdda", "--data", "digits"], "not a valid safetensors"),
        (["evaluate", "tree"], "not a run folder"),
        (["evaluate", "synthetic"], "not a 'quantize' run"),
        (["evaluate", "quantized", "--data", "digits"], "expected 8, as digits has it, got 16"),
        (["evaluate", "quantized", "--data", "nothing"], "existing folder"),
        (["evaluate", "quantized", "--limit", 0], "limit must be >= 1"),
        (["evaluate", "quantized", "--packed", "text.fdda"], "not a valid safetensors"),
        (["evaluate", "quantized/model.fdda"], "--data"),
        (["evaluate", "quantized/model.fdda", "--data", "tree", "--per-layer", "l.csv"], "FP32"),
        (["run", "nothing.fdda", "tree"], "no such file"),
        (["run", "truncated.fdda", "tree"], "not a valid safetensors"),
        (["run", "flipped.fdda", "tree"], "damaged"),
        (["run", "text.fdda", "tree"], "not a valid safetensors"),
        (["run", "tiny.safetensors", "tree"], "not a packed model"),
        (["run", "quantized/model.fdda", "nothing.png"], "no such file or folder"),
        (["run", "quantized/model.fdda", "empty"], "no image files"),
        (["run", "quantized/model.fdda", "broken"], "not a readable image"),
        (["run", "quantized/model.fdda", "occupied/thesis.tex"], "not a readable image"),
        (["run", "quantized/model.fdda", "tree", "--top", 0], "--top"),
        (["run", "quantized/model.fdda"], "argument"),
        (["demo", "--dataset", "mnist"], "--dataset must be one of"),
        (["demo", "--out", "occupied"], "not a run folder"),
        (["demo", "--out", "tiny.safetensors"], "is a file"),
        (["demo", "--out", "quantized"], "holds a 'quantize' run"),
        (["demo", "--out", "new", "--bits", "W1A1"], "2..8"),
        (["demo", "--out", "new", "--bits", "3"], "must look like"),
        (["demo", "--threads", "0"], "--threads"),
        (["demo", "digits"], "unexpected"),
        (["info", "--all"], "--all"),
        (["quantise"], "No such command"),
    ],
)
def test_bad_input_of_other_commands(results, arguments, message):
    assert message in refused(results, *arguments)


def test_run_whose_files_were_changed(results, tmp_path):

    copy = shutil.copytree(results / "quantized", tmp_path / "copy")
    config = (copy / "config.toml").read_text()
    weights = copy / "quantized.safetensors"
    for text, message in [
        (config.replace("[bits", "[widths"), "damaged config.toml"),
        (config.replace("[preprocessing]", "[other]"), "damaged config.toml"),
        (config.replace("[teacher]", "[pupil]"), "damaged config.toml"),
        (config.replace('weights_sha256 = "', 'weights_sha256 = "0'), "has changed"),
    ]:
        (copy / "config.toml").write_text(text)
        assert message in refused(results, "pack", copy)
        assert message in refused(results, "evaluate", copy)
    (copy / "config.toml").write_text(config)
    weights.write_bytes(weights.read_bytes()[:-10])
    refused(results, "pack", copy)
    shutil.copy(results / "other.safetensors", weights)
    assert "not a quantised network" in refused(results, "pack", copy)


def test_bugs_keep_their_traceback(monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr("fdda_fast.cli.train.CenterParts", broken)
    with pytest.raises(ZeroDivisionError):
        run("centers", *OWN, "--out", tmp_path / "run")


def test_interrupted_and_resumed(tmp_path):
    options = ["quantize", *OWN, "--bits", "W4A4", "--method", "fdda"]
    options += ["--steps", "60", "--threads", "1"]
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "fdda_fast", *options, "--out", str(out)],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "metrics.csv").is_file() and len((out / "metrics.csv").read_text()) > 600:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert str(out / "checkpoint.safetensors") in told
    assert "--resume" in told
    assert not (out / "quantized.safetensors").exists()

    assert "--resume" in run(*options, "--out", out).stderr
    told = run(*options, "--seed", 1, "--out", out, "--resume")
    assert told.exit_code == 2
    assert "seed was 0, now 1" in told.stderr
    damaged = (out / "checkpoint.safetensors").read_bytes()
    (out / "checkpoint.safetensors").write_bytes(damaged[:-5])
    assert run(*options, "--out", out, "--resume").exit_code == 2
    (out / "checkpoint.safetensors").write_bytes(damaged)
    with (out / "metrics.csv").open("a") as file:
        file.write("70,1,1,1,1,1,1,1,1\n")  # of steps that the checkpoint does not hold

    threads = torch.get_num_threads()
    try:
        succeed(*options, "--out", out, "--resume")
        succeed(*options, "--out", tmp_path / "undisturbed")
    finally:
        torch.set_num_threads(threads)
    assert {p.name for p in out.iterdir()} == {p.name for p in (tmp_path / "undisturbed").iterdir()}
    for name in ("quantized.safetensors", "metrics.csv", "calibration.csv", "config.toml"):
        assert (out / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


@pytest.mark.parametrize(
    ("command", "writer", "result"),
    [
        (["quantize", *TRAIN], "fdda_fast.cli.train.save_quantized", "quantized"),
        (["train-generator", "--steps", 2], "fdda_fast.generator.Generator.save", "generator"),
        (["synthesize", "--steps", 2], "fdda_fast.generator.Generator.save", "generator"),
    ],
)
def test_training_survives_that_its_result_cannot_be_written(tmp_path, command, writer, result):
    def full(*args):
        raise OSError(28, "No space left on device")

    out = tmp_path / "run"
    command = [*command, *OWN, "--out"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, full)
        told = run(*command, out)
    assert (told.exit_code, "No space left" in told.stderr) == (2, True)
    for name in ("calibration.csv", "checkpoint.safetensors"):
        assert (out / name).is_file()
    steps = (out / "metrics.csv").stat().st_mtime_ns
    succeed(*command, out, "--resume")
    assert (out / "metrics.csv").stat().st_mtime_ns == steps  # not one more
    succeed(*command, tmp_path / "undisturbed")
    assert tree_of(out).keys() == tree_of(tmp_path / "undisturbed").keys()
    for name in ("calibration.csv", "metrics.csv", f"{result}.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_names_of_files_need_not_be_utf8(results, tmp_path):
    name = b"\xe9t\xe9.png"  # Latin-1
    for colour in COLOURS:
        file = tmp_path / "tree" / colour / os.fsdecode(name)
        file.parent.mkdir(parents=True)
        shutil.copy(results / "tree" / "train" / colour / "0.png", file)
    command = ["quantize", *own(data=tmp_path / "tree"), "--bits", "W4A4", "--ptq", "--out"]
    succeed(*command, tmp_path / "run")
    assert b"red/" + name in (tmp_path / "run" / "calibration.csv").read_bytes()
    told = CliRunner().invoke(app, ["run", "quantized/model.fdda", str(file)])
    assert told.exit_code == 0
    assert name in told.stdout_bytes


def test_interrupted_before_anything_is_written(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("fdda_fast.cli.options.open_source", interrupted)
    result = run("centers", *OWN, "--out", tmp_path / "run")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
    assert not (tmp_path / "run").exists()
