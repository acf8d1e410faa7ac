"""Files written whole or not at all, and their digests."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; what is written there becomes `path` at the end.

    When the block fails, `path` is as it was and nothing is left behind.
    """
    path = Path(path)
    # Not the process id: processes on several machines may have the same.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(path: Path) -> None:
    """Those of `path` that killed processes left; only while nobody else writes it."""
    for temporary in path.parent.glob(f".{path.name}.*.tmp"):
        temporary.unlink(missing_ok=True)


def digest(path: str | Path) -> str:
    """SHA-256 of a file."""
    hasher = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()
