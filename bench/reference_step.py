"""The paper's training step, written plainly: the baseline that the benchmarks compare with.

It keeps the structure of the FDDA authors' code: one teacher pass per batch, in which the teacher's
weights get gradients that nobody reads; hooks that reduce every BatchNorm input twice, by mean()
and var(); a quantiser of chained tensor operations. Nothing here uses fdda_fast, so that a test may
hold the library's step against it. What the authors compute and throw away (a student pass before
fine-tuning starts) is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

Stats = tuple[torch.Tensor, torch.Tensor]
"""Mean and variance of a BatchNorm input, each [C]."""


class ConditionalNorm(nn.Module):
    def __init__(self, num_classes: int, channels: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, eps=eps, affine=False)
        self.weight = nn.Embedding(num_classes, channels)
        self.bias = nn.Embedding(num_classes, channels)
        nn.init.ones_(self.weight.weight)
        nn.init.zeros_(self.bias.weight)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:2], 1, 1)
        return self.norm(x) * self.weight(labels).view(shape) + self.bias(labels).view(shape)


class PlainGenerator(nn.Module):
    """Latents [N, 100] and labels to images; sides that 4 divides."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.seed_size = (height // 4, width // 4)
        self.fc = nn.Linear(100, 128 * self.seed_size[0] * self.seed_size[1])
        self.norm0 = ConditionalNorm(num_classes, 128, 1e-5)
        self.conv1 = nn.Conv2d(128, 128, 3, padding=1)
        self.norm1 = ConditionalNorm(num_classes, 128, 0.8)
        self.conv2 = nn.Conv2d(128, 64, 3, padding=1)
        self.norm2 = ConditionalNorm(num_classes, 64, 0.8)
        self.conv3 = nn.Conv2d(64, channels, 3, padding=1)
        self.norm3 = nn.BatchNorm2d(channels, affine=False)

    def forward(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.norm0(self.fc(z).view(-1, 128, *self.seed_size), labels)
        x = self.conv1(F.interpolate(x, scale_factor=2))
        x = F.leaky_relu(self.norm1(x, labels), 0.2)
        x = self.conv2(F.interpolate(x, scale_factor=2))
        x = F.leaky_relu(self.norm2(x, labels), 0.2)
        return self.norm3(torch.tanh(self.conv3(x)))


class _Round(torch.autograd.Function):
    """The paper's quantiser with the identity as its gradient."""

    @staticmethod
    def forward(ctx, x, x_min, x_max, bits):
        levels = 2**bits - 1
        half = 2 ** (bits - 1)
        scale = torch.full_like(x_max, levels) / torch.clamp(x_max - x_min, min=1e-8)
        zero_point = torch.round(scale * x_min) + half
        shape = (-1,) + (1,) * (x.dim() - 1) if scale.dim() else ()
        scale, zero_point = scale.view(shape), zero_point.view(shape)
        q = torch.round(scale * x - zero_point)
        q = torch.clamp(q, -half, half - 1)
        return (q + zero_point) / scale

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None, None


def _rounded_weight(weight: torch.Tensor, bits: int) -> torch.Tensor:
    rows = weight.detach().flatten(1)
    return _Round.apply(weight, rows.min(1).values, rows.max(1).values, bits)


class PlainConv2d(nn.Conv2d):
    bits: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, _rounded_weight(self.weight, self.bits), self.bias)


class PlainLinear(nn.Linear):
    bits: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, _rounded_weight(self.weight, self.bits), self.bias)


