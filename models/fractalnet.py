"""FractalNet for CIFAR (Larsson et al., "FractalNet: Ultra-Deep Neural Networks without Residuals", 2017).

Five blocks of columns of 3x3 convolutions; each column is half as deep as the one before, and where columns end
together, their mean goes on. C columns give 5 * 2^(C - 1) convolutions in the deepest path: 20 for three columns, 40
for four. Drop-path, a regularizer of the training, is left out.

The paper says that the channels double from block to block but not where. With a 1x1 convolution in front of each block
that changes their number, three columns have 38.6 M parameters, as the paper prints; where the first convolutions of
the columns do it, 33.7 M (`is_projected=False`). That form has the parameter names of pytorchcv
(`features.unit1.block.blocks.block1.subblock1.conv`, ..., `output`).
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F  # noqa: N812  the name that PyTorch users know
from torch import Tensor, nn

__all__ = ["FractalBlock", "FractalNet", "fractalnet_cifar"]

CHANNELS = (64, 128, 256, 512, 512)


class FractalBlock(nn.Module):
    """Columns of 3x3 convolutions, joined by their mean wherever some end at the same depth.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        columns: At least 1; the deepest has 2^(columns - 1) convolutions.
    """

    def __init__(self, in_channels: int, out_channels: int, columns: int) -> None:
        super().__init__()
        self.columns = columns
        self.blocks = nn.Sequential()
        for depth in range(1, 2 ** (columns - 1) + 1):
            level = nn.Sequential()
            for column in range(columns):
                step = 2**column  # a convolution of this column spans so many levels
                if depth % step == 0:
                    channels = in_channels if depth == step else out_channels
                    level.add_module(f"subblock{column + 1}", _conv_unit(channels, out_channels, 3))
            self.blocks.add_module(f"block{depth}", level)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H, W)."""
        states = [x] * self.columns  # what the next convolution of each column reads
        for level in self.blocks.children():
            ending = [conv(state) for conv, state in zip(level.children(), states, strict=False)]
            states[: len(ending)] = [_mean(ending)] * len(ending)
        return states[0]


class FractalNet(nn.Module):
    """Five fractal blocks, each followed by a 2x2 max pool, and a linear classifier.

    Args:
        columns: Of every block, at least 1.
        num_classes: Outputs.
        width: Factor on all channels, rounded down.
        is_projected: Whether a 1x1 convolution changes the number of channels, or the first ones of the columns.

    Raises:
        ValueError: if there is no column.
    """

    def __init__(
        self, columns: int = 3, num_classes: int = 10, *, width: float = 1.0, is_projected: bool = True
    ) -> None:
        super().__init__()
        if columns < 1:
            raise ValueError(f"columns must be at least 1, got {columns}")
        self.features = nn.Sequential()
        channels = 3
        for number, unscaled in enumerate(CHANNELS, start=1):
            out_channels = int(unscaled * width)
            unit = nn.Sequential()
            if is_projected and channels != out_channels:
                unit.add_module("projection", _conv_unit(channels, out_channels, 1))
                channels = out_channels
            unit.add_module("block", FractalBlock(channels, out_channels, columns))
            unit.add_module("pool", nn.MaxPool2d(2))
            self.features.add_module(f"unit{number}", unit)
            channels = out_channels
        self.output = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (N, num_classes) of normalised RGB images (N, 3, H, W), 32x32 in training, not below."""
        x = F.adaptive_avg_pool2d(self.features(x), 1).flatten(1)
        scores: Tensor = self.output(x)
        return scores


def _conv_unit(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels), activ=nn.ReLU()))


def _mean(tensors: list[Tensor]) -> Tensor:
    """Element-wise, by additions: unlike stacking, they need no fifth dimension, which mobile runtimes lack."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total / len(tensors) if len(tensors) > 1 else total


def fractalnet_cifar(
    num_classes: int = 10, *, width: float = 1.0, columns: int = 3, is_projected: bool = True
) -> FractalNet:
    """FractalNet of five blocks; with three columns 38.6 M parameters, 1.13 GMACs at 32x32."""
    return FractalNet(columns, num_classes, width=width, is_projected=is_projected)
