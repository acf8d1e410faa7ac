"""Accuracy, agreement and latency of float, fake-quantised and packed networks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from .data.sources import ImageSource

Network = Callable[[torch.Tensor], torch.Tensor]


def rows(source: ImageSource, limit: int | None = None) -> list[int]:
    """All rows of a source, or `limit` evenly spread ones: trees are sorted by class.

    Raises:
        ValueError: limit < 1, or an empty source.
    """
    count = len(source)
    if count == 0:
        raise ValueError(f"{source.name} has no images")
    if limit is None or limit >= count:
        return list(range(count))
    if limit < 1:
        raise ValueError(f"limit must be >= 1, got {limit}")
    return [i * count // limit for i in range(limit)]


@torch.no_grad()
def predictions(
    network: Network, source: ImageSource, limit: int | None = None, batch_size: int = 256
) -> torch.Tensor:
    """Arg-max classes int64 [n] of the images at `rows(source, limit)`.

    Args:
        network: float32 [N, C, H, W] -> [N, K]; a Module must be in eval mode.
    """
    chosen = rows(source, limit)
    batches = (chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size))
    return torch.cat([network(source.images(batch)).argmax(1) for batch in batches])


def accuracy(
    network: Network, source: ImageSource, limit: int | None = None, batch_size: int = 256
) -> float:
    """Top-1 accuracy, 0..1."""
    predicted = predictions(network, source, limit, batch_size)
    return share_equal(predicted, source.labels[rows(source, limit)])


def agreement(
    a: Network,
    b: Network,
    source: ImageSource,
    limit: int | None = None,
    batch_size: int = 256,
) -> float:
    """Share of images, 0..1, that both networks put into the same class."""
    return share_equal(*(predictions(n, source, limit, batch_size) for n in (a, b)))


def share_equal(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a == b).double().mean())


@torch.no_grad()
def latency(
    networks: Mapping[str, Network], x: torch.Tensor, *, rounds: int = 50, warmup: int = 5
) -> dict[str, float]:
    """Median seconds per call.

    The networks take turns, so that a change of clock speed or of load hits all of them alike.
    """
    for network in networks.values():
        for _ in range(warmup):
            network(x)
    times: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(rounds):
        for name, network in networks.items():
            start = time.perf_counter()
            network(x)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}
