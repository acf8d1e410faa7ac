"""IDX files: plain, gzip, damaged."""

import gzip
import struct

import numpy as np
import pytest

from fdda_fast.data.idx import read_idx

VALUES = np.random.default_rng(0).integers(0, 256, (5, 3, 4), dtype=np.uint8)


def idx(values, type_byte=8):
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, type_byte, values.ndim, *values.shape)
    return header + values.tobytes()


@pytest.mark.parametrize("values", [VALUES, VALUES[:, 0, 0], VALUES[:0]])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_read(tmp_path, values, compress):
    path = tmp_path / "file"
    path.write_bytes(compress(idx(values)))
    result = read_idx(path)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, values)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an IDX file"),
        (b"\0\0\x08", "not an IDX file"),
        (b"\0\1" + idx(VALUES)[2:], "not an IDX file"),
        (b"\1\0" + idx(VALUES)[2:], "not an IDX file"),
        (idx(VALUES, 0x0D), "not an IDX file of unsigned bytes"),
        (b"\0\0\x08\0", "not an IDX file"),
        (b"\x89PNG\r\n", "not an IDX file"),
        (idx(VALUES)[:10], "ends within its header"),
        (idx(VALUES)[:-1], r"shape \(5, 3, 4\), i\.e\. 60 bytes of values, but holds 59"),
        (idx(VALUES) + b"\0", "60 bytes of values, but holds 61"),
        (gzip.compress(idx(VALUES))[:-9], "damaged gzip"),
        (gzip.compress(idx(VALUES))[:12], "damaged gzip"),
        (b"\x1f\x8b" + b"\xff" * 40, "damaged gzip"),
        (gzip.compress(idx(VALUES)[:-1]), "but holds 59"),
        (b"\0\0\x08\x03" + b"\xff" * 12 + b"abc", "but holds 3"),
    ],
)
def test_damaged(tmp_path, data, message):
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_idx(path)


def test_a_changed_bit_in_gzip_is_found(tmp_path):
    data = bytearray(gzip.compress(idx(VALUES)))
    data[-6] ^= 1  # of the checksum
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ValueError, match="damaged gzip"):
        read_idx(tmp_path / "file")


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_idx(tmp_path / "absent")
