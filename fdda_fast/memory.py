"""Memory that stays with the process between training steps."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_DEFAULT_TRIM_THRESHOLD, _DEFAULT_MMAP_MAX = 128 * 1024, 65536
_NEVER_TRIM = 2**31 - 1


@contextmanager
def resident_memory() -> Iterator[None]:
    """Keeps freed CPU tensors' memory for the next ones, for the length of the block.

    Otherwise glibc gives every large tensor fresh pages and returns them when it is freed: a
    training step then spends more time on page faults than on its element-wise kernels. Without
    glibc nothing is changed.

    What lives longer than a step (parameters, an optimizer's state) is best made before: between
    tensors that come and go it would split the memory, which then grows by a half.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_MAX, _DEFAULT_MMAP_MAX)
        libc.mallopt(_M_TRIM_THRESHOLD, _DEFAULT_TRIM_THRESHOLD)
        libc.malloc_trim(0)
