"""Accuracy, agreement and latency of float, fake-quantised and packed networks."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .data.sources import ImageSource

Network = Callable[[torch.Tensor], torch.Tensor]
_TOP = 5


@dataclass(frozen=True)
class Share:
    """`count` of `total` images; `total` may be 0."""

    count: int
    total: int

    @property
    def value(self) -> float:
        """0..1; NaN of no images."""
        return self.count / self.total if self.total else math.nan

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson's score interval (1927), 0..1; of no images, all of it.

        Raises:
            ValueError: confidence outside (0, 1).
        """
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
        if not self.total:
            return 0.0, 1.0
        z2 = statistics.NormalDist().inv_cdf((1 + confidence) / 2) ** 2
        p, n = self.value, self.total
        middle = p + z2 / (2 * n)
        half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n)))
        # Rounding must not push the ends past what they are at no and at all images.
        low = (middle - half) / (1 + z2 / n) if self.count else 0.0
        high = (middle + half) / (1 + z2 / n) if self.count < n else 1.0
        return low, high


@dataclass(frozen=True)
class Scores:
    """How one network does on a data set.

    Args:
        top1, top5: images whose class is the first, among the first five.
        per_class: top-1 of the images of every class.
        agreement: with every network evaluated beside it, by name: same first class.
    """

    top1: Share
    top5: Share
    per_class: tuple[Share, ...]
    agreement: Mapping[str, Share]


@torch.no_grad()
def evaluate(
    networks: Mapping[str, Network],
    source: ImageSource,
    limit: int | None = None,
    batch_size: int = 256,
) -> dict[str, Scores]:
    """Scores of several networks by name, reading every image once.

    Args:
        networks: float32 [N, C, H, W] -> [N, K]; Modules must be in eval mode.
        limit: as in `rows`.

    Raises:
        ValueError: limit < 1, an empty source, or a network that returns something else.
    """
    chosen = rows(source, limit)
    ranked: dict[str, list[torch.Tensor]] = {name: [] for name in networks}
    for start in range(0, len(chosen), batch_size):
        images = source.images(chosen[start : start + batch_size])
        for name, network in networks.items():
            logits = _logits(network, images, name)
            best = logits.topk(min(_TOP, logits.shape[1])).indices
            # Of equal logits arg-max takes the first, as `predictions` does; top-k any.
            first = logits.argmax(1, keepdim=True)
            ranked[name].append(torch.cat([first, best], dim=1))
    labels, whole = source.labels[chosen], {n: torch.cat(parts) for n, parts in ranked.items()}
    sizes = labels.bincount(minlength=source.num_classes).tolist()

    def share(hits: torch.Tensor) -> Share:
        return Share(int(hits.sum()), len(hits))

    scores = {}
    for name, classes in whole.items():
        right = classes[:, 0] == labels
        found = labels[right].bincount(minlength=source.num_classes).tolist()
        scores[name] = Scores(
            top1=share(right),
            top5=share((classes[:, 1:] == labels[:, None]).any(1) | right),
            per_class=tuple(map(Share, found, sizes)),
            agreement={n: share(classes[:, 0] == other[:, 0]) for n, other in whole.items()},
        )
    return scores


def _logits(network: Network, images: torch.Tensor, name: str = "network") -> torch.Tensor:
    logits = network(images)
    if logits.ndim != 2:
        raise ValueError(f"{name}: expected logits [N, K], got {list(logits.shape)}")
    return logits


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

    Raises:
        ValueError: as `evaluate`.
    """
    chosen = rows(source, limit)
    batches = (chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size))
    return torch.cat([_logits(network, source.images(batch)).argmax(1) for batch in batches])


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
