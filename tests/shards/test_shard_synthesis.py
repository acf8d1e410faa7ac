"""What is in the shards, and that it depends on the index only."""

import io
import json
import os
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from fdda_fast.data import Preprocessing
from fdda_fast.generator import Generator, sample
from fdda_fast.shards import ShardConfig, synthesize_shards
from fdda_fast.shards.blocks import BlockMaker, difference_hash
from fdda_fast.shards.dataset import read_shard
from fdda_fast.shards.writer import near_duplicates
from fdda_fast.statistics import EPS, collect_centers

GREY = Preprocessing(8, 8, (0.4,), (0.3,))
RGB = Preprocessing(9, 9, (0.4, 0.5, 0.6), (0.3, 0.2, 0.1))
CLASSES = 5


@pytest.fixture(scope="module")
def generators():
    torch.manual_seed(0)
    return [Generator(2, (1, 8, 8)).eval(), Generator(3, (1, 8, 8)).eval()]


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 9, 3), nn.BatchNorm2d(9), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, CLASSES),
    )  # fmt: skip
    model[8].weight.data *= 10
    with torch.no_grad():
        model.train()(torch.randn(64, 1, 8, 8))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def centers(teacher):
    torch.manual_seed(2)
    return collect_centers(teacher, torch.randn(10, 1, 8, 8), torch.arange(10) % CLASSES, CLASSES)


def write(folder, generators, preprocessing=GREY, judges=(), **settings):
    config = ShardConfig(**{"num_images": 200, "shard_size": 64, "seed": 4, **settings})
    return synthesize_shards(
        generators, folder, config, preprocessing=preprocessing, **dict(judges)
    )


def members(folder):
    """Of all images, by key."""
    samples = [s for path in sorted(folder.glob("*.tar")) for s in read_shard(path)]
    assert len(dict(samples)) == len(samples)
    return dict(samples)


@pytest.mark.parametrize("preprocessing", [GREY, RGB])
@pytest.mark.parametrize("image_format", ["png", "raw"])
def test_images(tmp_path, preprocessing, image_format):
    size = preprocessing.image_size
    torch.manual_seed(5)
    generator = Generator(3, (preprocessing.channels, size, size)).eval()
    index = write(tmp_path, generator, preprocessing, image_format=image_format)
    labels = torch.arange(200) % 3
    images = sample(generator, labels, 4, batch=64)[0]
    expected = preprocessing.denormalize(images).permute(0, 2, 3, 1).numpy()
    found = members(tmp_path)
    assert list(found) == [f"{i:010d}" for i in range(200)]
    for i, parts in enumerate(found.values()):
        assert json.loads(parts["json"]) == {
            "generator": 0, "index": i, "label": i % 3, "seed": 4
        }  # fmt: skip
        assert parts["cls"] == str(i % 3).encode()
        if image_format == "png":
            pixels = np.asarray(Image.open(io.BytesIO(parts["png"]))).reshape(size, size, -1)
        else:
            pixels = np.load(io.BytesIO(parts["image.npy"]))
        assert np.array_equal(pixels, expected[i])
        assert "logits.npy" not in parts
    assert [s["images"] for s in index["shards"]] == [64, 64, 64, 8]
    assert index["summary"]["images"] == 200
    assert (index["summary"]["fewest_per_class"], index["summary"]["most_per_class"]) == (66, 67)
    assert index == json.loads((tmp_path / "index.json").read_bytes())


def test_an_image_depends_on_its_index_only(tmp_path, generators, teacher, centers):
    judges = {"teacher": teacher, "centers": centers}
    write(tmp_path / "a", generators, judges=judges)
    write(tmp_path / "b", generators, judges=judges, shard_size=256, num_images=500)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        write(tmp_path / "c", generators, judges=judges, num_images=70)
    finally:
        torch.set_num_threads(before)
    a, b, c = (members(tmp_path / name) for name in "abc")
    assert (len(a), len(b), len(c)) == (200, 500, 70)
    assert a.items() <= b.items()
    assert c.items() <= a.items()
    write(tmp_path / "d", generators, judges=judges, seed=5)
    assert not {p["png"] for p in members(tmp_path / "d").values()} & {p["png"] for p in a.values()}


