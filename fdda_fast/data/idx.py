"""IDX files (the MNIST family's format), plain or gzip.

Layout: two zero bytes, one type byte, one byte with the number of dimensions, the dimensions as
big-endian uint32, then the values in C order. Only unsigned bytes (type 0x08) are read.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

_UNSIGNED_BYTE = 0x08


def read_idx(path: str | Path) -> np.ndarray:
    """Reads one IDX file of unsigned bytes.

    Returns:
        uint8 array of the shape that the file states.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an IDX file of unsigned bytes, damaged, or shorter or longer than it states.
    """
    path = Path(path)
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip file ({error})") from error
    if len(data) < 4 or data[0] or data[1] or data[2] != _UNSIGNED_BYTE or data[3] == 0:
        raise ValueError(f"{path}: not an IDX file of unsigned bytes (starts {data[:4]!r})")
    header = 4 + 4 * data[3]
    if len(data) < header:
        raise ValueError(f"{path}: ends within its header")
    shape = tuple(int(v) for v in np.frombuffer(data, ">u4", count=data[3], offset=4))
    if len(data) - header != math.prod(shape):
        raise ValueError(
            f"{path}: states shape {shape}, i.e. {math.prod(shape)} bytes of values, "
            f"but holds {len(data) - header}"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
