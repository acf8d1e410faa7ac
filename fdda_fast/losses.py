"""The losses of FDDA (Zhong et al., ECCV 2022): L_BNS, L_C, L_D and distillation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .statistics import Moments


def first_deep_layer(num_layers: int) -> int:
    """Index of the first layer in D, the deep layers on which classes are aligned."""
    return max(0, (num_layers + 1) // 2 - 2)


def moment_distance(
    moments: Sequence[Moments], targets: Sequence[Moments], layers: range
) -> torch.Tensor:
    """Mean over layers of MSE(mean) + MSE(var), where MSE is the mean over channels.

    Args:
        moments: per layer (mean, var), each [G, C_l] for G groups of images.
        targets: per layer (mean, var), broadcastable to the same shapes.
        layers: which layers to compare.

    Returns:
        float32 [G], one distance per group.
    """
    total = 0.0
    for layer in layers:
        (mean, var), (target_mean, target_var) = moments[layer], targets[layer]
        total = total + (mean - target_mean).square().mean(1) + (var - target_var).square().mean(1)
    return total / len(layers)


def distorted(
    centers: Sequence[Moments], std: tuple[float, float], rng: torch.Generator, *, clamp: bool
) -> list[Moments]:
    """Centers with Gaussian noise, as L_D aims at; redrawn at every step.

    Args:
        centers: per layer (mean, var), each [G, C_l].
        std: of the noise on the means and on the variances.
        clamp: keep the variances at or above zero (the authors' code does not).
    """
    result = []
    for mean, var in centers:
        noisy_mean = mean + std[0] * torch.randn(mean.shape, generator=rng)
        noisy_var = var + std[1] * torch.randn(var.shape, generator=rng)
        result.append(Moments(noisy_mean, noisy_var.clamp(min=0) if clamp else noisy_var))
    return result


def standard_normal_targets(like: Sequence[Moments], rng: torch.Generator) -> list[Moments]:
    """N(0, 1) draws in place of centers: the authors' target for classes without a reliable one."""
    return [
        Moments(
            torch.randn(mean.shape, generator=rng),
            torch.randn(var.shape, generator=rng),
        )
        for mean, var in like
    ]


def distillation(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float
) -> torch.Tensor:
    """T^2 * KL(softmax(teacher/T) || softmax(student/T)).

    Args:
        student_logits, teacher_logits: [N, K], see `of_two_classes`.

    Returns:
        Scalar, summed over classes and averaged over the batch.
    """
    divergence = F.kl_div(
        F.log_softmax(of_two_classes(student_logits) / temperature, 1),
        F.softmax(of_two_classes(teacher_logits) / temperature, 1),
        reduction="batchmean",
    )
    return temperature**2 * divergence


def of_two_classes(logits: torch.Tensor) -> torch.Tensor:
    """[N, K] as they are, but a single logit [N, 1] as [N, 2], whose softmax is its sigmoid."""
    return F.pad(logits, (0, 1)) if logits.shape[1] == 1 else logits
