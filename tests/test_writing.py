"""Synthetic data sets on disk."""

import numpy as np
import pytest
import torch
from PIL import Image

from fdda_fast.data import Preprocessing, open_source
from fdda_fast.generator import Generator, sample
from fdda_fast.writing import synthesize

GREY = Preprocessing(8, 8, (0.4,), (0.3,))
RGB = Preprocessing(9, 9, (0.4, 0.5, 0.6), (0.3, 0.2, 0.1))


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    return Generator(12, (1, 8, 8))


def files(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("preprocessing", "mode"), [(GREY, "L"), (RGB, "RGB")])
def test_pixels(tmp_path, preprocessing, mode):
    torch.manual_seed(1)
    size = preprocessing.image_size
    generator = Generator(3, (preprocessing.channels, size, size))
    synthesize(generator, tmp_path, num_images=70, preprocessing=preprocessing, seed=5)
    images = sample(generator, torch.arange(70) % 3, 5)[0].double().numpy()
    mean, std = (np.array(v)[:, None, None] for v in (preprocessing.mean, preprocessing.std))
    expected = np.clip(np.rint((images * std + mean) * 255), 0, 255)
    found = sorted(tmp_path.rglob("*.png"), key=lambda p: p.name)
    assert [p.parent.name for p in found] == [str(i % 3) for i in range(70)]
    for path, pixels in zip(found, expected, strict=True):
        with Image.open(path) as image:
            assert image.mode == mode
            read = np.asarray(image, dtype=float).reshape(size, size, -1).transpose(2, 0, 1)
        assert np.abs(read - pixels).max() <= 1
        assert np.mean(read != pixels) < 0.02
    assert len({p.read_bytes() for p in found}) == 70


def test_names_and_progress(generator, tmp_path):
    told = []
    synthesize(
        generator, tmp_path / "new" / "set", num_images=130, preprocessing=GREY,
        progress=lambda *a: told.append(a),
    )  # fmt: skip
    names = sorted(files(tmp_path / "new" / "set"))
    assert names == sorted(f"{i % 12:02d}/{i:08d}.png" for i in range(130))
    assert told == [(64, 130, {}), (128, 130, {}), (130, 130, {})]


def test_the_tree_is_a_data_set(generator, tmp_path):
    synthesize(generator, tmp_path, num_images=24, preprocessing=GREY)
    source = open_source(str(tmp_path), "train", image_size=8, resize=8, mean=(0.4,), std=(0.3,))
    assert source.labels.bincount().tolist() == [2] * 12
    assert source.images([0, 5]).shape == (2, 1, 8, 8)


def test_image_i_does_not_depend_on_how_many(generator, tmp_path):
    synthesize(generator, tmp_path / "few", num_images=20, preprocessing=GREY, seed=2)
    synthesize(generator, tmp_path / "many", num_images=90, preprocessing=GREY, seed=2)
    few, many = files(tmp_path / "few"), files(tmp_path / "many")
    assert len(few) == 20
    assert few.items() <= many.items()
    synthesize(generator, tmp_path / "few", num_images=90, preprocessing=GREY, seed=2)  # more
    assert files(tmp_path / "few") == many
    synthesize(generator, tmp_path / "other", num_images=20, preprocessing=GREY, seed=3)
    assert not set(files(tmp_path / "other").values()) & set(few.values())


def test_an_interrupted_run_continues(generator, tmp_path):
    synthesize(generator, tmp_path / "whole", num_images=150, preprocessing=GREY)

    def interrupt(done, total, metrics):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(
            generator, tmp_path / "part", num_images=150, preprocessing=GREY, progress=interrupt
        )
    assert len(files(tmp_path / "part")) == 64
    (tmp_path / "part" / "03" / "00000003.png").unlink()
    kept = tmp_path / "part" / "05" / "00000005.png"
    kept.write_bytes(b"kept")
    synthesize(generator, tmp_path / "part", num_images=150, preprocessing=GREY)
    part, whole = files(tmp_path / "part"), files(tmp_path / "whole")
    assert part.pop("05/00000005.png") == b"kept"  # what is there is not written again
    whole.pop("05/00000005.png")
    assert part == whole


def test_no_half_written_file(generator, tmp_path, monkeypatch):
    def fail(self, target, format):
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        synthesize(generator, tmp_path, num_images=3, preprocessing=GREY)
    assert not files(tmp_path)


@pytest.mark.parametrize(
    ("shape", "count", "preprocessing", "message"),
    [
        ((1, 8, 8), 0, GREY, "num_images must be >= 1"),
        ((3, 8, 8), 5, GREY, "preprocessing is for"),
        ((1, 12, 12), 5, GREY, "preprocessing is for"),
        ((1, 8, 12), 5, GREY, "preprocessing is for"),
    ],
)
def test_errors(tmp_path, shape, count, preprocessing, message):
    generator = Generator(2, shape)
    with pytest.raises(ValueError, match=message):
        synthesize(generator, tmp_path / "out", num_images=count, preprocessing=preprocessing)
    assert not (tmp_path / "out").exists()
