"""Centers part by part: the same as those of all images at once, whatever became of the process."""

import itertools

import numpy as np
import pytest
import torch
from norms import randomize_norms

from fdda_fast import center_parts
from fdda_fast.center_parts import CenterParts
from fdda_fast.data import Preprocessing, every
from fdda_fast.data.sources import ArraySource
from fdda_fast.models.small import SmallResNet
from fdda_fast.statistics import BNSCenters, collect_centers

CLASSES, IMAGES = 5, 44
PROCESSING = Preprocessing(8, 8, (0.4,) * 3, (0.3,) * 3)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(center_parts, "_PART", 7)
    monkeypatch.setattr(center_parts, "_BATCH", 3)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    model = SmallResNet(1, 3, CLASSES)
    randomize_norms(model)
    return model.eval().requires_grad_(False)


class Counted(ArraySource):
    read = 0

    def images(self, indices):
        self.read += len(indices)
        assert len(indices) <= 3  # bounded memory
        return super().images(indices)


@pytest.fixture
def images():
    """In any order; class 3 has none, class 0 is in several parts."""
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (IMAGES, 3, 8, 8), np.uint8))
    labels = rng.permutation([0] * 20 + [1] * 3 + [2] * 11 + [4] * 10)
    source = Counted("mine", pixels, labels, "abcde", PROCESSING, "mine.bin", flip=False)
    return every(source)


def test_all_images(model, images, tmp_path):
    told = []
    path = tmp_path / "new" / "centers.safetensors"
    got = CenterParts(model, images, CLASSES).collect(path, lambda *a: told.append(a))
    assert images.source.read == IMAGES
    pixels = PROCESSING.normalize(images.source.pixels)
    expected = collect_centers(model, pixels, images.source.labels, CLASSES)
    for name in ("mean", "var"):
        for a, b in zip(getattr(got, name), getattr(expected, name), strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert got.count.tolist() == [20, 3, 11, 0, 10]
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-6)
    assert torch.equal(got.reliable, expected.reliable)
    assert got.image_shape == (3, 8, 8)
    assert {p.name for p in path.parent.iterdir()} == {".claims", path.name}
    assert told[-1] == (IMAGES, IMAGES, {})
    assert all(a[0] <= b[0] for a, b in itertools.pairwise(told))


def interrupted_after(images):
    def progress(done, total, metrics):
        if done >= images:
            raise KeyboardInterrupt

    return progress


def test_goes_on_where_it_was(model, images, tmp_path):
    whole, path = tmp_path / "whole.safetensors", tmp_path / "run" / "centers.safetensors"
    CenterParts(model, images, CLASSES).collect(whole)
    images.source.read = 0
    for done in (4, 9, 30):
        with pytest.raises(KeyboardInterrupt):
            CenterParts(model, images, CLASSES).collect(path, interrupted_after(done))
        assert not path.exists()
    # What a killed process leaves is no part, and goes.
    (path.parent / ".parts" / ".000005.safetensors.12.tmp").write_text("half")
    CenterParts(model, images, CLASSES).collect(path)
    assert path.read_bytes() == whole.read_bytes()
    # Of parts of 7, the one in work is lost: 6, then 3, then 3 images.
    assert images.source.read == IMAGES + 6 + 3 + 3
    images.source.read = 0
    found = CenterParts(model, images, CLASSES).collect(path)
    assert images.source.read == 0
    assert torch.equal(found.mean[0], BNSCenters.load(whole).mean[0])


def test_a_damaged_part(model, images, tmp_path):
    path = tmp_path / "centers.safetensors"
    with pytest.raises(KeyboardInterrupt):
        CenterParts(model, images, CLASSES).collect(path, interrupted_after(30))
    (tmp_path / ".parts" / "000002.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"000002.safetensors: not a valid safetensors file"):
        CenterParts(model, images, CLASSES).collect(path)


def test_the_fingerprint_names_teacher_and_images(model, images):
    names = {CenterParts(model, images, CLASSES).fingerprint for _ in range(2)}
    assert len(names) == 1
    fewer = type(images)(images.source, images.indices[:-1])
    names.add(CenterParts(model, fewer, CLASSES).fingerprint)
    torch.manual_seed(2)
    names.add(CenterParts(SmallResNet(1, 3, CLASSES), images, CLASSES).fingerprint)
    assert len(names) == 3


def test_a_model_without_norms(images):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, CLASSES))
    with pytest.raises(ValueError, match="no BatchNorm2d"):
        CenterParts(model, images, CLASSES)
