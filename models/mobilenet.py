"""MobileNets: networks made of depthwise-separable convolutions from the start.

Version 1 follows Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications"
(2017), with the parameter names of pytorchcv (`features.stage1.unit1.dw_conv.conv`, ..., `output`); version 2 follows
Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (2018), with those of torchvision
(`features.1.conv.0.0`, ..., `classifier.1`). Both scale their channels by `width`, alpha in the papers.
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F  # noqa: N812  the name that PyTorch users know
from torch import Tensor, nn

__all__ = ["MobileNetV1", "MobileNetV2", "mobilenet_v1", "mobilenet_v2"]

V1_STAGES = ((64,), (128, 128), (256, 256), (512,) * 6, (1024, 1024))
"""Output channels of the separable units; every stage but the first halves the image."""

V2_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, output channels, blocks and stride of the first block: table 2 of the paper."""


class MobileNetV1(nn.Module):
    """A 3x3 convolution, thirteen depthwise-separable units, and a linear classifier.

    Args:
        num_classes: Outputs.
        width: Factor on all channels, rounded down.
        last_channels: Outputs of the last unit; None takes 1024 times `width`.
        is_separable: False makes every unit one 3x3 convolution, which a scheme may then replace.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        width: float = 1.0,
        last_channels: int | None = None,
        is_separable: bool = True,
    ) -> None:
        super().__init__()
        stages = [[int(unscaled * width) for unscaled in stage] for stage in V1_STAGES]
        stages[-1][-1] = last_channels or stages[-1][-1]
        channels = int(32 * width)
        self.features = nn.Sequential(OrderedDict(init_block=_conv_unit(3, channels, 3, stride=2)))
        for number, stage_channels in enumerate(stages, start=1):
            stage = nn.Sequential()
            for place, out_channels in enumerate(stage_channels):
                stride = 2 if place == 0 and number > 1 else 1
                if is_separable:
                    unit = _separable_unit(channels, out_channels, stride)
                else:
                    unit = _conv_unit(channels, out_channels, 3, stride=stride)
                stage.add_module(f"unit{place + 1}", unit)
                channels = out_channels
            self.features.add_module(f"stage{number}", stage)
        self.output = nn.Linear(channels, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (N, num_classes) of normalised RGB images (N, 3, H, W), 224x224 in training."""
        x = F.adaptive_avg_pool2d(self.features(x), 1).flatten(1)
        scores: Tensor = self.output(x)
        return scores


def _conv_unit(
    in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    conv = nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=False
    )
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels), activ=nn.ReLU()))


def _separable_unit(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    depthwise = _conv_unit(in_channels, in_channels, 3, stride=stride, groups=in_channels)
    return nn.Sequential(OrderedDict(dw_conv=depthwise, pw_conv=_conv_unit(in_channels, out_channels, 1)))


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3 and linear 1x1 projection, added to the input where the shapes agree.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: 1, or 2 to halve the image.
        expansion: Middle channels per input channel; 1 leaves the first convolution out.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        middle = in_channels * expansion
        expand = [] if expansion == 1 else [_conv_relu6(in_channels, middle, 1)]
        self.conv = nn.Sequential(
            *expand,
            _conv_relu6(middle, middle, 3, stride=stride, groups=middle),
            nn.Conv2d(middle, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.is_residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        y: Tensor = self.conv(x)
        return x + y if self.is_residual else y


class MobileNetV2(nn.Module):
    """A 3x3 convolution, seventeen inverted residuals, a 1x1 convolution, and a linear classifier.

    Args:
        num_classes: Outputs.
        width: Factor on all channels, rounded to multiples of 8; below 1 it spares the last convolution.
        stem_stride: Stride of the first convolution; 1 leaves images of 32x32 enough pixels.
    """

    def __init__(self, num_classes: int = 1000, *, width: float = 1.0, stem_stride: int = 2) -> None:
        super().__init__()
        channels = _multiple_of_8(32 * width)
        self.features = nn.Sequential(_conv_relu6(3, channels, 3, stride=stem_stride))
        for expansion, unscaled, blocks, first_stride in V2_STAGES:
            out_channels = _multiple_of_8(unscaled * width)
            for block in range(blocks):
                stride = first_stride if block == 0 else 1
                self.features.append(InvertedResidual(channels, out_channels, stride, expansion))
                channels = out_channels
        last = _multiple_of_8(1280 * max(1.0, width))
        self.features.append(_conv_relu6(channels, last, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, num_classes))
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (N, num_classes) of normalised RGB images (N, 3, H, W), 224x224 in training."""
        x = F.adaptive_avg_pool2d(self.features(x), 1).flatten(1)
        scores: Tensor = self.classifier(x)
        return scores


def _conv_relu6(
    in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    conv = nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=False
    )
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU6())


def _multiple_of_8(channels: float) -> int:
    """The nearest multiple of 8, at least 8, that is not below nine tenths of `channels`."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


def _initialize(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)


def mobilenet_v1(num_classes: int = 1000, *, width: float = 1.0) -> MobileNetV1:
    """MobileNetV1: 4.23 M parameters, 569 MMACs at 224x224."""
    return MobileNetV1(num_classes, width=width)


def mobilenet_v2(num_classes: int = 1000, *, width: float = 1.0, stem_stride: int = 2) -> MobileNetV2:
    """MobileNetV2: 3.50 M parameters, 301 MMACs at 224x224."""
    return MobileNetV2(num_classes, width=width, stem_stride=stem_stride)
