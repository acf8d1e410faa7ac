"""bench/glyphs.py: what it draws, what it writes, and fonts that are missing."""

import sys
from pathlib import Path

import pytest
import torch
from PIL import ImageFont

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import glyphs

from fdda_fast.data import open_source
from fdda_fast.models import SHIPPED, load_teacher
from fdda_fast.models.train import RECIPES
from fdda_fast.seeding import stream

TEACHER = "glyphs-resnet20"


def installed():
    try:
        return [glyphs.faces(split) for split in glyphs.PACKAGES]
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_classes_and_teacher_fit():
    assert len(set(glyphs.CLASSES)) == len(glyphs.CLASSES) >= 100
    factory = SHIPPED[TEACHER][0]
    assert factory()(torch.zeros(1, 1, 28, 28)).shape == (1, len(glyphs.CLASSES))
    assert RECIPES[TEACHER].dataset == str(glyphs.FOLDER)


def test_a_missing_font_names_its_package(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"DejaVuSans\.ttf.*apt-get install fonts-dejavu"):
        glyphs.faces("train", tmp_path)


def test_families_are_held_out_and_have_every_class():
    train, test = installed()
    assert not {face.parent for face in train} & {face.parent for face in test}
    for face in train + test:
        font = ImageFont.truetype(str(face), 40)
        absent = bytes(font.getmask("\uffff"))
        assert [c for c in glyphs.CLASSES if bytes(font.getmask(c)) == absent] == []


def test_variations():
    installed()
    drawn = glyphs.drawn(glyphs.faces("test")[0])
    # In the middle, and with room to move.
    assert float(drawn[..., :8, :].max()) == float(drawn[..., :8].max()) == 0
    first, again, other = (glyphs.varied(drawn, stream(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (len(glyphs.CLASSES), 28, 28)
    assert first.dtype == torch.uint8
    brightest = first.flatten(1).amax(1)
    assert int(brightest.min()) > 100  # a glyph, not noise
    inside = first[:, 3:-3, 3:-3].float().flatten(1).sum(1)
    assert float((inside / first.float().flatten(1).sum(1)).min()) > 0.75


def test_the_data_set_opens_and_the_teacher_knows_it(tmp_path, monkeypatch):
    installed()
    monkeypatch.setattr(glyphs, "PER_FACE", 1)
    glyphs.make_once(tmp_path)
    train, test = (open_source(str(tmp_path), split) for split in glyphs.PACKAGES)
    classes = len(glyphs.CLASSES)
    assert train.num_classes == test.num_classes == classes
    assert (len(train), len(test)) == (32 * classes, 12 * classes)
    assert not test.flip
    with torch.no_grad():
        right = load_teacher(TEACHER)(test.images(range(len(test)))).argmax(1) == test.labels
    assert float(right.float().mean()) >= 0.85
    written = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    glyphs.make_once(tmp_path)  # is there
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == written
