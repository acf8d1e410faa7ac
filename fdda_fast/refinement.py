"""Refinement: images moved, pixel by pixel, until the teacher's statistics are its own again."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .config import RefineConfig
from .distributed import ALONE, Ranks, merged_over_ranks
from .losses import moment_distance
from .statistics import whitened
from .teacher import FrozenTeacher
from .training import (
    Metrics,
    below,
    load_optimizer_tensors,
    optimizer_tensors,
    prefixed,
)

Batch = tuple[torch.Tensor, torch.Tensor]
_BETAS = (0.5, 0.99)  # of Adam


class Refiner:
    """Refines the images of one group after the other, see `refine`.

    Args:
        teacher: differentiable in its images.
        starts: makes the images of a group, by its number: float32 [N, C, H, W] and the teacher's
            classes, int64 [N]; called when its first step needs them.
        limits: smallest and largest value of every channel, float32 [C, 1, 1] each.
        ranks: refine every group together, each its share of the images.

    Attributes:
        images, labels: of the groups that are finished.
    """

    def __init__(
        self,
        teacher: FrozenTeacher,
        starts: Callable[[int], Batch],
        limits: Batch,
        config: RefineConfig,
        ranks: Ranks = ALONE,
    ) -> None:
        self.teacher, self.starts, self.limits = teacher, starts, limits
        self.config, self.ranks = config, ranks
        self.groups = -(-config.images // config.group)
        self.images, self.labels = torch.empty(0), torch.empty(0, dtype=torch.int64)
        self._optimizer: torch.optim.Adam | None = None

    @property
    def steps(self) -> int:
        """In all."""
        return self.groups * self.config.steps

    def step(self, index: int) -> Metrics:
        """Step `index` of all groups' steps."""
        config, ranks = self.config, self.ranks
        group, step = divmod(index, config.steps)
        if self._optimizer is None:
            self._begin(*self.starts(group))
        x, y = self._current, self._classes
        rows = ranks.share(len(y))
        own = x.detach()[rows].requires_grad_()
        logits, moments = self.teacher.with_moments(own, torch.zeros_like(y[rows]), 1)
        moments, _ = merged_over_ranks(moments, torch.tensor([len(own)]), ranks)
        running = self.teacher.running
        seen, aim = whitened(moments, running), whitened(running, running)
        bns = moment_distance(seen, aim, range(len(running))).sum()
        entropy = F.cross_entropy(logits, y[rows], reduction="sum") / len(y)
        (config.bns_weight * bns + config.ce_weight * entropy).backward()
        # Every pixel has its own gradient, and all ranks make the same step.
        x.grad = ranks.gather_rows(own.grad, len(y))
        figures = torch.stack([entropy.detach()])
        ranks.sum_([figures])
        self._optimizer.param_groups[0]["lr"] = config.lr * (1 - step / config.steps)
        self._optimizer.step()
        with torch.no_grad():
            x.clamp_(*self.limits)
        if step + 1 == config.steps:
            self.images = torch.cat([self.images.view(-1, *x.shape[1:]), x.detach()])
            self.labels = torch.cat([self.labels, y])
            self._optimizer = None
        return {"refine_bns": bns.item(), "refine_ce": figures.item()}

    def _begin(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Makes these the group that is refined."""
        self._current, self._classes = nn.Parameter(images.clone()), labels
        self._optimizer = torch.optim.Adam([self._current], self.config.lr, _BETAS, fused=True)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        state = {"images": self.images, "labels": self.labels}
        if self._optimizer is not None:
            state |= {"current": self._current.detach(), "classes": self._classes}
            state |= prefixed("optimizer", optimizer_tensors(self._optimizer))
        return state

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.images, self.labels = tensors["images"], tensors["labels"]
        if "current" in tensors:
            self._begin(tensors["current"], tensors["classes"])
            load_optimizer_tensors(self._optimizer, below("optimizer", tensors))


def limits_of(images: torch.Tensor) -> Batch:
    """Smallest and largest value of every channel of [N, C, H, W], as [C, 1, 1] each."""
    low, high = torch.aminmax(images.transpose(0, 1).flatten(1), dim=1)
    return low.view(-1, 1, 1), high.view(-1, 1, 1)
