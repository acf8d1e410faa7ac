"""The calibration draw and its record."""

import copy
import csv

import numpy as np
import pytest
import torch

from fdda_fast.data import Preprocessing, draw, from_record, open_source
from fdda_fast.data.calibration import at
from fdda_fast.data.sources import ArraySource


@pytest.fixture(scope="module")
def source():
    return open_source("digits", "train")


@pytest.mark.parametrize("per_class", [1, 5])
def test_draw(source, per_class):
    drawn = draw(source, per_class, seed=3)
    assert drawn.labels.bincount().tolist() == [per_class] * 10
    assert len(set(drawn.indices)) == 10 * per_class
    assert torch.equal(drawn.labels, source.labels[list(drawn.indices)])
    assert torch.equal(drawn.images, source.images(drawn.indices))
    assert drawn.files == tuple(source.file_of(i) for i in drawn.indices)


def test_seed_decides(source):
    first = draw(source, 2, seed=0)
    assert first.indices == draw(source, 2, seed=0).indices
    others = [draw(source, 2, seed=s).indices for s in range(1, 6)]
    assert len({first.indices, *others}) == 6


def test_more_per_class_keeps_the_first_ones(source):
    """A study over k adds images to those of a smaller k."""
    one, five = draw(source, 1, seed=0), draw(source, 5, seed=0)
    assert one.indices == five.indices[::5]


def test_all_images_of_a_class_can_be_drawn():
    small = make(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), [0, 1, 0, 1])
    assert sorted(draw(small, 2, seed=0).indices) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"class 0 \(a\) of mine has 2 images, fewer than"):
        draw(small, 3, seed=0)


def test_missing_classes_are_left_out():
    small = make(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), [2, 0, 2])
    assert draw(small, 1, seed=0).labels.tolist() == [0, 2]


def make(pixels, labels, file="mine.bin"):
    preprocessing = Preprocessing(2, 2, (0.5,), (0.5,))
    return ArraySource("mine", pixels, np.array(labels), "abc", preprocessing, file, flip=False)


@pytest.mark.parametrize("per_class", [0, -1])
def test_too_few_per_class(source, per_class):
    with pytest.raises(ValueError, match="per_class must be >= 1"):
        draw(source, per_class, seed=0)


@pytest.mark.parametrize("row", [-1, 1257])
def test_rows_that_are_not_there(source, row):
    with pytest.raises(ValueError, match=r"has rows 0\.\.1256"):
        at(source, [0, row])


def test_record_round_trip(source, tmp_path):
    source = copy.copy(source)
    source.file_of = "{}-\udce9.png".format  # a name that is not UTF-8
    drawn = draw(source, 2, seed=4)
    path = tmp_path / "calibration.csv"
    drawn.save_record(path)
    assert [p.name for p in tmp_path.iterdir()] == ["calibration.csv"]
    with path.open(errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["label"]) for r in rows] == drawn.labels.tolist()
    assert [int(r["index"]) for r in rows] == list(drawn.indices)
    again = from_record(source, path)
    assert again.indices == drawn.indices
    assert again.files == drawn.files
    assert torch.equal(again.images, drawn.images)
    assert torch.equal(again.labels, drawn.labels)


def test_records_of_other_data_are_refused(source, tmp_path):
    path = tmp_path / "calibration.csv"
    drawn = draw(source, 1, seed=0)
    drawn.save_record(path)
    of_test = tmp_path / "test.csv"
    draw(open_source("digits", "test"), 1, seed=0).save_record(of_test)
    with pytest.raises(ValueError, match="another data set than digits"):
        from_record(source, of_test)
    pixels = torch.zeros(1257, 1, 2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="another data set than mine"):  # labels differ
        from_record(make(pixels, [0] * 1257, drawn.files[0]), path)
    with pytest.raises(ValueError, match="has rows"):
        from_record(make(pixels[:3], [0] * 3), path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no image"),
        ("label,index,file\n", "names no image"),
        ("label,index\n1,2\n", "not a calibration record"),
        ("label,index,file\none,2,x\n", "not a calibration record"),
        ("label,index,file\n1\n", "not a calibration record"),
    ],
)
def test_other_files_are_refused(source, tmp_path, text, message):
    path = tmp_path / "calibration.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        from_record(source, path)


def test_missing_record(source, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        from_record(source, tmp_path / "absent.csv")
