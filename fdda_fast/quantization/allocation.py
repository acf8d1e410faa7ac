"""Mixed precision: the bit widths of least loss under a budget, an exact knapsack."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from .bits import Bits

Widths = tuple[int, int]
Costs = Mapping[str, Mapping[Widths, float]]

# Of loss for cost, relative to the whole range of both, for the bounds.
_MULTIPLIERS = np.concatenate([[0.0], 2.0 ** np.linspace(-20, 20, 161)])
_ROUNDING = 1e-9
_SUM_ROUNDING = 1e-12


class _Options(NamedTuple):
    """What a group of layers can have, none both dearer and worse than another."""

    cost: np.ndarray
    loss: np.ndarray
    widths: list[dict[str, Widths]]


def allocate(loss: Costs, cost: Costs, budget: float, groups: Sequence[Sequence[str]] = ()) -> Bits:
    """The widths with the least sum of losses whose costs sum up to the budget at most.

    Exact: dynamic programming over the groups on the Pareto front of (cost, loss), from which the
    bounds of a Lagrangian relaxation remove what cannot become the best.

    Args:
        loss, cost: layer -> (weight bits, input bits) -> what the layer adds. The same layers and
            widths in both; of a layer that reads the image, whose width is fixed, one input width.
        budget: in the unit of `cost`.
        groups: layers that share an input, and therefore its width; others stand alone.

    Returns:
        Bits with an override for every layer.

    Raises:
        ValueError: loss and cost do not belong together, a figure that is not finite or a cost
            below 0, a group without common input width, or a budget that nothing meets.
    """
    _check(loss, cost, groups)
    alone = set(loss) - set(chain.from_iterable(groups))
    parts = [*map(list, groups), *([name] for name in loss if name in alone)]
    options = [_group_options(part, loss, cost) for part in parts]
    least = sum(o.cost[0] for o in options)
    if not least <= budget:
        raise ValueError(f"budget must be at least {least:g}, the cheapest widths', got {budget:g}")
    overrides: dict[str, Widths] = {}
    for chosen, option in zip(_knapsack(options, budget), options, strict=True):
        overrides |= option.widths[chosen]
    return Bits(overrides={name: overrides[name] for name in loss})


def _check(loss: Costs, cost: Costs, groups: Sequence[Sequence[str]]) -> None:
    if not loss or loss.keys() != cost.keys():
        raise ValueError("loss and cost must be of the same layers, at least one")
    for name in loss:
        if not loss[name] or loss[name].keys() != cost[name].keys():
            raise ValueError(f"{name}: loss and cost must be of the same widths, at least one")
        for kind, values in (("loss", loss[name]), ("cost", cost[name])):
            if not all(math.isfinite(v) for v in values.values()):
                raise ValueError(f"{name}: every {kind} must be finite, got {dict(values)}")
        if min(cost[name].values()) < 0:
            raise ValueError(f"{name}: every cost must be >= 0, got {dict(cost[name])}")
    grouped = list(chain.from_iterable(groups))
    if len(grouped) != len(set(grouped)) or not set(grouped) <= set(loss):
        raise ValueError("groups must name layers of loss, each once at most")


def _pareto(cost: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Indices of what nothing else is at least as good as in both, in order of cost."""
    order = np.lexsort((loss, cost))
    before = np.minimum.accumulate(np.concatenate([[np.inf], loss[order][:-1]]))
    return order[loss[order] < before]


def _group_options(part: Sequence[str], loss: Costs, cost: Costs) -> _Options:
    common = set.intersection(*({a for _, a in loss[name]} for name in part))
    if not common:
        raise ValueError(f"{list(part)}: share an input, but no width of it")
    costs, losses, widths = [], [], []
    for a in sorted(common):
        made = _Options(np.zeros(1), np.zeros(1), [{}])
        for name in part:
            pairs = [pair for pair in loss[name] if pair[1] == a]
            c = np.add.outer(made.cost, [cost[name][pair] for pair in pairs]).ravel()
            v = np.add.outer(made.loss, [loss[name][pair] for pair in pairs]).ravel()
            keep = _pareto(c, v)
            both = (divmod(int(k), len(pairs)) for k in keep)
            made = _Options(c[keep], v[keep], [made.widths[i] | {name: pairs[j]} for i, j in both])
        costs.append(made.cost)
        losses.append(made.loss)
        widths += made.widths
    c, v = np.concatenate(costs), np.concatenate(losses)
    keep = _pareto(c, v)
    return _Options(c[keep], v[keep], [widths[k] for k in keep])


def _knapsack(options: Sequence[_Options], budget: float) -> list[int]:
    """Which option of every group."""
    budget = min(budget, sum(o.cost[-1] for o in options) * (1 + _ROUNDING))  # it may be infinite
    cost_range = sum(o.cost[-1] - o.cost[0] for o in options) or 1.0
    loss_range = sum(o.loss[0] - o.loss[-1] for o in options) or 1.0
    multipliers = _MULTIPLIERS * (loss_range / cost_range)
    # For every multiplier, the least of loss + multiplier * cost, group by group.
    weighted = [o.loss + multipliers[:, None] * o.cost for o in options]
    best = [w.argmin(1) for w in weighted]
    reached = sum(o.cost[b] for o, b in zip(options, best, strict=True)) <= budget
    sums = sum(o.loss[b] for o, b in zip(options, best, strict=True))
    upper = min([sum(o.loss[0] for o in options), *sums[reached]])
    upper += _ROUNDING * (abs(upper) + loss_range)

    # Bounds on what the groups behind the first k add.
    duals = np.cumsum([w.min(1) for w in weighted[::-1]], axis=0)[::-1]
    rest = np.vstack([duals[1:], np.zeros_like(multipliers)])
    least = np.cumsum([o.cost[0] for o in options[::-1]])[::-1]
    least = np.append(least[1:], 0.0) * (1 - _ROUNDING)

    cost, loss, steps = np.zeros(1), np.zeros(1), []
    for k, option in enumerate(options):
        c, v = np.add.outer(cost, option.cost).ravel(), np.add.outer(loss, option.loss).ravel()
        hopeful = np.flatnonzero(c + least[k] <= budget)
        hopeful = hopeful[_pareto(c[hopeful], v[hopeful])]
        bound = np.full(len(hopeful), -np.inf)
        for multiplier, dual in zip(multipliers, rest[k], strict=True):
            # Large multipliers must not make a large figure of a sum's rounding.
            slack = _SUM_ROUNDING * (abs(dual) + multiplier * budget)
            np.maximum(bound, dual - multiplier * (budget - c[hopeful]) - slack, out=bound)
        keep = hopeful[v[hopeful] + bound <= upper]
        steps.append(np.divmod(keep, len(option.cost)))
        cost, loss = c[keep], v[keep]
    state, chosen = int(loss.argmin()), []
    for before, taken in reversed(steps):
        chosen.append(int(taken[state]))
        state = int(before[state])
    return chosen[::-1]
