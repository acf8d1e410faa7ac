"""Names for what results depend on, so that they are not taken for those of something else."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn

from .config import to_dict

_SHOWN = 12  # digits that tell two apart


def fingerprint(settings: object, *values: torch.Tensor | nn.Module) -> str:
    """SHA-256 of settings (as `to_dict` takes them), tensors, and modules' state dicts.

    Of tensors dtype, shape and bytes count, in modules their names, too.
    """
    hasher = hashlib.sha256(json.dumps(to_dict(settings), sort_keys=True).encode())
    for value in values:
        named = value.state_dict() if isinstance(value, nn.Module) else {"": value}
        for name, tensor in named.items():
            hasher.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
            flat = tensor.detach().cpu().reshape(-1)
            hasher.update(flat.view(torch.uint8).numpy())
    return hasher.hexdigest()


def check_teacher(what: str, found: str, teacher: str) -> None:
    """Raises ValueError unless `what`, made for the teacher of fingerprint `found`, fits `teacher`.

    An empty one fits all: a generator that was not trained for any.
    """
    if found and found != teacher:
        raise ValueError(
            f"{what}: made with another teacher than this one (fingerprint of its weights "
            f"{found[:_SHOWN]}, of this one's {teacher[:_SHOWN]})"
        )
