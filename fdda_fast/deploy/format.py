"""The .fdda file: a packed model as safetensors with JSON metadata.

Nothing in it is executed: nodes name records of a fixed table, attributes are checked one by one,
tensors are compared with what the attributes ask for. Metadata, all strings:

    format         "fdda-packed"
    version        "1"
    graph          JSON of Graph.to_dict
    preprocessing  JSON of Preprocessing.to_dict, or null
    class_names    JSON list of strings, or null
    sha256         of the four above and of every tensor (name, dtype, shape, bytes)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import load_tensors, save_tensors
from ..data.preprocessing import Preprocessing
from .graph import Graph
from .runtime import PackedModel

FORMAT = "fdda-packed"
VERSION = "1"
_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.float32)
_KEYS = ("format", "version", "graph", "preprocessing", "class_names")


def save_packed(model: PackedModel, path: str | Path) -> None:
    """Writes `model` atomically; the usual extension is .fdda."""
    preprocessing = model.preprocessing and model.preprocessing.to_dict()
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "graph": _dump(model.graph.to_dict()),
        "preprocessing": _dump(preprocessing),
        "class_names": _dump(model.class_names),
    }
    metadata["sha256"] = _checksum(model.tensors, metadata)
    save_tensors(path, model.tensors, metadata)


def load_packed(path: str | Path) -> PackedModel:
    """Reads what `PackedModel.save` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a packed model, of another version, damaged, or inconsistent.
    """
    tensors, metadata = load_tensors(path)
    try:
        return _parse(tensors, metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _parse(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> PackedModel:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"not a packed model (format {metadata.get('format')!r})")
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"written in version {metadata.get('version')!r} of the format, this is {VERSION!r}"
        )
    missing = [key for key in (*_KEYS, "sha256") if key not in metadata]
    if missing:
        raise ValueError(f"metadata without {missing}")
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"tensor {name!r}: no packed model holds {tensor.dtype}")
    if _checksum(tensors, metadata) != metadata["sha256"]:
        raise ValueError("the checksum does not match, the file is damaged")
    preprocessing = _load("preprocessing", metadata)
    class_names = _load("class_names", metadata)
    if class_names is not None and not isinstance(class_names, list):
        raise ValueError(f"class_names: expected a list, got {type(class_names).__name__}")
    return PackedModel(
        Graph.from_dict(_load("graph", metadata)),
        tensors,
        None if preprocessing is None else Preprocessing.from_dict(preprocessing),
        class_names,
    )


def _dump(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _load(key: str, metadata: Mapping[str, str]) -> Any:
    try:
        return json.loads(metadata[key])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key}: not JSON ({error})") from None


def _checksum(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256()

    def add(part: bytes) -> None:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)

    for key in _KEYS:
        add(metadata[key].encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        add(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        add(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
