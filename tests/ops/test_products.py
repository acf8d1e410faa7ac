"""Matrix products of the convolutions, against float64."""

import pytest
import torch
from backends import ISAS, QUICK, assert_threads_agree, generator, on_isa
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(ISAS == [None], reason="no compiled operators")


def matrices(count, rows, columns, layout, g):
    """[count, rows, columns]: dense, transposed, or with gaps in every dimension."""
    if layout == "transposed":
        return torch.randn(count, columns, rows, generator=g).transpose(1, 2)
    if layout == "gaps":
        return torch.randn(count, 2 * rows, 3 * columns, generator=g)[:, ::2, 1::3]
    return torch.randn(count, rows, columns, generator=g)


@st.composite
def cases(draw):
    """a, b, out, add"""
    g = generator(draw(st.integers(0, 2**32 - 1)))
    count, rows = draw(st.integers(0, 4)), draw(st.integers(0, 40) | st.just(500))
    depth = draw(st.sampled_from([0, 1, 16, 27, 64, 255, 256, 257, 600, 1025]))
    columns = draw(st.integers(0, 70))
    layouts = st.sampled_from(["dense", "transposed", "gaps"])
    a = matrices(count, rows, depth, draw(layouts), g)
    b = matrices(count, depth, columns, draw(layouts), g)
    return a, b, torch.randn(count, rows, columns, generator=g), draw(st.booleans())


@QUICK
@given(case=cases())
def test_equals_float64(case):
    a, b, out, add = case
    expected = a.double() @ b.double() + (out if add else 0.0)
    for isa in ISAS:
        actual = out.clone()
        with on_isa(isa):
            torch.ops.fdda._products(a, b, actual, add)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=2e-4)


@QUICK
@given(case=cases())
def test_bfloat16(case):
    *matrices, add = case
    for a, b, out in zip(*matrices, strict=True):
        a, b = a.bfloat16(), b.bfloat16()
        out = out if add else out.bfloat16()
        expected = a.double() @ b.double() + (out.double() if add else 0.0)
        # A product's rounding, and that of sums: of their terms' sizes, not of what cancels.
        bound = a.double().abs() @ b.double().abs()
        for isa in ISAS:
            actual = out.clone()
            with on_isa(isa):
                torch.ops.fdda._products(a, b, actual, add)
            error = (actual.double() - expected).abs()
            rounding = 0.0 if add else expected.abs() * 2**-8
            assert (error <= bound * 1e-5 + rounding + 1e-5).all()


SHAPES = [(9, 100, 300, 100), (1, 5000, 27, 64), (1, 27, 5000, 64), (1, 27, 64, 5000)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("isa", ISAS)
def test_threads_do_not_change_the_result(isa, shape, add, dtype):
    count, rows, depth, columns = shape
    g = generator(1)
    a = torch.randn(count, rows, depth, generator=g).to(dtype)
    b = torch.randn(count, depth, columns, generator=g).to(dtype)
    matrices = (a, b) if dtype == torch.float32 else (a[0], b[0])

    def product(a, b):
        out = torch.ones(*a.shape[:-1], columns, dtype=torch.float32 if add else dtype)
        torch.ops.fdda._products(a, b, out, add)
        return out

    with on_isa(isa):
        assert_threads_agree(product, *matrices)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(2, 3, 4, dtype=torch.float64)}, "a: expected"),
        ({"a": torch.zeros(2, 3, 4, dtype=torch.bfloat16)}, "b: expected"),
        ({"a": torch.zeros(4)}, "a: expected one matrix or a batch"),
        ({"b": torch.zeros(3, 4, 5)}, "b: expected as many matrices as a has"),
        ({"b": torch.zeros(2, 5, 5)}, "b: expected 4 rows, got 5"),
        ({"out": torch.zeros(2, 5, 3).transpose(1, 2)}, "out: expected a dense tensor"),
        ({"out": torch.zeros(2, 3, 6)}, "out: expected"),
    ],
)
def test_bad_input(change, message):
    tensors = {"a": torch.zeros(2, 3, 4), "b": torch.zeros(2, 4, 5), "out": torch.zeros(2, 3, 5)}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fdda._products(*(tensors | change).values(), False)
