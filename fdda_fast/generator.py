"""The class-conditional generator of FDDA, and sampling from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from . import ops
from .checkpoint import load_tensors, save_tensors
from .distributed import ALONE, Ranks, norm_tables, shared_bn_lrelu
from .seeding import stream

LATENT_DIM = 100
_FORMAT = "fdda-fast generator 1"
_SLOPE = 0.2  # of LeakyReLU
_FINISHED_AT_ONCE = 4  # images at work: a cache has them
_SAMPLE_STREAM = 0
# Latents are drawn for whole chunks of this many.
_SAMPLE_CHUNK = 16


def _values_per_channel(x: torch.Tensor, images: int) -> int:
    values = images * x.shape[2] * x.shape[3]
    if values < 2:
        raise ValueError(f"x: expected more than 1 value per channel, got {list(x.shape)}")
    return values


@torch.no_grad()
def _move_running(norm: nn.BatchNorm2d, count: int, mean: torch.Tensor, var: torch.Tensor) -> None:
    """The running statistics, as `norm` itself moves them; `count` values per channel."""
    norm.running_mean.lerp_(mean[0], norm.momentum)
    norm.running_var.lerp_(var[0] * (count / (count - 1)), norm.momentum)
    norm.num_batches_tracked += 1


def _parameters(convolution: nn.Conv2d | None) -> tuple[torch.Tensor, ...]:
    return () if convolution is None else (convolution.weight, convolution.bias)


@torch.no_grad()
def _tables(
    norm: nn.BatchNorm2d, labels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """What `ops.fixed_bn_lrelu` takes for the running statistics: float32 [3, N, C]."""
    return norm_tables(norm.running_mean, norm.running_var, norm.eps, labels, weight, bias)


@contextmanager
def _made_again(x: torch.Tensor, make: Callable[[], torch.Tensor]) -> Iterator[None]:
    """What autograd would keep x for keeps `make`, and the backward pass calls it."""
    address = x.data_ptr()  # the hooks are kept, too: they must not hold x

    def keep(saved: torch.Tensor) -> torch.Tensor | Callable[[], torch.Tensor]:
        return make if saved.data_ptr() == address else saved

    def made(kept: torch.Tensor | Callable[[], torch.Tensor]) -> torch.Tensor:
        return kept if isinstance(kept, torch.Tensor) else kept()

    with torch.autograd.graph.saved_tensors_hooks(keep, made):
        yield


def _normalize(
    x: torch.Tensor,
    norm: nn.BatchNorm2d,
    labels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    negative_slope: float,
    ranks: Ranks,
    convolution: nn.Conv2d | None = None,
) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
    """Batch norm on the batch's statistics, weight and bias [K, C] by label, LeakyReLU and a
    convolution; and what makes the same again, without the convolution."""
    if ranks.size > 1:
        y, mean, var, images = shared_bn_lrelu(
            x, labels, weight, bias, norm.eps, negative_slope, ranks, convolution
        )
    else:
        images, after = len(x), _parameters(convolution)
        operator = ops.conditional_bn_lrelu_conv3x3 if after else ops.conditional_bn_lrelu
        y, mean, var = operator(x, labels, weight, bias, [len(x)], norm.eps, negative_slope, *after)
    _move_running(norm, _values_per_channel(x, int(images)), mean, var)

    @torch.no_grad()
    def again() -> torch.Tensor:
        tables = norm_tables(mean, var, norm.eps, labels, weight, bias)
        return ops.fixed_bn_lrelu(x, tables, negative_slope)

    return y, again


class ConditionalBatchNorm2d(nn.Module):
    """BatchNorm2d without affine parameters, then a weight and a bias per class."""

    def __init__(self, num_classes: int, channels: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, eps=eps, affine=False)
        self.weight = nn.Embedding(num_classes, channels)
        self.bias = nn.Embedding(num_classes, channels)
        nn.init.ones_(self.weight.weight)
        nn.init.zeros_(self.bias.weight)

    def forward(self, x: torch.Tensor, labels: torch.Tensor, ranks: Ranks = ALONE) -> torch.Tensor:
        """[N, C, H, W], normalised."""
        if not self.training:
            return ops.fixed_bn_lrelu(x, self.tables(labels), 1.0)
        return self.of_batch(x, labels, ranks)[0]

    def of_batch(
        self, x: torch.Tensor, labels: torch.Tensor, ranks: Ranks
    ) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
        """Normalised by the batch's statistics, and what makes the same again."""
        return _normalize(x, self.norm, labels, self.weight.weight, self.bias.weight, 1.0, ranks)

    def of_upsampled(
        self,
        x: torch.Tensor,
        make_x: Callable[[], torch.Tensor],
        labels: torch.Tensor,
        upsampling: nn.Conv2d,
        ranks: Ranks,
        convolution: nn.Conv2d | None = None,
    ) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
        """x up-sampled by 2, convolved by `upsampling`, normalised, LeakyReLU, `convolution`; and
        what makes the same again, without `convolution`.

        The weight's gradient needs x, which is not kept until then: one cheap pass makes it again.
        """
        with _made_again(x, make_x):
            x = ops.upsample_conv3x3(x, *_parameters(upsampling))
        weight, bias = self.weight.weight, self.bias.weight
        return _normalize(x, self.norm, labels, weight, bias, _SLOPE, ranks, convolution)

    def tables(self, labels: torch.Tensor) -> torch.Tensor:
        """What `ops.fixed_bn_lrelu` takes for the running statistics: float32 [3, N, C]."""
        return _tables(self.norm, labels, self.weight.weight, self.bias.weight)


