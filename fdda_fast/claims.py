"""Who does what among processes that share a folder, without anybody in charge."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FIRST_POLL, _POLL_SECONDS = 0.01, 0.2


class Claims:
    """Locks by number, each a byte of one file: the kernel frees them when their process ends.

    Whether it ends well, by SIGKILL or with its machine, so that no claim is ever left behind;
    network file systems pass such locks between machines. They keep processes apart, not the
    threads of one, and end when their process closes the file anywhere: one object per file.

    Number 0 is for the whole of what is shared, n + 1 for its task n.

    Args:
        path: a file that stays; it is made where it is missing.
    """

    WHOLE = 0

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

    def work_through(
        self,
        tasks: int,
        finished: Callable[[int], object],
        work: Callable[[int], None],
        *,
        pause: Callable[[], None],
    ) -> Iterator[int]:
        """Yields tasks 0..tasks-1 as each is done, be it by another process.

        Args:
            finished: whether a task is done. work: does it, for it has been claimed.
            pause: called now and then while others do the last ones.
        """
        missing, seconds = list(range(tasks)), _FIRST_POLL
        while missing:
            others = []
            for task in missing:
                if self._attend(task, finished, work):
                    yield task
                else:
                    others.append(task)
            if missing := others:
                # Should one of them die, its task is free again.
                time.sleep(seconds)
                seconds = min(2 * seconds, _POLL_SECONDS)
                pause()

    def _attend(
        self, task: int, finished: Callable[[int], object], work: Callable[[int], None]
    ) -> bool:
        """Whether the task is done, be it that it is now."""
        if finished(task):
            return True
        if not self.take(task + 1):
            return False
        try:
            if not finished(task):
                work(task)
        finally:
            self.drop(task + 1)
        return True

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *_: Any) -> None:
        os.close(self._file)
