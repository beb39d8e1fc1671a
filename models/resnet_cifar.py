"""ResNets for 32x32 images (He et al., "Deep Residual Learning for Image Recognition", 2016, section 4.2).

Three stages of n basic blocks with 16, 32 and 64 channels, 6n + 2 weighted layers. Where a stage halves the image, the
shortcut has no weights (option A): every second pixel, with the new channels filled with zeros. Parameter names are
those of the widely used checkpoints for CIFAR-10 (`conv1`, `bn1`, `layer1.0.conv1`, ..., `linear`).
"""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812  the name that PyTorch users know
from torch import Tensor, nn

__all__ = ["ResNetCifar", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]


class ZeroPadShortcut(nn.Module):
    """Every second pixel of the input, zero channels added in equal parts before and after (option A).

    Slicing and constant padding are plain operators to every exporter, and need no weights.

    Args:
        added_channels: Channels to add, an even number.
    """

    def __init__(self, added_channels: int) -> None:
        super().__init__()
        self.padding = (0, 0, 0, 0, added_channels // 2, added_channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C + added, ceil(H / 2), ceil(W / 2))."""
        return F.pad(x[:, :, ::2, ::2], self.padding)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to their shortcut.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: 1, or 2 to halve the image.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Identity() if stride == 1 else ZeroPadShortcut(out_channels - in_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class ResNetCifar(nn.Module):
    """A CIFAR ResNet of 6 * `blocks` + 2 weighted layers.

    Args:
        blocks: Basic blocks per stage, n in the paper.
        num_classes: Outputs.
    """

    def __init__(self, blocks: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, 1, blocks)
        self.layer2 = _stage(16, 32, 2, blocks)
        self.layer3 = _stage(32, 64, 2, blocks)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (N, num_classes) of normalised RGB images (N, 3, H, W), 32x32 in training."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        scores: Tensor = self.linear(x)
        return scores


def _stage(in_channels: int, out_channels: int, stride: int, blocks: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def resnet20(num_classes: int = 10) -> ResNetCifar:
    """ResNet-20: 0.27 M parameters, 41 MMACs."""
    return ResNetCifar(3, num_classes)


def resnet32(num_classes: int = 10) -> ResNetCifar:
    """ResNet-32: 0.46 M parameters, 69 MMACs."""
    return ResNetCifar(5, num_classes)


def resnet44(num_classes: int = 10) -> ResNetCifar:
    """ResNet-44: 0.66 M parameters, 97 MMACs."""
    return ResNetCifar(7, num_classes)


def resnet56(num_classes: int = 10) -> ResNetCifar:
    """ResNet-56: 0.85 M parameters, 125 MMACs."""
    return ResNetCifar(9, num_classes)


def resnet110(num_classes: int = 10) -> ResNetCifar:
    """ResNet-110: 1.73 M parameters, 253 MMACs."""
    return ResNetCifar(18, num_classes)
