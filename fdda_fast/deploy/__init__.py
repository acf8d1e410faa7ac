"""Deployment: lowering a fake-quantised network to integers, the packed file, its runtime."""

from .format import load_packed
from .lower import pack
from .runtime import PackedModel

__all__ = ["PackedModel", "load_packed", "pack"]