class PlainActivation(nn.Module):
    """ReLU, then the quantiser on a range that `observing` moves."""

    def __init__(self, relu: nn.Module, bits: int) -> None:
        super().__init__()
        self.relu, self.bits, self.observing = relu, bits, False
        self.register_buffer("x_min", torch.zeros(()))
        self.register_buffer("x_max", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(x)
        if self.observing:
            self.x_min.mul_(0.9).add_(0.1 * x.detach().min())
            self.x_max.mul_(0.9).add_(0.1 * x.detach().max())
        return _Round.apply(x, self.x_min, self.x_max, self.bits)


def plain_student(teacher: nn.Module, weight_bits: int, activation_bits: int) -> nn.Module:
    """The teacher with every convolution, linear layer and ReLU replaced, in eval mode."""

    def convert(module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU | nn.ReLU6):
                child.inplace = False
                setattr(module, name, PlainActivation(child, activation_bits))
            elif isinstance(child, nn.Conv2d | nn.Linear):
                child.__class__ = PlainConv2d if isinstance(child, nn.Conv2d) else PlainLinear
                child.bits = weight_bits
            else:
                convert(child)

    student = copy.deepcopy(teacher).eval()
    convert(student)
    return student


@dataclass(frozen=True)
class Draws:
    """All that is random in a generator step.

    Args:
        z_a, z_b: latents [N, 100]. labels_a: int64 [N]. class_b: that of all of batch B.
        noise: per BatchNorm layer, standard normal draws for the mean and the variance, each [C].
    """

    z_a: torch.Tensor
    labels_a: torch.Tensor
    z_b: torch.Tensor
    class_b: int
    noise: Sequence[Stats]


class ReferenceStep:
    """Generator, student, their optimisers, and the two kinds of step.

    Args:
        teacher: a CNN with BatchNorm2d; put into eval mode.
        centers: per class and layer, the calibration images' statistics; `centers[k][l]`.
    """

    def __init__(
        self,
        teacher: nn.Module,
        generator: nn.Module,
        student: nn.Module,
        centers: Sequence[Sequence[Stats]],
    ) -> None:
        self.teacher, self.generator, self.student = teacher.eval(), generator.train(), student
        self.centers = centers
        self.norms = [m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]
        self.stats: list[Stats] = []
        for norm in self.norms:
            norm.register_forward_pre_hook(self._read)
        self.generator_optimizer = torch.optim.Adam(
            generator.parameters(), lr=1e-3, betas=(0.5, 0.999)
        )
        self.student_optimizer = torch.optim.SGD(
            student.parameters(), lr=1e-6, momentum=0.9, weight_decay=1e-4, nesterov=True
        )

    def _read(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0]
        self.stats.append((x.mean([0, 2, 3]), x.var([0, 2, 3], unbiased=False)))

    def _distance(self, targets: Sequence[Stats], layers: range) -> torch.Tensor:
        total = torch.zeros(())
        for layer in layers:
            (mean, var), (target_mean, target_var) = self.stats[layer], targets[layer]
            total = total + F.mse_loss(mean, target_mean) + F.mse_loss(var, target_var)
        return total / len(layers)

    def generator_step(self, draws: Draws) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """One step on a class with a reliable center; returns batch A and the losses."""
        self.generator_optimizer.zero_grad()
        count = len(self.norms)
        self.stats = []
        images_a = self.generator(draws.z_a, draws.labels_a)
        ce = F.cross_entropy(self.teacher(images_a), draws.labels_a)
        running = [(norm.running_mean, norm.running_var) for norm in self.norms]
        bns = self._distance(running, range(count))

        self.stats = []
        labels_b = torch.full((len(draws.z_b),), draws.class_b)
        logits_b = self.teacher(self.generator(draws.z_b, labels_b))
        class_ce = F.cross_entropy(logits_b, labels_b)
        center = self.centers[draws.class_b]
        deep = range(max(0, (count + 1) // 2 - 2), count)
        centralized = self._distance(center, deep)
        noisy = [
            (mean + 0.5 * mean_noise, var + 1.0 * var_noise)
            for (mean, var), (mean_noise, var_noise) in zip(center, draws.noise, strict=True)
        ]
        distorted = self._distance(noisy, deep)

        loss = 0.5 * ce + 0.2 * bns + 0.5 * class_ce + 0.9 * distorted + 0.01 * centralized
        loss.backward()
        self.generator_optimizer.step()
        named = {
            "loss": loss, "ce": ce, "bns": bns, "class_ce": class_ce,
            "distorted": distorted, "centralized": centralized,
        }  # fmt: skip
        return images_a.detach(), named

    def student_step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """One fine-tuning step on augmented real and synthetic images; returns the loss."""
        temperature = 20.0
        with torch.no_grad():
            teacher_logits = self.teacher(images)
        logits = self.student(images)
        divergence = F.kl_div(
            F.log_softmax(logits / temperature, 1),
            F.softmax(teacher_logits / temperature, 1),
            reduction="batchmean",
        )
        loss = 20 * temperature**2 * divergence + F.cross_entropy(logits, labels)
        self.student_optimizer.zero_grad()
        loss.backward()
        self.student_optimizer.step()
        return loss
