"""BatchNorm correction: takes the quantisation's shift and scale out of a student's statistics."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from .. import ops
from ..statistics import EPS
from ..teacher import FrozenTeacher, Moments


@torch.no_grad()
def correct_batch_norms(student: nn.Module, teacher: FrozenTeacher, images: torch.Tensor) -> None:
    """Moves the student's running statistics by what quantisation does to its BN inputs.

    With the moments (m_t, v_t) of the teacher's BN input and (m_s, v_s) of the student's on the
    same images, running_var grows by r = v_s / v_t and running_mean becomes
    m_s + sqrt(r) * (running_mean - m_t): the normalised outputs then have the same mean and
    variance as the teacher's, also on images whose moments are not the running ones. Layer by
    layer in one forward: a layer is corrected before its output goes on, so later layers see the
    result. Rounding errors of a weight add up wherever its input has a mean (worst in the first
    layer); this removes them without training.

    Args:
        student: fake-quantised, with the same BatchNorm2d layers in the same order as `teacher`.
        images: float32 [N, C, H, W], all in one batch.
    """
    group = torch.zeros(len(images), dtype=torch.int64)
    expected: Iterator[Moments] = iter(teacher.with_moments(images, group, 1)[1])

    def correct(module: nn.BatchNorm2d, inputs: tuple[torch.Tensor, ...]) -> None:
        mean, var = next(expected)
        got_mean, got_var, _ = ops.class_moments(inputs[0], group, 1)
        ratio = ((got_var + EPS) / (var + EPS))[0]
        module.running_mean.copy_(got_mean[0] + ratio.sqrt() * (module.running_mean - mean[0]))
        module.running_var *= ratio

    layers = [m for m in student.modules() if isinstance(m, nn.BatchNorm2d)]
    handles = [layer.register_forward_pre_hook(correct) for layer in layers]
    try:
        student(images)
    finally:
        for handle in handles:
            handle.remove()
