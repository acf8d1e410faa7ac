"""Data sets: digits, folders of IDX files, ImageFolder trees."""

import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from fdda_fast.data import open_source
from fdda_fast.data.sources import FASHION_MNIST_CLASSES, FASHION_MNIST_DIR


def test_digits():
    train, test = (open_source("digits", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1257, 540)
    data = load_digits()
    everything = {}
    for pixels, label in zip(data.images.astype(int), data.target, strict=True):
        everything.setdefault(pixels.tobytes(), []).append(int(label))
    seen = {}
    for source in (train, test):
        assert source.num_classes == 10
        assert source.class_names == tuple("0123456789")
        assert not source.flip
        share = source.labels.bincount() / len(source)
        whole = np.bincount(data.target) / len(data.target)
        np.testing.assert_allclose(share, whole, atol=0.003)  # stratified
        pixels = (source.images(range(len(source))) * 0.3763 + 0.3053) * 255
        restored = np.rint(pixels.numpy()[:, 0] * 16 / 255).astype(int)
        for image, label in zip(restored, source.labels.tolist(), strict=True):
            seen.setdefault(image.tobytes(), []).append(label)
    # Every image once, with its label: the splits are disjoint and complete.
    assert {k: sorted(v) for k, v in seen.items()} == {k: sorted(v) for k, v in everything.items()}
    again = open_source("digits", "train")
    assert torch.equal(again.pixels, train.pixels)


def test_digits_are_normalised():
    images = open_source("digits", "train").images(range(1257))
    assert images.shape == (1257, 1, 8, 8)
    assert images.dtype == torch.float32
    assert abs(images.mean().item()) < 0.01
    assert images.std().item() == pytest.approx(1, abs=0.01)


def test_order_of_indices():
    source = open_source("digits", "test")
    images = source.images([5, 0, 5])
    assert torch.equal(images[0], images[2])
    assert torch.equal(images[1:2], source.images([0]))
    assert "load_digits" in source.file_of(5)


def idx(values):
    return (
        struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()
    )


RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 9, 9), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2], dtype=np.uint8)


def write_idx(root, pixels=PIXELS, labels=LABELS, stem="train", ending="", compress=bytes):
    root.mkdir(exist_ok=True)
    (root / f"{stem}-images-idx3-ubyte{ending}").write_bytes(compress(idx(pixels)))
    (root / f"{stem}-labels-idx1-ubyte{ending}").write_bytes(compress(idx(labels)))
    return root