class Generator(nn.Module):
    """Latent vectors and labels in, normalised images out (method: GDFQ, FDDA).

    Args:
        num_classes: K.
        image_shape: (channels, height, width); sides that 4 does not divide are cropped.
        teacher: fingerprint of the teacher that it is trained for; empty: of none.
    """

    def __init__(
        self, num_classes: int, image_shape: tuple[int, int, int], teacher: str = ""
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        if num_classes < 1 or min(image_shape) < 1:
            raise ValueError(
                f"num_classes and image_shape must be positive, got {num_classes}, {image_shape}"
            )
        self.num_classes = num_classes
        self.image_shape = (channels, height, width)
        self.teacher = teacher
        self.seed_size = (-(-height // 4), -(-width // 4))
        self.fc = nn.Linear(LATENT_DIM, 128 * self.seed_size[0] * self.seed_size[1])
        self.norm0 = ConditionalBatchNorm2d(num_classes, 128, eps=1e-5)
        self.conv1 = nn.Conv2d(128, 128, 3, padding=1)
        self.norm1 = ConditionalBatchNorm2d(num_classes, 128, eps=0.8)
        self.conv2 = nn.Conv2d(128, 64, 3, padding=1)
        self.norm2 = ConditionalBatchNorm2d(num_classes, 64, eps=0.8)
        self.conv3 = nn.Conv2d(64, channels, 3, padding=1)
        self.norm3 = nn.BatchNorm2d(channels, affine=False)

    def forward(
        self,
        z: torch.Tensor,
        labels: torch.Tensor,
        dtype: torch.dtype = torch.float32,
        ranks: Ranks = ALONE,
    ) -> torch.Tensor:
        """Images of latent vectors and labels.

        Args:
            z: float32 [N, 100]. labels: int64 [N].
            dtype: that of the activations; parameters and statistics are float32.
            ranks: share one batch in train mode, of which z and labels are this rank's part (at
                least one image): batch statistics are those of the whole.

        Returns:
            [N, C, H, W] of `dtype`, channels_last.
        """
        x = ops.linear_to_maps(z, self.fc.weight, self.fc.bias, self.seed_size, dtype)
        x = self._trained(x, labels, ranks) if self.training else self._at_work(x, labels)
        return x[:, :, : self.image_shape[1], : self.image_shape[2]]

    def _trained(self, x: torch.Tensor, labels: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        """Images of the first maps [N, 128, *seed_size], by the batch's statistics."""
        x, again = self.norm0.of_batch(x, labels, ranks)
        x, again = self.norm1.of_upsampled(x, again, labels, self.conv1, ranks)
        x, _ = self.norm2.of_upsampled(x, again, labels, self.conv2, ranks, self.conv3)
        return _normalize(torch.tanh(x), self.norm3, *self._no_affine(labels), 1.0, ranks)[0]

    @torch.no_grad()
    def _at_work(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The same by the running statistics."""
        norms = self.norm0, self.norm1, self.norm2
        tables, *convolved = (norm.tables(labels) for norm in norms)
        first, last = (
            (*_parameters(convolution), after)
            for convolution, after in zip((self.conv1, self.conv2), convolved, strict=True)
        )
        y = ops.upsample_twice_conv3x3(x, tables, first, last, _SLOPE, *_parameters(self.conv3))
        tables = _tables(self.norm3, *self._no_affine(labels))
        parts = y.split(_FINISHED_AT_ONCE), tables.split(_FINISHED_AT_ONCE, 1)
        for part, own in zip(*parts, strict=True):
            part.copy_(ops.fixed_bn_lrelu(part.tanh_(), own, 1.0))
        return y

    def _no_affine(self, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Labels, weight and bias that change nothing."""
        one = self.conv3.bias.new_ones(1, len(self.conv3.bias))
        return torch.zeros_like(labels), one, torch.zeros_like(one)

    def save(self, path: str | Path) -> None:
        """Writes weights, shape and the teacher's fingerprint as safetensors."""
        shape = json.dumps({"num_classes": self.num_classes, "image_shape": self.image_shape})
        metadata = {"format": _FORMAT, "shape": shape, "teacher": self.teacher}
        save_tensors(path, self.state_dict(), metadata)

    @classmethod
    def load(cls, path: str | Path) -> Generator:
        """Reads what `save` wrote; the generator is in eval mode.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a generator file, or weights that do not fit its stated shape.
        """
        tensors, metadata = load_tensors(path)
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{path}: not a generator file ({_FORMAT!r})")
        try:
            shape = json.loads(metadata["shape"])
            image_shape = tuple(int(v) for v in shape["image_shape"])
            generator = cls(int(shape["num_classes"]), image_shape, metadata["teacher"])
            generator.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: damaged generator file ({error})") from error
        return generator.eval()


def latents(count: int, rng: torch.Generator) -> torch.Tensor:
    """float32 [count, 100] standard normal draws."""
    return torch.randn(count, LATENT_DIM, generator=rng)


def _sample_latents(seed: int, first: int, count: int) -> torch.Tensor:
    """Those of images first, first + 1, ..., by chunks: float32 [count, 100]."""
    chunks = range(first // _SAMPLE_CHUNK, (first + count) // _SAMPLE_CHUNK)
    return torch.cat([latents(_SAMPLE_CHUNK, stream(seed, _SAMPLE_STREAM, c)) for c in chunks])


@torch.no_grad()
def sample(
    generator: Generator,
    labels: torch.Tensor,
    seed: int = 0,
    *,
    first: int = 0,
    batch: int = _SAMPLE_CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws one image per label; image i depends on (generator, seed, first + i, label) only.

    Images are always computed in whole batches, so that the bits of image i do not depend on how
    many are asked for (libraries pick their algorithm by batch size).

    Args:
        generator: run in eval mode, its mode is restored.
        labels: int64 [N] in 0..num_classes-1.
        seed: >= 0.
        first: index of the first image within the seed's sequence, a multiple of `batch`.
        batch: images computed at once, a multiple of 16; another one gives other last bits.

    Returns:
        images float32 [N, C, H, W] and the labels.

    Raises:
        ValueError: a label out of range, batch not a multiple of 16, or first not one of batch.
    """
    _check_labels(generator, labels)
    if batch < 1 or batch % _SAMPLE_CHUNK:
        raise ValueError(f"batch must be a multiple of {_SAMPLE_CHUNK} and > 0, got {batch}")
    if first < 0 or first % batch:
        raise ValueError(f"first must be a multiple of {batch} and >= 0, got {first}")
    images = torch.empty(len(labels), *generator.image_shape)
    with _in_eval_mode(generator):
        for start in range(0, len(labels), batch):
            wanted = labels[start : start + batch]
            padded = F.pad(wanted, (0, batch - len(wanted)))
            z = _sample_latents(seed, first + start, batch)
            images[start : start + len(wanted)] = generator(z, padded)[: len(wanted)]
    return images, labels


@torch.no_grad()
def sample_together(
    generator: Generator, labels: torch.Tensor, seed: int, ranks: Ranks
) -> torch.Tensor:
    """The images that `sample` draws, but for rounding: every rank computes its share.

    Args:
        labels, seed: see `sample`; the same on all ranks.

    Returns:
        float32 [N, C, H, W], on every rank.
    """
    if ranks.size == 1:
        return sample(generator, labels, seed)[0]
    _check_labels(generator, labels)
    rows = ranks.share(len(labels))
    own = torch.empty(0, *generator.image_shape)
    if rows.start < rows.stop:
        z = _sample_latents(seed, 0, -(-len(labels) // _SAMPLE_CHUNK) * _SAMPLE_CHUNK)
        with _in_eval_mode(generator):
            own = generator(z[: len(labels)][rows], labels[rows])
    return ranks.gather_rows(own, len(labels))


def _check_labels(generator: Generator, labels: torch.Tensor) -> None:
    if labels.ndim != 1 or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 [N], got {labels.dtype} {list(labels.shape)}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < generator.num_classes:
        raise ValueError(
            f"labels must lie in 0..{generator.num_classes - 1}, "
            f"got {int(labels.min())}..{int(labels.max())}"
        )


@contextmanager
def _in_eval_mode(generator: Generator) -> Iterator[None]:
    was_training = generator.training
    generator.eval()
    try:
        yield
    finally:
        generator.train(was_training)
