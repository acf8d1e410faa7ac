"""Several processes train one network: who does what, and statistics merged between them.

Every process ("rank") draws what all need and computes its share of the rows; losses on merged
moments are computed by all alike. What then differs from one process with the whole batch is
rounding.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import ops
from .teacher import Moments

# Smaller tensors travel together.
_LARGE = 1 << 20
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Ranks:
    """The processes that work on one thing, and this one's place among them.

    All of them must call the methods that communicate, in the same order.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def world(cls) -> Ranks:
        """All processes of torch.distributed, where it is initialised, else this one alone."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files."""
        return self.rank == 0

    def teams(self, tasks: int) -> tuple[Ranks, list[int]]:
        """Splits the ranks among tasks 0..tasks-1; this one's team, and the tasks it does in turn.

        A task is done by several ranks where there are enough, else a rank does several tasks.
        """
        if tasks >= self.size:
            return Ranks(), list(range(self.rank, tasks, self.size))
        own = Ranks()
        for task in range(tasks):
            members = list(range(task, self.size, tasks))
            group = dist.new_group(members)  # by all ranks, also those outside
            if self.rank in members:
                own = Ranks(members.index(self.rank), len(members), group)
        return own, [self.rank % tasks]

    def some(self, count: int) -> Ranks | None:
        """The first `count` of all processes, where there are more; None to the others."""
        if count >= self.size:
            return self
        group = dist.new_group(list(range(count)))  # by all ranks, also those outside
        return Ranks(self.rank, count, group) if self.rank < count else None

    def share(self, count: int) -> slice:
        """This rank's of `count` rows."""
        return _share(count, self.rank, self.size)

    def gather(self, own: Tensor) -> Tensor:
        """What all ranks have: [size, *own.shape], the shape being that of all.

        The gradient goes to this rank's own part. It is that of a loss that all ranks compute
        alike from the result, not of the sum of their losses.
        """
        if self.size == 1:
            return own[None]
        parts = [
            torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(self.size)
        ]
        dist.all_gather(parts, own.detach().contiguous(), self.group)
        parts[self.rank] = own
        return torch.stack(parts)

    def gather_rows(self, own: Tensor, count: int) -> Tensor:
        """Puts the shares of `count` rows together again: [count, ...], without gradient."""
        if self.size == 1:
            return own
        longest = -(-count // self.size)
        padded = own.new_zeros(longest, *own.shape[1:])
        padded[: len(own)] = own.detach()
        shares = (_share(count, rank, self.size) for rank in range(self.size))
        gathered = self.gather(padded)
        return torch.cat([gathered[r, : s.stop - s.start] for r, s in enumerate(shares)])

    @torch.no_grad()
    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Adds up, in place, what the ranks have; the same bits on all of them."""
        if self.size == 1:
            return
        # By size alone: strides may depend on how many rows a rank has.
        large = [t for t in tensors if t.numel() >= _LARGE]
        small = [t for t in tensors if t.numel() < _LARGE]
        buckets = [t.contiguous() for t in large]
        if small:
            buckets.append(torch.cat([t.reshape(-1) for t in small]))
        works = [dist.all_reduce(b, group=self.group, async_op=True) for b in buckets]
        for work in works:
            work.wait()
        for tensor, bucket in zip(large, buckets, strict=False):
            if bucket is not tensor:
                tensor.copy_(bucket)
        if small:
            for tensor, part in zip(
                small, buckets[-1].split([t.numel() for t in small]), strict=True
            ):
                tensor.copy_(part.view(tensor.shape))

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank; where all have called it, they have waited."""
        if self.size == 1:
            return flag
        found = torch.tensor([flag], dtype=torch.int64)
        dist.all_reduce(found, group=self.group)
        return bool(found)

    def wait(self) -> None:
        """Until all ranks are here."""
        self.any(False)

    def check_batch(self, name: str, images: int) -> None:
        """Raises ValueError unless every rank gets one of that many images."""
        if images < self.size:
            raise ValueError(
                f"{name} must be >= the number of processes ({self.size}), got {images}"
            )


ALONE = Ranks()


def _share(count: int, rank: int, size: int) -> slice:
    return slice(count * rank // size, count * (rank + 1) // size)


@contextmanager
def process_group() -> Iterator[Ranks]:
    """All processes that torchrun has started, connected for the length of the block."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield Ranks.world()
        return
    store, rank, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(_name_of_this_start(store, rank, size), store)
    # No backend named: gloo between CPUs, NCCL between GPUs.
    dist.init_process_group(store=store, rank=rank, world_size=size)
    try:
        yield Ranks.world()
    finally:
        dist.destroy_process_group()


def _name_of_this_start(store: dist.Store, rank: int, size: int) -> str:
    """A name that the first process gives and that all others agree on.

    What a store holds outlives processes that torchrun starts again, whose addresses are others,
    and machines that join do not count restarts as the others do. So a process tells what it was
    told from what was left there by a number of its own, which the first one must have answered.
    """
    own = secrets.token_hex(8)
    if rank == 0:
        store.set("start", own)
        numbers = [store.get(f"{own} {other}").decode() for other in range(1, size)]
        store.set(f"{own} all", " ".join(numbers))
        return own
    while True:
        name = store.get("start").decode()
        store.set(f"{name} {rank}", own)
        if store.check([f"{name} all"]) and own in store.get(f"{name} all").decode().split():
            return name
        time.sleep(_POLL_SECONDS)


def merged(count: Tensor, mean: Tensor, var: Tensor) -> Moments:
    """Moments of the union of P samples, group by group (Chan, Golub and LeVeque 1979).

    Args:
        count: [P, G], their sizes; 0 where there is none.
        mean, var: [P, G, C], their means and biased variances; differentiable.

    Returns:
        mean and biased variance, float64 [G, C]; zeros where all are empty.
    """
    weight = (count.double() / count.sum(0).clamp(min=1))[:, :, None]
    mean = mean.double()
    center = (weight * mean).sum(0)
    return Moments(center, (weight * (var.double() + (mean - center).square())).sum(0))


def merged_over_ranks(
    moments: Sequence[Moments], count: Tensor, ranks: Ranks
) -> tuple[list[Moments], Tensor]:
    """Moments of all ranks' images, in one collective for all layers.

    Args:
        moments: per layer (mean, var) of this rank's images, float32 or float64 [G, C_l].
        count: int64 [G], this rank's images of each group (in float32 below 2^24).

    Returns:
        The same for the images of all ranks, and their number; for the gradient see `Ranks.gather`.
    """
    if ranks.size == 1:
        return list(moments), count
    flat = [values for layer in moments for values in layer]
    dtype = flat[0].dtype
    own = torch.cat([count[:, None].to(dtype), *flat], 1)
    counts, *values = ranks.gather(own).split([1, *(values.shape[1] for values in flat)], 2)
    counts = counts[:, :, 0].long()
    return [
        Moments(*(part.to(dtype) for part in merged(counts, mean, var)))
        for mean, var in zip(values[::2], values[1::2], strict=True)
    ], counts.sum(0)


def norm_tables(
    mean: Tensor, var: Tensor, eps: float, labels: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """What `ops.fixed_bn_lrelu` takes for statistics [C] or [1, C]: float32 [3, N, C]."""
    scale = weight[labels] * (var.double() + eps).rsqrt().float()
    return torch.stack([mean.expand_as(scale), scale, bias[labels]])


def shared_bn_lrelu(
    x: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    negative_slope: float,
    ranks: Ranks,
    convolution: nn.Conv2d | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ops.conditional_bn_lrelu` of one group whose samples are spread over the ranks.

    One collective forward, one backward. Parameters get the gradient of this rank's samples.

    Args:
        x: [N, C, H, W], this rank's samples, at least one.
        labels, weight, bias, eps, negative_slope: see `ops.conditional_bn_lrelu`.
        convolution: applied to the result, as by `ops.conditional_bn_lrelu_conv3x3`.

    Returns:
        y; mean and biased variance of all ranks' samples, float32 [1, C], and the number of
        samples, int64 [1]; these without gradient.
    """
    after = () if convolution is None else (convolution.weight, convolution.bias)
    return _SharedNorm.apply(x, labels, weight, bias, eps, negative_slope, ranks, *after)


class _SharedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, labels, weight, bias, eps, negative_slope, ranks, *after):
        own = torch.zeros_like(labels)
        *moments, count = ops.class_moments(x, own, 1)
        [(mean, var)], count = merged_over_ranks([Moments(*moments)], count, ranks)
        tables = norm_tables(mean, var, eps, labels, weight, bias)
        if after:
            y = ops.fixed_bn_lrelu_conv3x3(x, tables, negative_slope, *after)
        else:
            y = ops.fixed_bn_lrelu(x, tables, negative_slope)
        ctx.save_for_backward(x, labels, weight, bias, mean, var, count, *after[:1])
        ctx.settings, ctx.ranks = ([len(x)], eps, negative_slope), ranks
        ctx.mark_non_differentiable(mean, var, count)
        return y, mean, var, count

    @staticmethod
    def backward(ctx, grad_y, *_):
        *norm, count, conv_weight = (*ctx.saved_tensors, None)[:8]
        x, labels, weight, _, mean, var = norm
        if conv_weight is None:
            backward, after = torch.ops.fdda.conditional_bn_lrelu_backward, ()
        else:
            backward, after = torch.ops.fdda.conditional_bn_lrelu_conv3x3_backward, (conv_weight,)
        grad_x, grad_weight, grad_bias, *grads = backward(grad_y, *norm, *after, *ctx.settings)
        # grad_x is that of statistics of this rank's samples alone. What the statistics pass on is
        # the sum over samples of the gradient, and of its product with the normalised x, per
        # sample: that of all ranks takes the place of this rank's.
        own = torch.stack([(weight * g).sum(0) for g in (grad_bias, grad_weight)]).double()
        everyone = own.clone()
        ctx.ranks.sum_([everyone])
        difference = own - everyone * (len(x) / count)
        inverse_std = (var.double() + ctx.settings[1]).rsqrt()
        grad_mean = (inverse_std * difference[0]).float()
        grad_var = (inverse_std.square() * difference[1] / 2).float()
        grad_x += torch.ops.fdda.class_moments_backward(
            grad_mean, grad_var, x, torch.zeros_like(labels), mean, labels.new_tensor([len(x)])
        )
        return grad_x, None, grad_weight, grad_bias, None, None, None, *grads