def test_idx_folder(tmp_path):
    root = write_idx(tmp_path / "mine")
    write_idx(root, 255 - PIXELS[:2], LABELS[1:3], "t10k", ".gz", gzip.compress)
    train, test = open_source(str(root), "train"), open_source(str(root), "test")
    assert (train.name, len(train), len(test)) == ("mine", 6, 2)
    assert train.class_names == ("0", "1", "2")
    assert test.labels.tolist() == [1, 2]
    assert not train.flip
    assert train.preprocessing.image_size == 9
    images = train.images([3, 1])
    expected = (PIXELS[[3, 1], None] / 255 - 0.286) / 0.353
    np.testing.assert_allclose(images, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(
        test.preprocessing.denormalize(test.images([0]))[0, 0], torch.tensor(255 - PIXELS[0])
    )
    assert test.file_of(0).endswith("t10k-images-idx3-ubyte.gz")


def test_idx_folder_with_its_own_mean_and_std(tmp_path):
    root = str(write_idx(tmp_path / "mine"))
    images = open_source(root, "train", mean=(0.5,), std=[0.25]).images([3])
    np.testing.assert_allclose(images, (PIXELS[[3], None] / 255 - 0.5) / 0.25, rtol=1e-5, atol=1e-6)
    images = open_source(root, "train", mean=(0.5, 0.0, 0.0), std=(0.25, 1, 1)).images([3, 1])
    assert images.shape == (2, 3, 9, 9)  # for a network that reads colours
    np.testing.assert_allclose(images[:, 2], PIXELS[[3, 1]] / 255, rtol=1e-5, atol=1e-6)


def test_options_that_a_set_does_not_follow_are_refused(tmp_path):
    mine, digits = str(write_idx(tmp_path / "mine")), (0.3053,)
    open_source(mine, "train", image_size=9, resize=9)
    open_source("digits", "train", image_size=8, resize=8, mean=list(digits), std=(0.3763,))
    for spec, options, message in [
        (mine, {"image_size": 8}, "image_size: expected 9, as mine has it, got 8"),
        (mine, {"resize": 10}, "resize: expected 9, as mine has it, got 10"),
        (mine, {"mean": (0.5,) * 3}, "mean and std need 1 or 3 values each, got 3 and 1"),
        ("digits", {"image_size": 16}, "image_size: expected 8, as digits has it, got 16"),
        ("digits", {"resize": 9}, "resize: expected 8"),
        ("digits", {"mean": (0.5,)}, r"mean: expected \(0\.3053,\), as digits has it, got \(0\.5,"),
        ("digits", {"std": (0.5,)}, "std: expected"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_source(spec, "train", **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": LABELS[:5]}, "6 images but 5 labels"),
        ({"pixels": PIXELS[:, :, :8]}, "square images"),
        ({"pixels": PIXELS[0]}, "square images"),
        ({"labels": LABELS[None]}, "square images"),
    ],
)
def test_idx_folders_that_do_not_fit(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        open_source(str(write_idx(tmp_path, **arguments)), "train")


def test_idx_folder_without_labels_or_split(tmp_path):
    root = write_idx(tmp_path)
    (root / "train-labels-idx1-ubyte").rename(root / "labels")
    with pytest.raises(ValueError, match="no IDX images and labels for split 'train'"):
        open_source(str(root), "train")


@pytest.mark.skipif(not FASHION_MNIST_DIR.is_dir(), reason=f"no {FASHION_MNIST_DIR}")
def test_fashion_mnist():
    source = open_source("fashion-mnist", "test")
    assert source.pixels.shape == (10_000, 1, 28, 28)
    assert source.labels.bincount().tolist() == [1000] * 10
    assert source.class_names == FASHION_MNIST_CLASSES
    assert source.flip


def test_fashion_mnist_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr("fdda_fast.data.sources.FASHION_MNIST_DIR", tmp_path)
    with pytest.raises(ValueError, match="apt-get install dataset-fashion-mnist"):
        open_source("fashion-mnist", "train")


def write_tree(root, names=("cat", "dog"), count=2, mode="RGB", start=0):
    """Images of one colour each: start, start + 1, ..."""
    value = start
    for name in names:
        (root / name).mkdir(parents=True)
        for index in range(count):
            colour = value if mode == "L" else (value, value + 50, value + 100)
            Image.new(mode, (12, 10), colour).save(root / name / f"{index}.png")
            value += 1
    return root


OPTIONS = {"image_size": 6, "mean": (0.0,) * 3, "std": (1.0,) * 3}


def test_image_folder_with_splits(tmp_path):
    write_tree(tmp_path / "train")
    write_tree(tmp_path / "val", count=1, start=100)
    train = open_source(str(tmp_path), "train", **OPTIONS)
    test = open_source(str(tmp_path), "test", **OPTIONS)
    assert (len(train), len(test)) == (4, 2)
    assert train.name == tmp_path.name
    assert train.class_names == ("cat", "dog")
    assert train.labels.tolist() == [0, 0, 1, 1]
    assert train.labels.dtype == torch.int64
    assert train.flip
    images = train.images([2, 0])
    assert images.shape == (2, 3, 6, 6)
    colours = (255 * images[:, :, 3, 3]).round().int().tolist()
    assert colours == [[2, 52, 102], [0, 50, 100]]
    assert (255 * test.images([1])[0, 0, 0, 0]).round() == 101
    assert train.file_of(2) == "dog/0.png"


def test_image_folder_with_a_test_folder(tmp_path):
    write_tree(tmp_path / "train")
    write_tree(tmp_path / "test", count=3)
    assert len(open_source(str(tmp_path), "test", **OPTIONS)) == 6


def test_image_folder_without_splits(tmp_path):
    write_tree(tmp_path)
    for split in ("train", "test"):
        assert len(open_source(str(tmp_path), split, **OPTIONS)) == 4


def test_grey_files_and_grey_networks(tmp_path):
    write_tree(tmp_path, names=("a",), mode="L", start=77)
    image = open_source(str(tmp_path), "train", **OPTIONS).images([0])[0]
    assert image.shape == (3, 6, 6)
    torch.testing.assert_close(image, torch.full((3, 6, 6), 77 / 255))
    grey = open_source(str(tmp_path), "train", image_size=6, mean=(0.0,), std=(1.0,))
    torch.testing.assert_close(grey.images([1])[0], torch.full((1, 6, 6), 78 / 255))


def test_grey_files_of_16_bits(tmp_path):
    write_tree(tmp_path, names=("a",), count=1, mode="L", start=77)
    Image.fromarray(np.full((10, 12), 77 * 257, np.uint16)).save(tmp_path / "a" / "deep.png")
    images = open_source(str(tmp_path), "train", **OPTIONS).images([0, 1])
    assert torch.equal(images[0], images[1])


def test_resize_defaults_to_the_usual_ratio(tmp_path):
    write_tree(tmp_path)
    assert open_source(str(tmp_path), "train").preprocessing.resize == 256
    assert open_source(str(tmp_path), "train", image_size=112).preprocessing.resize == 128
    assert open_source(str(tmp_path), "train", image_size=8, resize=8).preprocessing.resize == 8


DAMAGES = {
    "half": lambda d: d[: len(d) // 2],
    "text": lambda d: b"not an image",
    "header": lambda d: d[:11] + b"\0" + d[12:],  # shorter than it must be
    "chunk": lambda d: d[:35] + b"\0" + d[36:],
    "bomb": lambda d: d,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_unreadable_image(tmp_path, monkeypatch, damage):
    if damage == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 40 // 2 - 1)
    write_tree(tmp_path)
    path = tmp_path / "dog" / "1.png"
    noise = RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    source = open_source(str(tmp_path), "train", **OPTIONS)
    with pytest.raises(ValueError, match=r"1\.png: not a readable image"):
        source.images([0, 3])
    assert source.images([0, 1, 2]).shape == (3, 3, 6, 6)


def test_trees_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="not an ImageFolder tree"):
        open_source(str(tmp_path), "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="not an ImageFolder tree"):
        open_source(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("spec", "split", "message"),
    [
        ("digits", "val", "split must be 'train' or 'test', got 'val'"),
        ("no-such-data", "train", "neither 'digits', 'fashion-mnist' nor an existing folder"),
    ],
)
def test_unknown_names(spec, split, message):
    with pytest.raises(ValueError, match=message):
        open_source(spec, split)


def class_folders(root, split, names):
    for name in names:
        folder = root / split / name
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "0.png")


def test_splits_with_different_classes_are_refused(tmp_path):
    class_folders(tmp_path, "train", ["ant", "bee", "cat"])
    class_folders(tmp_path, "val", ["ant", "cat"])
    for split in ("train", "test"):
        with pytest.raises(ValueError, match=r"different classes: \['bee'\]"):
            open_source(str(tmp_path), split, image_size=8)


def test_a_missing_split_is_named(tmp_path):
    class_folders(tmp_path, "train", ["ant", "bee"])
    assert open_source(str(tmp_path), "train", image_size=8).class_names == ("ant", "bee")
    with pytest.raises(ValueError, match=r"has train/ but no val/ or test/"):
        open_source(str(tmp_path), "test", image_size=8)
