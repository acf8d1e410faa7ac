"""Bit widths: one for all layers, first and last apart on request, per-layer overrides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MIN_BITS, MAX_BITS = 2, 8
IMAGE_BITS = 8
RESIDUAL_BITS = 8


def check_bits(name: str, bits: int) -> int:
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"{name} must be an integer in {MIN_BITS}..{MAX_BITS}, got {bits!r}")
    return bits


@dataclass(frozen=True)
class Bits:
    """Bit widths of a network, each 2..8.

    Args:
        weight: of every conv and linear weight.
        activation: of every activation that a layer reads (the input image always has 8, and so
            has, in `full_integer` placement, what a residual addition reads).
        first_last: where given, the width of the first and the last layer's weights, of the
            activations that the first layer produces and of those that the last one consumes
            ("F8L8" is first_last=8; "F4L4" is first_last=None with 4 bits everywhere).
        overrides: layer name -> (weight bits, bits of that layer's input); these win over all
            else. Where layers share an input, it has the widest of their widths.

    Raises:
        ValueError: a width outside 2..8.
    """

    weight: int = 4
    activation: int = 4
    first_last: int | None = None
    overrides: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_bits("bits.weight", self.weight)
        check_bits("bits.activation", self.activation)
        if self.first_last is not None:
            check_bits("bits.first_last", self.first_last)
        for name, pair in self.overrides.items():
            if len(pair) != 2:
                raise ValueError(
                    f"bits.overrides[{name!r}] must be (weight bits, input bits), got {pair!r}"
                )
            for kind, bits in zip(("weight", "input"), pair, strict=True):
                check_bits(f"bits.overrides[{name!r}] ({kind})", bits)

    def __str__(self) -> str:
        ends = "" if self.first_last is None else f" F{self.first_last}L{self.first_last}"
        return f"W{self.weight}A{self.activation}{ends}"
