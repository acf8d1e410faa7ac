"""Learned rounding of weights: which of its two neighbours on the grid a weight becomes."""

from __future__ import annotations

import torch
from torch import nn

from .modules import QuantConv2d, QuantLinear

# The sigmoid reaches 0 and 1 when it is stretched to (GAMMA, ZETA) and clipped.
ZETA, GAMMA = 1.1, -0.1
_NEAREST = 1e-3  # to the ends of (0, 1) that a weight's fraction may start at


class LearnedRounding(nn.Module):
    """Soft rounding of a layer's weights, learned and then made hard.

    AdaRound (Nagel et al., ICML 2020, equations 21 to 24): the code of a weight is that below it
    plus `h(V) = clip(sigmoid(V) * (ZETA - GAMMA) + GAMMA, 0, 1)`. At first h(V) is the weight's own
    fraction, so that nothing is rounded. The grid is the layer's: from its channels' min to max,
    and weights at these two ends stay there. So hardened weights have the same min and max,
    and the layer, which finds its grid anew at every forward, finds the same.

    Args:
        layer: from `prepare`; not changed before `harden`.

    Attributes:
        variable: V, float32 [O, K].
    """

    def __init__(self, layer: QuantConv2d | QuantLinear) -> None:
        super().__init__()
        weight = layer.weight.detach().flatten(1)
        low, high = weight.aminmax(dim=1, keepdim=True)
        half = 2.0 ** (layer.weight_bits - 1)
        # In the order of `ops.fake_quantize_minmax`.
        self.scale = torch.full_like(low, 2 * half - 1) / (high - low).clamp(min=1e-8)
        self.zero_point = torch.round(self.scale * low) + half
        position = self.scale * weight - self.zero_point
        below = position.floor().clamp(-half, half - 2)
        self.below = torch.where(weight == low, -half, torch.where(weight == high, half - 1, below))
        self.free = (weight != low) & (weight != high)
        fraction = (position - below).clamp(_NEAREST, 1 - _NEAREST)
        self.variable = nn.Parameter(torch.logit((fraction - GAMMA) / (ZETA - GAMMA)))
        self.layer_shape = layer.weight.shape

    def upward(self) -> torch.Tensor:
        """h(V), 0 .. 1."""
        return (torch.sigmoid(self.variable) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def forward(self) -> torch.Tensor:
        """The softly rounded weights, in the layer's shape."""
        return self._weights(self.upward())

    def undecided(self, beta: float) -> torch.Tensor:
        """AdaRound's regulariser, the sum of `1 - |2 h(V) - 1|^beta`: 0 where all h are 0 or 1."""
        distance = (2 * self.upward() - 1).abs().pow(beta)
        return torch.where(self.free, 1 - distance, 0.0).sum()

    @torch.no_grad()
    def harden(self, layer: QuantConv2d | QuantLinear) -> None:
        """Writes the weights, each rounded to the side that it is nearer to, into the layer.

        Where float32 cannot tell a channel's grid points apart, its weights stay as they were.
        """
        hard = self._weights((self.upward() >= 0.5).float())
        before = layer.weight.clone()
        layer.weight.copy_(hard)
        moved = (layer.quantized_weight() - hard).flatten(1).abs() * self.scale
        same = (moved < 0.5).all(dim=1).view(-1, *[1] * (hard.dim() - 1))
        layer.weight.copy_(torch.where(same, hard, before))

    def _weights(self, upward: torch.Tensor) -> torch.Tensor:
        codes = self.below + torch.where(self.free, upward, 0.0)
        return ((codes + self.zero_point) / self.scale).view(self.layer_shape)
