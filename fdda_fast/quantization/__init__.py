"""Fake quantisation of traced CNNs and fine-tuning."""

from .bits import Bits

__all__ = ["Bits"]
