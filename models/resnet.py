"""ResNet-18 for ImageNet (He et al., "Deep Residual Learning for Image Recognition", 2016, table 1).

Parameter names are those of torchvision (`conv1`, `bn1`, `layer1.0.conv1`, `layer2.0.downsample.0`, ..., `fc`).
"""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812  the name that PyTorch users know
from torch import Tensor, nn

__all__ = ["ResNet", "resnet18"]


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
        self.downsample = (
            nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))
            if stride > 1
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """A ResNet of basic blocks.

    Args:
        blocks: Blocks in each of the four stages.
        num_classes: Outputs.
        width: Factor on all channels, rounded down.
    """

    def __init__(self, blocks: tuple[int, int, int, int], num_classes: int = 1000, *, width: float = 1.0) -> None:
        super().__init__()
        first, second, third, fourth = (int(channels * width) for channels in (64, 128, 256, 512))
        self.conv1 = nn.Conv2d(3, first, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = _stage(first, first, 1, blocks[0])
        self.layer2 = _stage(first, second, 2, blocks[1])
        self.layer3 = _stage(second, third, 2, blocks[2])
        self.layer4 = _stage(third, fourth, 2, blocks[3])
        self.fc = nn.Linear(fourth, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (N, num_classes) of normalised RGB images (N, 3, H, W), 224x224 in training."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        scores: Tensor = self.fc(x)
        return scores


def _stage(in_channels: int, out_channels: int, stride: int, blocks: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def resnet18(num_classes: int = 1000, *, width: float = 1.0) -> ResNet:
    """ResNet-18: 11.69 M parameters, 1.814 GMACs at 224x224."""
    return ResNet((2, 2, 2, 2), num_classes, width=width)
