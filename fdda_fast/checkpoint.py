"""safetensors files with JSON metadata, written atomically and validated when read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .files import written_whole

_METADATA = "fdda_fast"


def save_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes the whole file or none.

    The metadata go into one JSON entry: safetensors orders several entries at random, and equal
    contents should give equal files.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    entry = {_METADATA: json.dumps(dict(metadata), sort_keys=True)}
    with written_whole(path) as temporary:
        # Not save_file, which makes the file readable by its owner alone.
        temporary.write_bytes(save(contiguous, entry))


def load_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Reads a safetensors file.

    Returns:
        Tensors by name, and the metadata (empty where the file has none).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, damaged or truncated.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()  # the file itself cannot be iterated over
            return {name: file.get_tensor(name) for name in names}, _metadata(file.metadata())
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a valid safetensors file ({error})") from error


def _metadata(entries: dict[str, str] | None) -> dict[str, str]:
    """What save_tensors was given, or a foreign file's own entries."""
    entries = entries or {}
    if set(entries) != {_METADATA}:
        return entries
    metadata = json.loads(entries[_METADATA])
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata entry {_METADATA!r} is not an object")
    return {str(name): str(value) for name, value in metadata.items()}
