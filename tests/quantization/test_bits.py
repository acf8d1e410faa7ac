"""Bit widths."""

import pytest

from fdda_fast.quantization.bits import Bits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": 1}, r"bits\.weight must be an integer in 2\.\.8, got 1"),
        ({"activation": 9}, r"bits\.activation .* got 9"),
        ({"weight": 4.0}, r"bits\.weight .* got 4\.0"),
        ({"weight": True}, r"bits\.weight .* got True"),
        ({"first_last": 0}, r"bits\.first_last .* got 0"),
        ({"overrides": {"fc": (4,)}}, r"bits\.overrides\['fc'\] must be \(weight bits, input"),
        ({"overrides": {"fc": (1, 4)}}, r"bits\.overrides\['fc'\] \(weight\) .* got 1"),
        ({"overrides": {"fc": (4, 16)}}, r"bits\.overrides\['fc'\] \(input\) .* got 16"),
    ],
)
def test_widths_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        Bits(**arguments)


def test_extremes_are_allowed():
    bits = Bits(2, 8, 8, {"fc": (8, 2)})
    assert (bits.weight, bits.activation, bits.first_last) == (2, 8, 8)


def test_defaults_and_names():
    assert Bits() == Bits(4, 4, None, {})
    assert str(Bits(3, 5)) == "W3A5"
    assert str(Bits(4, 4, 8)) == "W4A4 F8L8"