def test_threads_do_not_change_the_bits():
    """Of images and logits; a long last layer, alone, would."""
    torch.manual_seed(6)
    generator = Generator(4, (3, 32, 32)).eval()
    teacher = nn.Sequential(
        nn.Conv2d(3, 1280, 8, 8), nn.BatchNorm2d(1280), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(1280, 1000),
    )  # fmt: skip
    preprocessing = Preprocessing(32, 32, (0.5,) * 3, (0.5,) * 3)
    make = BlockMaker([generator], ShardConfig(), preprocessing, teacher, None)
    blocks = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        blocks.append(make(1))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    for block in blocks[1:]:
        assert np.array_equal(block.pixels, blocks[0].pixels)
        assert np.array_equal(block.logits, blocks[0].logits)


def test_several_generators(tmp_path, generators):
    write(tmp_path, generators, image_format="raw", num_images=640)
    counts = np.zeros(CLASSES, int)
    for key, parts in members(tmp_path).items():
        facts = json.loads(parts["json"])
        counts[facts["label"]] += 1
        own = facts["label"] - (2 if facts["generator"] else 0)
        if int(key) % 50 == 0:
            first = int(key) // 64 * 64
            # The labels of others play no part.
            labels = torch.full((64,), own)
            images, _ = sample(generators[facts["generator"]], labels, 4, first=first, batch=64)
            pixels = GREY.denormalize(images)[int(key) - first].permute(1, 2, 0).numpy()
            assert np.array_equal(np.load(io.BytesIO(parts["image.npy"])), pixels)
    assert (counts == 128).all()


def judged(teacher, centers, pixels, labels):
    """Logits, probability of the label, distance to the center, plainly, in float64."""
    model = nn.Sequential(*teacher).double()
    inputs = GREY.normalize(pixels).double()
    distances = 0.0
    for layer, stop in enumerate((1, 4)):
        norm = model[stop]
        x = model[:stop](inputs)
        var, mean = torch.var_mean(x, (2, 3), correction=0)
        scale = norm.running_var + EPS
        mean_off = (mean - centers.mean[layer][labels]) / scale.sqrt()
        var_off = (var - centers.var[layer][labels]) / scale
        distances = distances + (mean_off.square() + var_off.square()).mean(1) / 2
    logits = model(inputs)
    model.float()
    return logits, F.softmax(logits, 1).gather(1, labels[:, None])[:, 0], distances


def test_measures(tmp_path, generators, teacher, centers):
    judges = {"teacher": teacher, "centers": centers}
    summary = write(tmp_path, generators, judges=judges, image_format="raw")["summary"]
    found = members(tmp_path).values()
    pixels = torch.stack([torch.from_numpy(np.load(io.BytesIO(p["image.npy"]))) for p in found])
    facts = [json.loads(p["json"]) for p in found]
    labels = torch.tensor([f["label"] for f in facts])
    expected = judged(teacher, centers, pixels.permute(0, 3, 1, 2), labels)
    logits = torch.stack([torch.from_numpy(np.load(io.BytesIO(p["logits.npy"]))) for p in found])
    torch.testing.assert_close(logits.double(), expected[0], rtol=1e-4, atol=1e-4)
    for name, values in zip(("confidence", "bns_distance"), expected[1:], strict=True):
        own = torch.tensor([f[name] for f in facts], dtype=torch.float64)
        torch.testing.assert_close(own, values, rtol=1e-3, atol=1e-4)
        assert summary[name] == pytest.approx(values.mean().item(), rel=1e-3)
    agreeing = (logits.argmax(1) == labels).double().mean().item()
    assert summary["agreeing"] == pytest.approx(agreeing)


