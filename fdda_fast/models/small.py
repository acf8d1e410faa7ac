"""Networks for small images, shipped trained: residual, MobileNetV2-like and RegNetX-like ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def _conv_bn(
    in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    padding = kernel // 2
    conv = nn.Conv2d(in_channels, channels, kernel, stride, padding, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(channels)]


def _shortcut(in_channels: int, channels: int, stride: int) -> nn.Module:
    """Nothing, or a 1x1 convolution and BN where the shape changes."""
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    return nn.Sequential(*_conv_bn(in_channels, channels, 1, stride))


class BasicBlock(nn.Module):
    """conv3x3-BN-ReLU-conv3x3-BN plus a shortcut (He et al., 2016, section 4.2)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(in_channels, channels, 3, stride)
        self.conv2, self.bn2 = _conv_bn(channels, channels, 3)
        self.relu = nn.ReLU()
        self.shortcut = _shortcut(in_channels, channels, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class InvertedResidual(nn.Module):
    """Widening 1x1, depthwise 3x3 and linear 1x1 convolutions (Sandler et al., 2018, section 3).

    The input is added where the shape stays.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        hidden = self.expansion * in_channels
        self.body = nn.Sequential(
            *_conv_bn(in_channels, hidden, 1),
            nn.ReLU6(),
            *_conv_bn(hidden, hidden, 3, stride, groups=hidden),
            nn.ReLU6(),
            *_conv_bn(hidden, channels, 1),
        )
        self.adds_input = stride == 1 and in_channels == channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        return x + y if self.adds_input else y


class XBlock(nn.Module):
    """1x1, grouped 3x3 and 1x1 convolutions of one width plus a shortcut.

    Radosavovic et al., 2020, figure 4, bottleneck ratio 1.
    """

    group_width = 8

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_conv_bn(in_channels, channels, 1),
            nn.ReLU(),
            *_conv_bn(channels, channels, 3, stride, groups=channels // self.group_width),
            nn.ReLU(),
            *_conv_bn(channels, channels, 1),
        )
        self.relu = nn.ReLU()
        self.shortcut = _shortcut(in_channels, channels, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


class SmallNetwork(nn.Module):
    """A 3x3 convolution, three stages of blocks, the mean over pixels, a linear layer.

    Input [N, in_channels, H, W], output logits [N, num_classes].

    Args:
        block: makes a block from (in_channels, channels, stride); the first one of the second
            and of the third stage has stride 2.
        stem: channels and stride of the first convolution.
        widths, depths: channels and number of blocks of every stage.
        head: channels of a 1x1 convolution after the last stage, or None.
        activation: after the first convolution and after the head's.
    """

    def __init__(
        self,
        block: Callable[[int, int, int], nn.Module],
        stem: tuple[int, int],
        widths: tuple[int, int, int],
        depths: tuple[int, int, int],
        head: int | None = None,
        activation: type[nn.Module] = nn.ReLU,
        in_channels: int = 1,
        num_classes: int = 10,
    ) -> None:
        super().__init__()

        def stage(width: int, channels: int, depth: int, stride: int) -> nn.Sequential:
            rest = [block(channels, channels, 1) for _ in range(depth - 1)]
            return nn.Sequential(block(width, channels, stride), *rest)

        self.conv1, self.bn1 = _conv_bn(in_channels, stem[0], 3, stem[1])
        self.relu = activation()
        self.stage1 = stage(stem[0], widths[0], depths[0], 1)
        self.stage2 = stage(widths[0], widths[1], depths[1], 2)
        self.stage3 = stage(widths[1], widths[2], depths[2], 2)
        self.head = nn.Sequential()
        if head is not None:
            self.head = nn.Sequential(*_conv_bn(widths[2], head, 1), activation())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(head or widths[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.head(self.stage3(self.stage2(self.stage1(x))))
        return self.fc(torch.flatten(self.pool(x), 1))


class SmallResNet(SmallNetwork):
    """Stages of `blocks` basic blocks with 16, 32, 64 channels: depth 6 * blocks + 2."""

    def __init__(self, blocks: int, in_channels: int = 1, num_classes: int = 10) -> None:
        widths, depths = (16, 32, 64), (blocks,) * 3
        super().__init__(
            BasicBlock, (16, 1), widths, depths, in_channels=in_channels, num_classes=num_classes
        )


def resnet20(in_channels: int = 1, num_classes: int = 10) -> SmallNetwork:
    return SmallResNet(3, in_channels, num_classes)


def resnet8(in_channels: int = 1, num_classes: int = 10) -> SmallNetwork:
    return SmallResNet(1, in_channels, num_classes)


def mobilenetv2(in_channels: int = 1, num_classes: int = 10) -> SmallNetwork:
    """10 blocks of MobileNetV2's kind, at a quarter of the image's pixels and fewer."""
    return SmallNetwork(
        InvertedResidual,
        stem=(24, 2),
        widths=(24, 40, 64),
        depths=(3, 4, 3),
        head=256,
        activation=nn.ReLU6,
        in_channels=in_channels,
        num_classes=num_classes,
    )


def regnetx(in_channels: int = 1, num_classes: int = 10) -> SmallNetwork:
    """9 blocks of RegNetX's kind, at a quarter of the image's pixels and fewer."""
    return SmallNetwork(
        XBlock,
        stem=(32, 2),
        widths=(40, 80, 160),
        depths=(2, 4, 3),
        in_channels=in_channels,
        num_classes=num_classes,
    )
