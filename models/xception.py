"""Xception (Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions", 2017).

Depthwise-separable convolutions with nothing between their two halves, and residual connections. Parameter names are
those of timm's `legacy_xception` (`conv1`, `block1.rep.0.conv1`, `block1.rep.0.pointwise`, `block1.skip`, ..., `fc`).
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F  # noqa: N812  the name that PyTorch users know
from torch import Tensor, nn

__all__ = ["Xception", "XceptionBlock", "xception"]


class SeparableConv(nn.Module):
    """A depthwise 3x3 convolution and a 1x1 convolution.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H, W)."""
        y: Tensor = self.pointwise(self.conv1(x))
        return y


class XceptionBlock(nn.Module):
    """Two or three separable convolutions with batch norm, added to their shortcut.

    Args:
        channels: Of the input and after each separable convolution.
        stride: 2 for a max pool that halves the image, with a 1x1 convolution as shortcut; else 1.
        starts_with_relu: Whether an activation comes before the first convolution.
    """

    def __init__(self, channels: tuple[int, ...], *, stride: int, starts_with_relu: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for in_channels, out_channels in pairwise(channels):
            layers += [nn.ReLU(), SeparableConv(in_channels, out_channels), nn.BatchNorm2d(out_channels)]
        self.rep = nn.Sequential(*layers[0 if starts_with_relu else 1 :])
        self.skip: nn.Conv2d | None = None
        if stride > 1:
            self.rep.append(nn.MaxPool2d(3, stride, padding=1))
            self.skip = nn.Conv2d(channels[0], channels[-1], 1, stride, bias=False)
            self.skipbn = nn.BatchNorm2d(channels[-1])

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels[0], H, W) to (N, channels[-1], ceil(H / stride), ceil(W / stride))."""
        y: Tensor = self.rep(x)
        return y + (x if self.skip is None else self.skipbn(self.skip(x)))


class Xception(nn.Module):
    """Entry flow, eight times the middle flow, exit flow, and a linear classifier.

    Args:
        num_classes: Outputs.
        width: Factor on all channels, rounded down.
    """

    def __init__(self, num_classes: int = 1000, *, width: float = 1.0) -> None:
        super().__init__()
        c32, c64, c128, c256, c728, c1024, c1536, c2048 = (
            int(channels * width) for channels in (32, 64, 128, 256, 728, 1024, 1536, 2048)
        )
        self.conv1 = nn.Conv2d(3, c32, 3, stride=2, bias=False)
        self.bn1 = nn.BatchNorm2d(c32)
        self.conv2 = nn.Conv2d(c32, c64, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(c64)
        blocks = [
            XceptionBlock((c64, c128, c128), stride=2, starts_with_relu=False),
            XceptionBlock((c128, c256, c256), stride=2),
            XceptionBlock((c256, c728, c728), stride=2),
            *(XceptionBlock((c728,) * 4, stride=1) for _ in range(8)),
            XceptionBlock((c728, c728, c1024), stride=2),
        ]
        self.blocks = tuple(f"block{number}" for number in range(1, len(blocks) + 1))
        for name, block in zip(self.blocks, blocks, strict=True):
            self.add_module(name, block)
        self.conv3 = SeparableConv(c1024, c1536)
        self.bn3 = nn.BatchNorm2d(c1536)
        self.conv4 = SeparableConv(c1536, c2048)
        self.bn4 = nn.BatchNorm2d(c2048)
        self.fc = nn.Linear(c2048, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (N, num_classes) of normalised RGB images (N, 3, H, W), 299x299 in training."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        for name in self.blocks:
            x = self.get_submodule(name)(x)
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.relu(self.bn4(self.conv4(x)))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        scores: Tensor = self.fc(x)
        return scores


def xception(num_classes: int = 1000, *, width: float = 1.0) -> Xception:
    """Xception: 22.86 M parameters, 8.36 GMACs at 299x299."""
    return Xception(num_classes, width=width)
