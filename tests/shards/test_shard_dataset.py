"""Reading shards back."""

import os
import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fdda_fast.data import Preprocessing
from fdda_fast.generator import Generator, sample
from fdda_fast.shards import ShardConfig, ShardDataset, synthesize_shards
from fdda_fast.shards.dataset import read_shard
from fdda_fast.shards.encoding import tar_member

GREY = Preprocessing(8, 8, (0.4,), (0.3,))
RGB = Preprocessing(9, 9, (0.4, 0.5, 0.6), (0.3, 0.2, 0.1))


def made(folder, preprocessing, image_format, teacher=None):
    torch.manual_seed(0)
    size = preprocessing.image_size
    generator = Generator(4, (preprocessing.channels, size, size)).eval()
    config = ShardConfig(num_images=300, shard_size=64, image_format=image_format)
    synthesize_shards(generator, folder, config, preprocessing=preprocessing, teacher=teacher)
    return generator


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("set")
    made(path, GREY, "png")
    return path


def indices(samples):
    return [int(s["index"]) for s in samples]


@pytest.mark.parametrize("preprocessing", [GREY, RGB])
@pytest.mark.parametrize("image_format", ["png", "raw"])
def test_images_and_labels(tmp_path, preprocessing, image_format):
    generator = made(tmp_path, preprocessing, image_format)
    data = ShardDataset(tmp_path)
    samples = list(data)
    assert indices(samples) == list(range(300))
    assert len(data) == 300
    assert (data.num_classes, data.preprocessing) == (4, preprocessing)
    images = sample(generator, torch.arange(300) % 4, 0, batch=64)[0]
    expected = preprocessing.normalize(preprocessing.denormalize(images))
    torch.testing.assert_close(torch.stack([s["image"] for s in samples]), expected)
    assert [s["label"] for s in samples] == [i % 4 for i in range(300)]
    assert "logits" not in samples[0]


def test_logits(tmp_path):
    torch.manual_seed(1)
    teacher = torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.Flatten(),
        torch.nn.Linear(108, 7),
    ).eval()  # fmt: skip
    made(tmp_path, GREY, "png", teacher)
    samples = list(ShardDataset(tmp_path))[:50]
    with torch.no_grad():
        expected = teacher(torch.stack([s["image"] for s in samples]))
    found = torch.stack([s["logits"] for s in samples])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_transform(folder):
    first = next(iter(ShardDataset(folder, lambda image: image.float().mean())))["image"]
    assert first.shape == ()
    pixels = next(iter(ShardDataset(folder, lambda image: image)))["image"]
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (1, 8, 8))


def test_shuffled(folder):
    data = ShardDataset(folder, shuffle=True, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        orders.append(indices(data))
        assert sorted(orders[-1]) == list(range(300))
    assert orders[0] == orders[2] != orders[1]
    inside = [i % 64 for i in orders[0] if i < 64]
    assert inside != sorted(inside)
    assert indices(ShardDataset(folder, shuffle=True, seed=4)) != orders[0]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_share_the_images(folder, workers):
    loader = DataLoader(ShardDataset(folder), batch_size=32, num_workers=workers)
    batches = list(loader)
    found = torch.cat([b["index"] for b in batches])
    assert sorted(found.tolist()) == list(range(300))
    assert batches[0]["image"].shape == (32, 1, 8, 8)


def test_ranks_share_the_images(folder, monkeypatch):
    found = []
    for rank in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(torch.distributed, "is_initialized", lambda: True)
            patch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
            patch.setattr(torch.distributed, "get_world_size", lambda: 3)
            found.append(indices(ShardDataset(folder)))
    assert [len(f) for f in found] == [128, 108, 64]
    assert sorted(i for part in found for i in part) == list(range(300))


def test_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"index.json: no such file"):
        ShardDataset(tmp_path)
    made(tmp_path, GREY, "raw")
    path = tmp_path / "shard-000001.tar"
    os.truncate(path, 10_000)
    with pytest.raises(ValueError, match=r"shard-000001.tar: damaged"):
        list(ShardDataset(tmp_path))
    path.write_bytes(b"\x01" * 10_000)
    with pytest.raises(ValueError, match=r"shard-000001.tar: damaged"):
        list(ShardDataset(tmp_path))


def _cut(images):
    return images[:-1]


def _cut_inside(images):
    key, parts = images[-1]
    return [*images[:-1], (key, {"png": parts["png"]})]


def _no_picture(images):
    key, parts = images[3]
    return [*images[:3], (key, parts | {"png": parts["png"][:40]}), *images[4:]]


def _no_object(images):
    key, parts = images[3]
    return [*images[:3], (key, parts | {"json": b"[]"}), *images[4:]]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_cut, "holds 63 of 64 images"),
        (_cut_inside, "image 0000000127: KeyError"),
        (_no_picture, "image 0000000067: "),
        (_no_object, "image 0000000067: TypeError"),
    ],
)
def test_damaged_members(folder, tmp_path, change, message, shuffle):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "shard-000001.tar"
    images = change(list(read_shard(path)))
    members = (tar_member(f"{key}.{n}", d) for key, parts in images for n, d in parts.items())
    path.write_bytes(b"".join(members))
    with pytest.raises(ValueError, match=rf"shard-000001.tar: damaged \({message}"):
        list(ShardDataset(tmp_path, shuffle=shuffle))


def test_another_index(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index.json: not an index of shards"):
        ShardDataset(tmp_path)


def test_webdataset_reads_them(folder):
    webdataset = pytest.importorskip("webdataset")
    urls = str(folder / "shard-{000000..000004}.tar")
    data = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("png", "cls")
    found = list(data)
    assert [label for _, label in found] == [i % 4 for i in range(300)]
    assert found[0][0].dtype == np.uint8
