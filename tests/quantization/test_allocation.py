"""The knapsack against all possibilities, and what it refuses."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdda_fast.quantization.allocation import allocate

WIDTHS = [(w, a) for w in (2, 4) for a in (3, 8)]
# Sums of eighths are exact in any order.
FIGURES = st.one_of(st.integers(0, 9), st.integers(0, 10**6)).map(lambda n: n / 8)


def total(figures, overrides):
    return sum(figures[name][pair] for name, pair in overrides.items())


def best_of_all(loss, cost, budget, groups):
    """The least loss under the budget, None where nothing meets it."""
    losses = []
    for pairs in itertools.product(*(loss[name] for name in loss)):
        chosen = dict(zip(loss, pairs, strict=True))
        together = all(len({chosen[name][1] for name in group}) == 1 for group in groups)
        if together and total(cost, chosen) <= budget:
            losses.append(total(loss, chosen))
    return min(losses, default=None)


@st.composite
def problems(draw):
    names = [f"layer{i}" for i in range(draw(st.integers(1, 5)))]
    loss, cost = ({n: {w: draw(FIGURES) for w in WIDTHS} for n in names} for _ in range(2))
    groups = [names[:2]] if len(names) > 1 and draw(st.booleans()) else []
    least, most = (sum(f(c.values()) for c in cost.values()) for f in (min, max))
    budget = least + draw(st.integers(-1, 11)) * (most - least) // 10
    return loss, cost, budget, groups


@settings(max_examples=150, deadline=None)
@given(problems())
def test_as_good_as_the_best_of_all(problem):
    loss, cost, budget, groups = problem
    best = best_of_all(*problem)
    if best is None:
        with pytest.raises(ValueError, match="budget must be at least"):
            allocate(*problem)
        return
    bits = allocate(*problem)
    assert total(loss, bits.overrides) <= best * (1 + 1e-9)
    assert total(cost, bits.overrides) <= budget
    for group in groups:
        assert len({bits.overrides[name][1] for name in group}) == 1


def test_only_one_possibility_and_no_limit():
    loss = {name: dict.fromkeys(WIDTHS, 0.0) for name in "abc"}
    cost = {n: dict.fromkeys(WIDTHS, c) for n, c in (("a", 0.0), ("b", 0.125), ("c", 11.75))}
    assert allocate(loss, cost, 11.875).overrides.keys() == loss.keys()
    assert allocate(loss, cost, float("inf")).overrides.keys() == loss.keys()


def test_many_layers():
    """More states than memory, were those not removed that cannot become the best."""
    names = [f"layer{i}" for i in range(60)]
    size = {n: 1 + (37 * i) % 61 for i, n in enumerate(names)}
    gain = {n: 1 + (23 * i) % 59 for i, n in enumerate(names)}
    loss = {n: {(w, w): gain[n] / 4.0**w for w in range(2, 9)} for n in names}
    cost = {n: {(w, w): float(size[n] * w) for w in range(2, 9)} for n in names}
    budget = 4.0 * sum(size.values())
    bits = allocate(loss, cost, budget)
    uniform = dict.fromkeys(names, (4, 4))
    assert total(cost, bits.overrides) <= budget
    assert total(loss, bits.overrides) < total(loss, uniform)
    assert list(bits.overrides) == names


ONE = {"a": {(4, 4): 1.0}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ONE, {}, 1), "of the same layers"),
        ((ONE, {"a": {(2, 2): 1.0}}, 1), "a: loss and cost must be of the same widths"),
        ((ONE, {"a": {(4, 4): float("nan")}}, 1), "every cost must be finite"),
        ((ONE, {"a": {(4, 4): -1.0}}, 1), "every cost must be >= 0"),
        ((ONE, ONE, 0.5), "budget must be at least 1"),
        ((ONE, ONE, float("nan")), "budget must be at least 1"),
        ((ONE, ONE, 1, [["a", "a"]]), "each once at most"),
        ((ONE, ONE, 1, [["b"]]), "each once at most"),
        ((*2 * ({**ONE, "b": {(4, 2): 1.0}},), 9, [["a", "b"]]), "share an input, but no width"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        allocate(*arguments)
