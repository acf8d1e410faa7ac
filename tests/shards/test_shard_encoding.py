"""Tar members, PNG and .npy files against the readers that everybody has."""

import io
import tarfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fdda_fast.shards.encoding import END_OF_ARCHIVE, encode_npy, encode_png, tar_member

FILES = st.dictionaries(
    st.text("abc.0123-_", min_size=1, max_size=100), st.binary(max_size=2000), max_size=5
)


@given(files=FILES)
def test_tar(files):
    data = b"".join(tar_member(n, d) for n, d in files.items()) + END_OF_ARCHIVE
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        entries = archive.getmembers()
        found = {e.name: archive.extractfile(e).read() for e in entries}
    assert found == files
    assert [e.name for e in entries] == list(files)
    for entry in entries:
        assert (entry.uid, entry.gid, entry.mtime, entry.mode) == (0, 0, 0, 0o644)
        assert entry.isfile()


@pytest.mark.parametrize("name", ["", "a" * 101, "ü"])
def test_names(name):
    with pytest.raises(ValueError, match="name: expected 1 to 100 ASCII"):
        tar_member(name, b"")


@given(
    height=st.integers(1, 20), width=st.integers(1, 20), channels=st.sampled_from([1, 3]),
    levels=st.sampled_from([1, 3, 256]), seed=st.integers(0, 99),
)  # fmt: skip
def test_png(height, width, channels, levels, seed):
    pixels = np.random.default_rng(seed).integers(
        levels, size=(height, width, channels), dtype="u1"
    )
    with Image.open(io.BytesIO(encode_png(pixels))) as image:
        image.load()
        assert image.format == "PNG"
        assert image.mode == {1: "L", 3: "RGB"}[channels]
        found = np.asarray(image).reshape(pixels.shape)
    assert np.array_equal(found, pixels)


def test_png_of_a_view():
    pixels = np.random.default_rng(0).integers(256, size=(3, 9, 7), dtype="u1").transpose(1, 2, 0)
    assert encode_png(pixels) == encode_png(np.ascontiguousarray(pixels))


@pytest.mark.parametrize("dtype", ["u1", "f4"])
def test_npy(dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    found = np.load(io.BytesIO(encode_npy(array)), allow_pickle=False)
    assert found.dtype == array.dtype
    assert np.array_equal(found, array)