def test_the_filter_leaves_images_out(tmp_path, generators, teacher):
    judges = {"teacher": teacher}
    write(tmp_path / "all", generators, judges=judges)
    everything = members(tmp_path / "all")
    confidence = {k: json.loads(p["json"])["confidence"] for k, p in everything.items()}
    bar = float(np.median(list(confidence.values())))
    index = write(tmp_path / "some", generators, judges=judges, min_confidence=bar)
    expected = {k: p for k, p in everything.items() if confidence[k] >= bar}
    assert members(tmp_path / "some") == expected
    assert 0 < len(expected) < 200
    summary = index["summary"]
    assert (summary["images"], summary["rejected"]) == (len(expected), 200 - len(expected))
    kept = [confidence[k] for k in expected]
    assert summary["confidence"] == pytest.approx(np.mean(kept))


def test_nothing_may_pass(tmp_path, generators, teacher):
    index = write(tmp_path, generators, judges={"teacher": teacher}, min_confidence=1.0)
    assert index["summary"]["images"] == 0
    assert members(tmp_path) == {}


def test_difference_hash():
    ramp = torch.arange(90, dtype=torch.uint8).expand(1, 3, 90, 90)
    assert difference_hash(ramp).all()
    assert not difference_hash(ramp.flip(3)).any()
    noise = torch.randint(0, 200, (2, 1, 32, 32), dtype=torch.uint8)
    assert torch.equal(difference_hash(noise), difference_hash(noise + 20))  # brightness
    assert 10 < (difference_hash(noise)[0] != difference_hash(noise)[1]).sum() < 54


def test_near_duplicates(monkeypatch):
    rng = np.random.default_rng(0)
    hashes = rng.random((50, 64)) < 0.5
    hashes[[7, 30, 49]] = hashes[3]
    hashes[30, :2] ^= True  # still near
    hashes[49, :6] ^= True  # not any more
    hashes[20] = hashes[30]
    for rows in (1, 7, 1024):
        monkeypatch.setattr("fdda_fast.shards.writer._ROWS", rows)
        assert near_duplicates(hashes) == 3
    assert near_duplicates(hashes[:0]) == 0


def test_near_duplicates_of_many_images_need_little_memory():
    hashes = np.random.default_rng(0).random((6000, 64)) < 0.5
    tracemalloc.start()
    try:
        near_duplicates(hashes)
        assert tracemalloc.get_traced_memory()[1] < 24 << 20  # all against 1024: 70 MB
    finally:
        tracemalloc.stop()


def test_the_disk_is_waited_for_while_blocks_are_made(tmp_path, generators, monkeypatch):
    """And once more before a shard gets its name."""
    waited = []

    def fsync(file):
        waited.append(os.fstat(file).st_size)

    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr("fdda_fast.shards.writer._SYNC_BYTES", 300_000)
    write(tmp_path, generators, num_images=320, shard_size=320, image_format="raw")
    whole = (tmp_path / "shard-000000.tar").stat().st_size
    assert waited[-1] == whole
    assert len(waited) == 3  # five blocks of 196,608 bytes, by two
    assert waited == sorted(waited)


def test_progress(tmp_path, generators):
    told = []
    config = ShardConfig(num_images=200, shard_size=128)
    for _ in range(2):
        synthesize_shards(
            generators, tmp_path, config, preprocessing=GREY,
            progress=lambda *a: told.append(a),
        )  # fmt: skip
    done = [64, 128, 128, 192, 200, 200]
    assert told == [(n, 200, {}) for n in [*done, 128, 200]]


def test_errors(tmp_path, generators, teacher, centers):
    folder = tmp_path / "out"
    cases = [
        ([], GREY, {}, {}, "generators: expected one or more"),
        (generators, RGB, {}, {}, "preprocessing is for"),
        (generators, GREY, {"centers": centers}, {}, "need a teacher"),
        (generators, GREY, {}, {"min_confidence": 0.1}, "need a teacher"),
        (generators[:1], GREY, {"teacher": teacher, "centers": centers}, {}, "centers are of 5"),
        (generators, GREY, {}, {"class_weights": (1.0,)}, "one number per class"),
        (generators * 2, GREY, {"teacher": teacher}, {}, "the teacher knows 5 classes"),
    ]
    for made, preprocessing, judges, settings, message in cases:
        with pytest.raises(ValueError, match=message):
            write(folder, made, preprocessing, judges, **settings)
        assert not folder.exists()
