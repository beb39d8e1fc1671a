"""DarkNet-19, the classifier behind YOLOv2 (Redmon and Farhadi, "YOLO9000: Better, Faster, Stronger", 2017, table 6).

Eighteen 3x3 and 1x1 convolutions with batch norm and leaky ReLU, and a last one that gives the classes, averaged over
the image. Parameter names are those of pytorchcv (`features.stage1.unit1.conv`, ..., `output.final_conv`).
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F  # noqa: N812  the name that PyTorch users know
from torch import Tensor, nn

__all__ = ["DarkNet19", "darknet19"]

STAGES = (
    ((3, 32),),
    ((3, 64),),
    ((3, 128), (1, 64), (3, 128)),
    ((3, 256), (1, 128), (3, 256)),
    ((3, 512), (1, 256), (3, 512), (1, 256), (3, 512)),
    ((3, 1024), (1, 512), (3, 1024), (1, 512), (3, 1024)),
)
"""Kernel size and output channels of the convolutions; a 2x2 max pool follows every stage but the last."""


class DarkNet19(nn.Module):
    """Six stages of convolutions, and a 1x1 convolution as classifier.

    Args:
        num_classes: Outputs.
        width: Factor on all channels, rounded down.
    """

    def __init__(self, num_classes: int = 1000, *, width: float = 1.0) -> None:
        super().__init__()
        self.features = nn.Sequential()
        channels = 3
        for number, units in enumerate(STAGES, start=1):
            stage = nn.Sequential()
            for place, (kernel_size, unscaled) in enumerate(units, start=1):
                out_channels = int(unscaled * width)
                stage.add_module(f"unit{place}", _conv_unit(channels, out_channels, kernel_size))
                channels = out_channels
            if number < len(STAGES):
                stage.add_module(f"pool{number}", nn.MaxPool2d(2))
            self.features.add_module(f"stage{number}", stage)
        self.output = nn.Sequential(OrderedDict(final_conv=nn.Conv2d(channels, num_classes, 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (N, num_classes) of normalised RGB images (N, 3, H, W), 224x224 or 448x448 in training."""
        return F.adaptive_avg_pool2d(self.output(self.features(x)), 1).flatten(1)


def _conv_unit(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels), activ=nn.LeakyReLU(0.1)))


def darknet19(num_classes: int = 1000, *, width: float = 1.0) -> DarkNet19:
    """DarkNet-19: 20.8 M parameters, 2.79 GMACs at 224x224."""
    return DarkNet19(num_classes, width=width)
