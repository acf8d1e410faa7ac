"""Verification notices what is wrong."""

import hashlib
import json

import pytest
import torch

from fdda_fast.data import Preprocessing
from fdda_fast.generator import Generator
from fdda_fast.shards import ShardConfig, synthesize_shards, verify_shards
from fdda_fast.shards.dataset import read_shard
from fdda_fast.shards.encoding import END_OF_ARCHIVE, tar_member

GREY = Preprocessing(8, 8, (0.4,), (0.3,))
CONFIG = ShardConfig(num_images=150, shard_size=64)


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    return Generator(4, (1, 8, 8)).eval()


@pytest.fixture
def folder(generator, tmp_path):
    synthesize_shards(generator, tmp_path, CONFIG, preprocessing=GREY)
    return tmp_path


def replaced(folder, change):
    """Shard 1 with other contents, and an index that agrees."""
    path = folder / "shard-000001.tar"
    images = change(list(read_shard(path)))
    members = (tar_member(f"{key}.{n}", d) for key, parts in images for n, d in parts.items())
    data = b"".join(members) + END_OF_ARCHIVE
    path.write_bytes(data)
    index = json.loads((folder / "index.json").read_bytes())
    index["shards"][1] |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / "index.json").write_text(json.dumps(index))


def test_a_good_set(generator, folder):
    told = []
    verify_shards(folder, generator, progress=lambda *a: told.append(a))
    assert told == [(1, 3, {}), (2, 3, {}), (3, 3, {})]


def flip(path):
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [(flip, "its sum is another one"), (lambda path: path.unlink(), "is missing")],
)
def test_damaged_shards(generator, folder, damage, message):
    damage(folder / "shard-000001.tar")
    with pytest.raises(ValueError, match=rf"1 of 3 shards .* shard-000001.tar: {message}"):
        verify_shards(folder, generator)
    verify_shards(folder, generator, part=(0, 2))  # shards 0 and 2
    with pytest.raises(ValueError, match=r"shard-000001.tar"):
        verify_shards(folder, generator, part=(1, 2))


def _other_image(images):
    return [(key, parts | {"png": images[0][1]["png"]}) for key, parts in images]


def _no_image(images):
    return [(key, parts | {"png": b"\x89PNG"}) for key, parts in images]


def _other_label(images):
    return [(key, parts | {"cls": b"9"}) for key, parts in images]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_image, "not what the generator makes"),
        (_no_image, "another shape, or none"),
        (_other_label, "two labels"),
        (lambda images: images[:-1], "has 63 images"),
        (lambda images: [*images, images[3]], "out of place"),
        (lambda images: [*images, ("0000000200", images[3][1])], "out of place"),
    ],
)
def test_wrong_contents_under_a_right_sum(generator, folder, change, message):
    replaced(folder, change)
    with pytest.raises(ValueError, match=message):
        verify_shards(folder, generator)


def test_another_generator(folder):
    torch.manual_seed(1)
    with pytest.raises(ValueError, match=r"other settings: \['generators'\]"):
        verify_shards(folder, Generator(4, (1, 8, 8)).eval())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index["shards"].pop(1), "does not list the shards 0 to 2"),
        (lambda index: index["shards"].append(index["shards"][0]), "does not list the shards"),
        (lambda index: index.pop("format"), "not an index of shards"),
        (lambda index: index.pop("shards"), "not an index of shards"),
    ],
)
def test_another_index(generator, folder, change, message):
    index = json.loads((folder / "index.json").read_bytes())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"index.json: {message}"):
        verify_shards(folder, generator)


def test_nothing_to_verify(generator, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"settings.json"):
        verify_shards(tmp_path, generator)
    synthesize_shards(generator, tmp_path, CONFIG, preprocessing=GREY)
    (tmp_path / "index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"index.json"):
        verify_shards(tmp_path, generator)
