"""The demo, shortened, and the measuring it does."""

import csv
import dataclasses
import time

import pytest
import torch
from PIL import Image
from rich.console import Console

from fdda_fast import demo, evaluation
from fdda_fast.config import QuantizeConfig, ReconstructConfig, RefineConfig
from fdda_fast.data import open_source
from fdda_fast.gallery import save_gallery
from fdda_fast.quantization.bits import Bits

SHORT = QuantizeConfig(
    steps=2,
    refine=RefineConfig(images=20, steps=2),
    reconstruct=ReconstructConfig(steps=2, images=32),
)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    recipe = dataclasses.replace(demo.RECIPES["digits"], config=SHORT)
    return demo.run_demo(recipe, tmp_path_factory.mktemp("demo") / "out", Bits(4, 4))


def test_files(result):
    assert {p.name for p in result.folder.iterdir()} == {
        "calibration.csv", "centers.safetensors", "config.toml", "environment.toml", "gallery.png",
        "model.fdda", "results.csv", "teacher.safetensors",
    }  # fmt: skip
    with (result.folder / "results.csv").open() as file:
        assert [float(row["top1"]) for row in csv.DictReader(file)] == [
            line.top1 for line in result.lines
        ]


def test_figures(result):
    fp32, minmax, calibrated, fdda, packed = result.lines
    assert fp32.top1 > 0.97
    assert fp32.agreement == 1
    assert min(minmax.top1, calibrated.top1) > 0.8
    assert abs(packed.top1 - fdda.top1) < 0.01
    assert result.same > 0.99 * result.images
    assert fp32.file_bytes > 4 * packed.file_bytes
    assert min(fp32.seconds, packed.seconds) > 0
    assert (minmax.file_bytes, minmax.seconds) == (None, None)


def test_table_fits_eighty_columns(result, capsys):
    Console(width=80).print(demo.table(result))
    lines = capsys.readouterr().out.splitlines()
    assert sum("W4A4" in line for line in lines) == 4
    assert len(lines) == 4 + len(result.lines)
    assert any("gallery.png" in line for line in demo.remarks(result))


def test_a_second_demo_replaces_the_first(result):
    recipe = dataclasses.replace(result.recipe, config=SHORT.replace(steps=1))
    again = demo.run_demo(recipe, result.folder, Bits(4, 4))
    assert again.lines[0].top1 == result.lines[0].top1


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="not a run folder"):
        demo.run_demo(demo.RECIPES["digits"], tmp_path, Bits(4, 4))


class Always(torch.nn.Module):
    """Puts every image into one class."""

    def __init__(self, label):
        super().__init__()
        self.label = label

    def forward(self, x):
        return torch.nn.functional.one_hot(torch.full((len(x),), self.label), 10).float()


def test_accuracy_and_agreement():
    source = open_source("digits", "test")
    share = (source.labels == 3).double().mean().item()
    assert evaluation.accuracy(Always(3), source, batch_size=7) == pytest.approx(share)
    assert evaluation.agreement(Always(3), Always(3), source, limit=9) == 1
    assert evaluation.agreement(Always(3), Always(4), source, limit=9) == 0


def test_a_limit_is_spread_over_the_source():
    source = open_source("digits", "test")
    chosen = evaluation.rows(source, 10)
    assert chosen == [54 * i for i in range(10)]
    assert evaluation.rows(source, 10**6) == list(range(540))
    with pytest.raises(ValueError, match="limit must be >= 1"):
        evaluation.rows(source, 0)


def test_latency_takes_turns():
    calls = []

    def network(name, pause):
        def call(x):
            calls.append(name)
            time.sleep(pause)

        return call

    networks = {"slow": network("slow", 4e-3), "quick": network("quick", 1e-3)}
    found = evaluation.latency(networks, torch.zeros(1), rounds=4, warmup=1)
    assert calls == ["slow", "quick"] * 5
    assert found["slow"] > found["quick"] >= 1e-3


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 100)])
def test_gallery(tmp_path, channels, size):
    source = open_source("digits", "test")
    preprocessing = dataclasses.replace(
        source.preprocessing, image_size=size, resize=size, mean=(0.5,) * channels,
        std=(0.5,) * channels,
    )  # fmt: skip
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(100, channels, size, size, generator=rng)
    labels = torch.arange(100) % 3 + 27  # the first classes have none
    for name in ("a.png", "b.png"):
        save_gallery(tmp_path / name, images, labels, preprocessing, ["né 日本"] * 30)
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (96 + 10 * 68, 3 * 68 + 4)
        first = image.crop((96 + 68, 4, 96 + 68 + 64, 4 + 64)).convert("RGB")
    pixels = preprocessing.denormalize(images[3:4])[0].permute(1, 2, 0).squeeze(2).numpy()
    resampling = Image.Resampling.NEAREST if size < 64 else Image.Resampling.LANCZOS
    expected = Image.fromarray(pixels).convert("RGB").resize((64, 64), resampling)
    assert first.tobytes() == expected.tobytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2
