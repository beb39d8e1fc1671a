"""VGG-16 (Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", 2015).

Thirteen 3x3 convolutions and three linear layers, which hold nine tenths of the parameters: configuration D, with or
without batch norm. Parameter names are those of torchvision (`features.0`, ..., `classifier.6`).
"""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812  the name that PyTorch users know
from torch import Tensor, nn

__all__ = ["VGG16", "vgg16", "vgg16_bn"]

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Output channels of the convolutions; a 2x2 max pool follows every stage."""


class VGG16(nn.Module):
    """Five stages of 3x3 convolutions, then three linear layers on 7x7 features.

    Args:
        num_classes: Outputs.
        width: Factor on all channels and on the hidden linear layers, rounded down.
        has_batchnorm: Whether a batch norm follows every convolution.
    """

    def __init__(self, num_classes: int = 1000, *, width: float = 1.0, has_batchnorm: bool = False) -> None:
        super().__init__()
        self.features = nn.Sequential()
        channels = 3
        for stage in STAGES:
            for unscaled in stage:
                out_channels = int(unscaled * width)
                self.features.append(nn.Conv2d(channels, out_channels, 3, padding=1))
                if has_batchnorm:
                    self.features.append(nn.BatchNorm2d(out_channels))
                self.features.append(nn.ReLU())
                channels = out_channels
            self.features.append(nn.MaxPool2d(2))
        hidden = int(4096 * width)
        self.classifier = nn.Sequential(
            nn.Linear(channels * 7 * 7, hidden),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(hidden, num_classes),
        )
        for module in self.features:
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (N, num_classes) of normalised RGB images (N, 3, H, W), 224x224 in training."""
        x = F.adaptive_avg_pool2d(self.features(x), 7).flatten(1)
        scores: Tensor = self.classifier(x)
        return scores


def vgg16(num_classes: int = 1000, *, width: float = 1.0) -> VGG16:
    """VGG-16: 138.4 M parameters, 15.47 GMACs at 224x224."""
    return VGG16(num_classes, width=width)


def vgg16_bn(num_classes: int = 1000, *, width: float = 1.0) -> VGG16:
    """VGG-16 with batch norm: 138.4 M parameters, 15.47 GMACs at 224x224."""
    return VGG16(num_classes, width=width, has_batchnorm=True)
