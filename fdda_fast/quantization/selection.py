"""Selection: which of fine-tuning's students is nearest to the teacher on images that none saw."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from ..distributed import ALONE, Ranks
from ..losses import distillation
from ..teacher import FrozenTeacher


class Selection:
    """Keeps the parameters with which a student differs least from its teacher.

    Args:
        student: whose parameters are compared; it is left as it is.
        patience: looks without a new best that are enough.
        temperature: of the divergence, see `fdda_fast.losses.distillation`.
        ranks: look together, each at its share of every batch.

    Attributes:
        least: the best one's divergence; infinite before the first look. since: looks after it.
        best: its parameters, in the order of the student's; none before the first look.
    """

    def __init__(
        self, student: nn.Module, patience: int, temperature: float, ranks: Ranks = ALONE
    ) -> None:
        self.student, self.patience, self.temperature = student, patience, temperature
        self.ranks = ranks
        self.least, self.since = float("inf"), 0
        self.best: list[torch.Tensor] = []
        self._batches: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def ready(self) -> bool:
        """Whether there are images to look at."""
        return bool(self._batches)

    @property
    def exhausted(self) -> bool:
        return self.since >= self.patience

    @torch.no_grad()
    def hold_out(self, batches: Iterable[torch.Tensor], teacher: FrozenTeacher) -> None:
        """Takes images float32 [N, C, H, W] that are not learned from."""
        own = [images[self.ranks.share(len(images))] for images in batches]
        self._batches = [(images, teacher(images)) for images in own]

    @torch.no_grad()
    def look(self, parameters: Sequence[torch.Tensor]) -> None:
        """Compares the student with these parameters to the best one so far."""
        own = list(self.student.parameters())
        before = [p.detach().clone() for p in own]
        torch._foreach_copy_(own, list(parameters))
        total = torch.zeros((), dtype=torch.float64)
        for images, logits in self._batches:
            divergence = distillation(self.student(images), logits, self.temperature)
            total += len(images) * divergence.item()
        self.ranks.sum_([total])  # all decide alike
        divergence = total.item()
        torch._foreach_copy_(own, before)
        self.since += 1
        if divergence < self.least:  # not where it is NaN
            self.least, self.since = divergence, 0
            self.best = [p.detach().clone() for p in parameters]

    def state_tensors(self) -> dict[str, torch.Tensor]:
        found = torch.tensor([self.least, self.since], dtype=torch.float64)
        return {"found": found, **{f"best.{i}": t for i, t in enumerate(self.best)}}

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.least, since = tensors["found"].tolist()
        self.since = int(since)
        self.best = [tensors[f"best.{i}"].clone() for i in range(len(tensors) - 1)]
