"""VGG-16's convolutions on small images: 64 to 512 channels on 32x32 to 2x2, with one linear layer behind them."""

from __future__ import annotations

from torch import Tensor, nn

from models.vgg import STAGES


class VggLike(nn.Module):
    """Thirteen 3x3 convolutions with batch norm and ReLU, a 2x2 max pool after every stage."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential()
        channels = 3
        for stage in STAGES:
            for out_channels in stage:
                conv = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
                self.features.extend((conv, nn.BatchNorm2d(out_channels), nn.ReLU()))
                channels = out_channels
            self.features.append(nn.MaxPool2d(2))
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (N, num_classes) of (N, 3, 32, 32)."""
        return self.linear(self.features(x).flatten(1))  # type: ignore[no-any-return]


def vgg_like() -> VggLike:
    """With random weights."""
    return VggLike()
