"""GoogLeNet, that is Inception v1 (Szegedy et al., "Going Deeper with Convolutions", 2015), with batch norm.

Parameter names are those of torchvision (`conv1.conv`, `inception3a.branch2.0.conv`, ..., `fc`), and so is the third
branch: its second convolution is 3x3, as in the checkpoint that torchvision took from TensorFlow, not 5x5 as in the
paper. The auxiliary heads serve training only and are left out: drop `aux1.*` and `aux2.*` from a checkpoint that has
them. torchvision's weights expect images normalised with mean and standard deviation 0.5.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  the name that PyTorch users know
from torch import Tensor, nn

__all__ = ["GoogLeNet", "InceptionBlock", "googlenet"]


class ConvNormRelu(nn.Module):
    """A convolution without bias, batch norm and ReLU.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: An odd number; the image is padded by half of it.
        stride: 1, or 2 to halve the image.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        return F.relu(self.bn(self.conv(x)))


class InceptionBlock(nn.Module):
    """Four branches side by side, their outputs concatenated.

    Args:
        in_channels: Channels of the input.
        pointwise: Channels of the first branch, a 1x1 convolution.
        second: Channels of the second branch: of its 1x1 and of its 3x3 convolution.
        third: The same for the third branch.
        pooled: Channels of the 1x1 convolution after the 3x3 max pool, the fourth branch.
    """

    def __init__(
        self, in_channels: int, pointwise: int, second: tuple[int, int], third: tuple[int, int], pooled: int
    ) -> None:
        super().__init__()
        self.branch1 = ConvNormRelu(in_channels, pointwise, 1)
        self.branch2 = nn.Sequential(ConvNormRelu(in_channels, second[0], 1), ConvNormRelu(*second, 3))
        self.branch3 = nn.Sequential(ConvNormRelu(in_channels, third[0], 1), ConvNormRelu(*third, 3))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), ConvNormRelu(in_channels, pooled, 1))
        self.out_channels = pointwise + second[1] + third[1] + pooled

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H, W)."""
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], dim=1)


class GoogLeNet(nn.Module):
    """A stem of three convolutions, nine Inception blocks, and a linear classifier.

    Args:
        num_classes: Outputs.
        width: Factor on all channels, rounded down.
    """

    def __init__(self, num_classes: int = 1000, *, width: float = 1.0) -> None:
        super().__init__()
        stem, last_of_stem = int(64 * width), int(192 * width)
        self.conv1 = ConvNormRelu(3, stem, 7, stride=2)
        self.conv2 = ConvNormRelu(stem, stem, 1)
        self.conv3 = ConvNormRelu(stem, last_of_stem, 3)

        def block(in_channels: int, *channels: int) -> InceptionBlock:
            one, reduce_2, two, reduce_3, three, pooled = (int(count * width) for count in channels)
            return InceptionBlock(in_channels, one, (reduce_2, two), (reduce_3, three), pooled)

        self.inception3a = block(last_of_stem, 64, 96, 128, 16, 32, 32)
        self.inception3b = block(self.inception3a.out_channels, 128, 128, 192, 32, 96, 64)
        self.inception4a = block(self.inception3b.out_channels, 192, 96, 208, 16, 48, 64)
        self.inception4b = block(self.inception4a.out_channels, 160, 112, 224, 24, 64, 64)
        self.inception4c = block(self.inception4b.out_channels, 128, 128, 256, 24, 64, 64)
        self.inception4d = block(self.inception4c.out_channels, 112, 144, 288, 32, 64, 64)
        self.inception4e = block(self.inception4d.out_channels, 256, 160, 320, 32, 128, 128)
        self.inception5a = block(self.inception4e.out_channels, 256, 160, 320, 32, 128, 128)
        self.inception5b = block(self.inception5a.out_channels, 384, 192, 384, 48, 128, 128)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(self.inception5b.out_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (N, num_classes) of normalised RGB images (N, 3, H, W), 224x224 in training."""
        x = _halve(self.conv1(x), 3)
        x = _halve(self.conv3(self.conv2(x)), 3)
        x = _halve(self.inception3b(self.inception3a(x)), 3)
        x = self.inception4c(self.inception4b(self.inception4a(x)))
        x = _halve(self.inception4e(self.inception4d(x)), 2)
        x = self.inception5b(self.inception5a(x))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        scores: Tensor = self.fc(self.dropout(x))
        return scores


def _halve(x: Tensor, kernel_size: int) -> Tensor:
    return F.max_pool2d(x, kernel_size, stride=2, ceil_mode=True)


def googlenet(num_classes: int = 1000, *, width: float = 1.0) -> GoogLeNet:
    """GoogLeNet: 6.62 M parameters, 1.498 GMACs at 224x224."""
    return GoogLeNet(num_classes, width=width)
