"""Who does what among processes that share a folder, without anybody in charge."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Claims:
    """Locks by number, each a byte of one file: the kernel frees them when their process ends.

    Whether it ends well, by SIGKILL or with its machine, so that no claim is ever left behind;
    network file systems pass such locks between machines. They keep processes apart, not the
    threads of one, and end when their process closes the file anywhere: one object per file.

    Args:
        path: a file that stays; it is made where it is missing.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def take(self, number: int, *, wait: bool = False) -> bool:
        """Whether `number` is now this process's; with `wait` it always is, sooner or later."""
        import fcntl  # not on Windows, where the rest of the package works

        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, number)
        except (BlockingIOError, PermissionError):  # POSIX allows either
            return False
        return True

    def drop(self, number: int) -> None:
        import fcntl

        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number)

    @contextmanager
    def held(self, number: int) -> Iterator[None]:
        """Waits for `number` and holds it for the length of the block."""
        self.take(number, wait=True)
        try:
            yield
        finally:
            self.drop(number)

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *_: Any) -> None:
        os.close(self._file)
