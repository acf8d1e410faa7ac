"""The frozen teacher: logits and BatchNorm statistics, differentiable in the images alone."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import fx, nn

from . import ops
from .fingerprints import fingerprint
from .graphs import fuse, norm_chains, note_shapes
from .layers import LAYERS, use_layers
from .stem import FrozenStem
from .tracing import trace


class Moments(NamedTuple):
    """Mean and biased variance over images and positions, each [G, C] for G groups of images."""

    mean: torch.Tensor
    var: torch.Tensor


class _Recording:
    """What the fused layers of one teacher share during a forward."""

    def __init__(self, layers: int) -> None:
        self.moments: list[Moments | None] = [None] * layers
        self.groups = torch.zeros(0, dtype=torch.int64)
        self.num_groups = 1


class _FrozenNorm(nn.Module):
    """BatchNorm2d on its running statistics, what follows it, and its input's moments."""

    def __init__(
        self, norm: nn.BatchNorm2d, index: int, relu: bool | float, recording: _Recording
    ) -> None:
        super().__init__()
        channels = norm.num_features
        weight = torch.ones(channels) if norm.weight is None else norm.weight.detach().float()
        bias = torch.zeros(channels) if norm.bias is None else norm.bias.detach().float()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("running_mean", norm.running_mean.float())
        self.register_buffer("running_var", norm.running_var.float())
        self.eps, self.index, self.relu, self.recording = norm.eps, index, relu, recording

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        seen = self.recording
        y, *moments = ops.bn_relu_class_moments(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.eps,
            seen.groups,
            seen.num_groups,
            self.relu,
            residual,
        )
        seen.moments[self.index] = Moments(*moments)
        return y


class FrozenTeacher:
    """A trained network in eval mode whose weights get no gradients, each BatchNorm2d fused.

    A copy: the model that it is made of stays as it is and is not changed.

    Args:
        model: a CNN that torch.fx can trace.
        image_shape: (channels, height, width) of its input.
        dtype: of the convolutions and what is between them; BatchNorm2d computes in float32, and
            logits and moments are float32.

    Attributes:
        running: the teacher's own statistics as [1, C_l] moments, layer by layer.

    Raises:
        ValueError: the model cannot be traced, or has a BatchNorm2d without running statistics.
    """

    def __init__(
        self,
        model: nn.Module,
        image_shape: tuple[int, int, int],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        self._model = model
        graph_module = trace(model)
        note_shapes(graph_module, image_shape)
        self._recording, self.running = _fuse(graph_module)
        use_layers(graph_module, (FrozenStem, *LAYERS))
        for module in graph_module.modules():
            if not isinstance(module, nn.modules.batchnorm._BatchNorm | _FrozenNorm):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(dtype)
        graph_module.to(memory_format=torch.channels_last)
        self._network = graph_module.requires_grad_(False)

    @cached_property
    def fingerprint(self) -> str:
        """Names the model by its weights and statistics; made when it is asked for."""
        return fingerprint({}, self._model)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """images float32 [N, C, H, W] -> logits float32 [N, K]."""
        return self.with_moments(images, images.new_zeros(len(images), dtype=torch.int64), 1)[0]

    def with_moments(
        self, images: torch.Tensor, groups: torch.Tensor, num_groups: int
    ) -> tuple[torch.Tensor, list[Moments]]:
        """Logits, and the moments of every BatchNorm2d's input, group by group, in forward order.

        Args:
            images: float32 [N, C, H, W].
            groups: int64 [N], to which of num_groups groups an image belongs.

        Returns:
            logits float32 [N, K], and per layer (mean, var), each float32 [num_groups, C_l].
        """
        self._recording.groups, self._recording.num_groups = groups, num_groups
        images = images.to(self.dtype, memory_format=torch.channels_last)
        logits = self._network(images).float()
        return logits, list(self._recording.moments)


def _fuse(graph_module: fx.GraphModule) -> tuple[_Recording, list[Moments]]:
    """Fuses every BatchNorm2d with what follows it; what they share, and their statistics."""
    chains = norm_chains(graph_module)
    recording, running = _Recording(len(chains)), []
    for index, chain in enumerate(chains):
        norm = graph_module.get_submodule(chain.norm.target)
        if norm.running_mean is None:
            raise ValueError(f"BatchNorm2d {chain.norm.target!r} has no running statistics")
        fused = _FrozenNorm(norm, index, chain.relu, recording)
        fuse(graph_module, chain, f"frozen_norm_{index}", fused)
        running.append(Moments(fused.running_mean[None], fused.running_var[None]))
    graph_module.delete_all_unused_submodules()
    graph_module.graph.lint()
    graph_module.recompile()
    return recording, running
