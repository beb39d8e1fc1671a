"""ResNeXt (Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", 2017).

Bottlenecks whose 3x3 convolution is grouped: `groups` is the paper's cardinality C, `group_width` its d. Both networks
have the parameter names of torchvision (`conv1`, `bn1`, `layer1.0.conv1`, `layer1.0.downsample.0`, ..., `fc`).
"""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812  the name that PyTorch users know
from torch import Tensor, nn

__all__ = ["ResNeXt", "resnext29_8x64d", "resnext50_32x4d"]


class Bottleneck(nn.Module):
    """1x1, grouped 3x3 and 1x1 convolution with batch norm, added to their shortcut.

    Args:
        in_channels: Channels of the input.
        middle_channels: Channels of the grouped convolution, a multiple of `groups`.
        out_channels: Channels of the output.
        groups: Groups of the 3x3 convolution.
        stride: 1, or 2 to halve the image.
    """

    def __init__(self, in_channels: int, middle_channels: int, out_channels: int, groups: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, middle_channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle_channels)
        self.conv2 = nn.Conv2d(middle_channels, middle_channels, 3, stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(middle_channels)
        self.conv3 = nn.Conv2d(middle_channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = (
            nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))
            if stride > 1 or in_channels != out_channels
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNeXt(nn.Module):
    """Stages `layer1`, `layer2`, ... of bottlenecks; each but the first halves the image and doubles the channels.

    Args:
        blocks: Bottlenecks per stage.
        groups: Groups of every 3x3 convolution.
        group_width: Channels per group in the first stage.
        num_classes: Outputs.
        width: Factor on all channels, rounded down; in grouped convolutions on the channels per group.
        is_for_small_images: Whether the stem keeps the size of the image (CIFAR) or cuts it to a quarter (ImageNet).
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        groups: int,
        group_width: int,
        num_classes: int,
        *,
        width: float = 1.0,
        is_for_small_images: bool = False,
    ) -> None:
        super().__init__()
        self.is_for_small_images = is_for_small_images
        self.stages = tuple(f"layer{number}" for number in range(1, len(blocks) + 1))
        channels = int(64 * width)
        kernel_size, stride = (3, 1) if is_for_small_images else (7, 2)
        self.conv1 = nn.Conv2d(3, channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        for place, (name, count) in enumerate(zip(self.stages, blocks, strict=True)):
            middle = groups * int(group_width * 2**place * width)
            out_channels = int(256 * 2**place * width)
            stage = nn.Sequential()
            for block in range(count):
                stride = 2 if block == 0 and place > 0 else 1
                stage.append(Bottleneck(channels, middle, out_channels, groups, stride))
                channels = out_channels
            self.add_module(name, stage)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (N, num_classes) of normalised RGB images (N, 3, H, W)."""
        x = F.relu(self.bn1(self.conv1(x)))
        if not self.is_for_small_images:
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        for name in self.stages:
            x = self.get_submodule(name)(x)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        scores: Tensor = self.fc(x)
        return scores


def resnext50_32x4d(num_classes: int = 1000, *, width: float = 1.0) -> ResNeXt:
    """ResNeXt-50 for ImageNet: 25.03 M parameters, 4.23 GMACs at 224x224."""
    return ResNeXt((3, 4, 6, 3), 32, 4, num_classes, width=width)


def resnext29_8x64d(num_classes: int = 10, *, width: float = 1.0) -> ResNeXt:
    """ResNeXt-29 for CIFAR: 34.4 M parameters, 5.39 GMACs at 32x32."""
    return ResNeXt((3, 3, 3), 8, 64, num_classes, width=width, is_for_small_images=True)
