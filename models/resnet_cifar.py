"""ResNets for small images (He et al., "Deep Residual Learning for Image Recognition", 2016, section 4.2).

Three stages of n basic blocks with 16, 32 and 64 channels, 6n + 2 weighted layers. Where a stage halves the image, the
shortcut has no weights (option A): every second pixel, with the new channels filled with zeros. Option B is a 1x1
convolution with batch norm. Parameter names are those of the widely used checkpoints for CIFAR-10 (`conv1`, `bn1`,
`layer1.0.conv1`, `layer2.0.shortcut.0`, ..., `linear`).

The ImageNet40 networks are those of "Optimized Separable Convolution: Yet Another Efficient Convolution Operator"
(appendix F): ImageNet cut to 32x32, four times the channels, features at 16x16, 8x8 and 4x4. The paper leaves open what
halves the image first and which shortcut there is; its table 7 comes out exactly with a stem of stride 2 and option B.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F  # noqa: N812  the name that PyTorch users know
from torch import Tensor, nn

__all__ = [
    "ResNetCifar",
    "resnet20",
    "resnet20_imagenet40",
    "resnet32",
    "resnet32_imagenet40",
    "resnet44",
    "resnet56",
    "resnet56_imagenet40",
    "resnet110",
    "resnet110_imagenet40",
]

Shortcut = Literal["pad", "projection"]


class ZeroPadShortcut(nn.Module):
    """Every second pixel of the input, zero channels added in equal parts before and after (option A).

    Slicing and constant padding are plain operators to every exporter, and need no weights.

    Args:
        added_channels: Channels to add; of an odd number, the odd one comes last.
    """

    def __init__(self, added_channels: int) -> None:
        super().__init__()
        before = added_channels // 2
        self.padding = (0, 0, 0, 0, before, added_channels - before)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C + added, ceil(H / 2), ceil(W / 2))."""
        return F.pad(x[:, :, ::2, ::2], self.padding)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to their shortcut.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: 1, or 2 to halve the image.
        shortcut: Where the stride is 2, "pad" (option A) or "projection" (option B).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut = "pad") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module
        if stride == 1:
            self.shortcut = nn.Identity()
        elif shortcut == "pad":
            self.shortcut = ZeroPadShortcut(out_channels - in_channels)
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class ResNetCifar(nn.Module):
    """A ResNet of 6 * `blocks` + 2 weighted layers, projections not counted.

    Args:
        blocks: Basic blocks per stage, n in the paper.
        num_classes: Outputs.
        width: Factor on the channels of the three stages, rounded down.
        shortcut: "pad" (option A, no weights) or "projection" (option B).
        base_channels: Channels of the first stage at width 1; the others have twice and four times as many.
        stem_stride: Stride of the first convolution.

    Raises:
        ValueError: if `shortcut` is neither.
    """

    def __init__(
        self,
        blocks: int,
        num_classes: int = 10,
        *,
        width: float = 1.0,
        shortcut: Shortcut = "pad",
        base_channels: int = 16,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        if shortcut not in ("pad", "projection"):
            raise ValueError(f"shortcut must be 'pad' or 'projection', got {shortcut!r}")
        first, second, third = (int(base_channels * scale * width) for scale in (1, 2, 4))
        self.conv1 = nn.Conv2d(3, first, 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = _stage(first, first, 1, blocks, shortcut)
        self.layer2 = _stage(first, second, 2, blocks, shortcut)
        self.layer3 = _stage(second, third, 2, blocks, shortcut)
        self.linear = nn.Linear(third, num_classes)
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


def _stage(in_channels: int, out_channels: int, stride: int, blocks: int, shortcut: Shortcut) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def _imagenet40(blocks: int, num_classes: int, width: float) -> ResNetCifar:
    return ResNetCifar(blocks, num_classes, width=width, shortcut="projection", base_channels=64, stem_stride=2)


def resnet20(num_classes: int = 10, *, width: float = 1.0, shortcut: Shortcut = "pad") -> ResNetCifar:
    """ResNet-20: 0.27 M parameters, 41 MMACs."""
    return ResNetCifar(3, num_classes, width=width, shortcut=shortcut)


def resnet32(num_classes: int = 10, *, width: float = 1.0, shortcut: Shortcut = "pad") -> ResNetCifar:
    """ResNet-32: 0.46 M parameters, 69 MMACs."""
    return ResNetCifar(5, num_classes, width=width, shortcut=shortcut)


def resnet44(num_classes: int = 10, *, width: float = 1.0, shortcut: Shortcut = "pad") -> ResNetCifar:
    """ResNet-44: 0.66 M parameters, 97 MMACs."""
    return ResNetCifar(7, num_classes, width=width, shortcut=shortcut)


def resnet56(num_classes: int = 10, *, width: float = 1.0, shortcut: Shortcut = "pad") -> ResNetCifar:
    """ResNet-56: 0.85 M parameters, 125 MMACs."""
    return ResNetCifar(9, num_classes, width=width, shortcut=shortcut)


def resnet110(num_classes: int = 10, *, width: float = 1.0, shortcut: Shortcut = "pad") -> ResNetCifar:
    """ResNet-110: 1.73 M parameters, 253 MMACs."""
    return ResNetCifar(18, num_classes, width=width, shortcut=shortcut)


def resnet20_imagenet40(num_classes: int = 1000, *, width: float = 1.0) -> ResNetCifar:
    """ResNet-20 for ImageNet40: 4.58 M parameters, 162 MMACs."""
    return _imagenet40(3, num_classes, width)


def resnet32_imagenet40(num_classes: int = 1000, *, width: float = 1.0) -> ResNetCifar:
    """ResNet-32 for ImageNet40: 7.68 M parameters, 275 MMACs."""
    return _imagenet40(5, num_classes, width)


def resnet56_imagenet40(num_classes: int = 1000, *, width: float = 1.0) -> ResNetCifar:
    """ResNet-56 for ImageNet40: 13.88 M parameters, 502 MMACs."""
    return _imagenet40(9, num_classes, width)


def resnet110_imagenet40(num_classes: int = 1000, *, width: float = 1.0) -> ResNetCifar:
    """ResNet-110 for ImageNet40: 27.83 M parameters, 1.012 GMACs."""
    return _imagenet40(18, num_classes, width)
