"""The networks that DARTS found (Liu et al., "DARTS: Differentiable Architecture Search", 2019), as evaluated.

Cells of depthwise-separable and dilated convolutions, pooling and skips, wired as the genotype DARTS_V2 says (the
paper's second order). Parameter names are those of the authors' repository (`stem.0`, `cells.0.preprocess0.op.1`,
`cells.0._ops.0.op.1`, ..., `classifier`). The auxiliary head and path dropout serve training only and are left out:
drop `auxiliary_head.*` from a checkpoint that has it.

For ImageNet the paper prints 574 M multiply-adds; convolutions and classifier have 530 M, as others count too
(github.com/quark0/darts/issues/46, and table 5 of "Optimized Separable Convolution").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812  the name that PyTorch users know
from torch import Tensor, nn

__all__ = ["DARTS_V2", "Genotype", "NetworkCifar", "NetworkImageNet", "darts_cifar", "darts_imagenet"]

OperationName = Literal[
    "sep_conv_3x3", "dil_conv_3x3", "max_pool_3x3", "skip_connect", "dense_conv_3x3", "dense_dil_conv_3x3"
]


@dataclass(frozen=True, slots=True)
class Genotype:
    """The wiring of both kinds of cell.

    States 0 and 1 of a cell are the outputs of the two cells before; each next state is the sum of two operations on
    earlier states, and the states made in the cell are concatenated.

    Attributes:
        normal: (operation, state that it reads), two for each state made in a normal cell.
        reduce: The same for a cell that halves the image.
    """

    normal: tuple[tuple[OperationName, int], ...]
    reduce: tuple[tuple[OperationName, int], ...]

    def as_dense(self) -> Genotype:
        """The same wiring with one dense 3x3 convolution for each separable one, which a scheme may then replace."""
        dense: dict[OperationName, OperationName] = {
            "sep_conv_3x3": "dense_conv_3x3",
            "dil_conv_3x3": "dense_dil_conv_3x3",
        }
        normal, reduce = (
            tuple((dense.get(name, name), source) for name, source in edges) for edges in (self.normal, self.reduce)
        )
        return Genotype(normal, reduce)


DARTS_V2 = Genotype(
    normal=(
        ("sep_conv_3x3", 0),
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 0),
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 1),
        ("skip_connect", 0),
        ("skip_connect", 0),
        ("dil_conv_3x3", 2),
    ),
    reduce=(
        ("max_pool_3x3", 0),
        ("max_pool_3x3", 1),
        ("skip_connect", 2),
        ("max_pool_3x3", 1),
        ("max_pool_3x3", 0),
        ("skip_connect", 2),
        ("skip_connect", 2),
        ("max_pool_3x3", 1),
    ),
)


class ConvStack(nn.Module):
    """Layers one after the other, under the name that the authors gave them.

    Args:
        layers: As they run.
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.op = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to whatever the last layer returns."""
        y: Tensor = self.op(x)
        return y


class FactorizedReduce(nn.Module):
    """Halve the image by two 1x1 convolutions, one on the even pixels, one on the odd pixels.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.conv_1 = nn.Conv2d(in_channels, half, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(in_channels, out_channels - half, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / 2, W / 2); H and W are even."""
        x = F.relu(x)
        y: Tensor = self.bn(torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], dim=1))
        return y


class Cell(nn.Module):
    """A directed graph of operations between two inputs and one output.

    Args:
        genotype: The wiring.
        in_channels: Channels of the outputs of the cell before the last, and of the last.
        channels: Channels of every state.
        is_reduction: Whether this cell halves the image.
        follows_reduction: Whether the cell before did, so that the two inputs differ in size.
    """

    def __init__(
        self,
        genotype: Genotype,
        in_channels: tuple[int, int],
        channels: int,
        *,
        is_reduction: bool,
        follows_reduction: bool,
    ) -> None:
        super().__init__()
        before_last, last = in_channels
        self.preprocess0 = (
            FactorizedReduce(before_last, channels) if follows_reduction else _relu_conv_norm(before_last, channels)
        )
        self.preprocess1 = _relu_conv_norm(last, channels)
        edges = genotype.reduce if is_reduction else genotype.normal
        self._sources = tuple(source for _, source in edges)
        self._ops = nn.ModuleList(
            _operation(name, channels, stride=2 if is_reduction and source < 2 else 1) for name, source in edges
        )
        self.out_channels = len(edges) // 2 * channels

    def forward(self, before_last: Tensor, last: Tensor) -> Tensor:
        """Map the outputs of the two cells before to (N, out_channels, H, W), halved in a reduction cell."""
        states = [self.preprocess0(before_last), self.preprocess1(last)]
        for edge in range(0, len(self._ops), 2):
            left, right = (self._ops[place](states[self._sources[place]]) for place in (edge, edge + 1))
            states.append(left + right)
        return torch.cat(states[2:], dim=1)


def _relu_conv_norm(in_channels: int, out_channels: int) -> ConvStack:
    conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    return ConvStack(nn.ReLU(), conv, nn.BatchNorm2d(out_channels))


def _operation(name: OperationName, channels: int, *, stride: int) -> nn.Module:
    match name:
        case "sep_conv_3x3":
            return ConvStack(*_separable(channels, stride), *_separable(channels, 1))
        case "dil_conv_3x3":
            return ConvStack(*_separable(channels, stride, dilation=2))
        case "dense_conv_3x3":
            return ConvStack(*_dense(channels, stride), *_dense(channels, 1))
        case "dense_dil_conv_3x3":
            return ConvStack(*_dense(channels, stride, dilation=2))
        case "max_pool_3x3":
            return nn.MaxPool2d(3, stride, padding=1)
        case "skip_connect":
            return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels)


def _separable(channels: int, stride: int, *, dilation: int = 1) -> tuple[nn.Module, ...]:
    depthwise = nn.Conv2d(channels, channels, 3, stride, dilation, dilation, groups=channels, bias=False)
    pointwise = nn.Conv2d(channels, channels, 1, bias=False)
    return nn.ReLU(), depthwise, pointwise, nn.BatchNorm2d(channels)


def _dense(channels: int, stride: int, *, dilation: int = 1) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(channels, channels, 3, stride, dilation, dilation, bias=False)
    return nn.ReLU(), conv, nn.BatchNorm2d(channels)


def _cells(
    genotype: Genotype, layers: int, in_channels: tuple[int, int], channels: int, *, follows_reduction: bool
) -> tuple[nn.ModuleList, int]:
    """The cells, with reductions that double the channels at one and two thirds, and the channels of the last one."""
    cells = nn.ModuleList()
    for layer in range(layers):
        is_reduction = layer in (layers // 3, 2 * layers // 3)
        channels *= 2 if is_reduction else 1
        cell = Cell(genotype, in_channels, channels, is_reduction=is_reduction, follows_reduction=follows_reduction)
        cells.append(cell)
        follows_reduction = is_reduction
        in_channels = in_channels[1], cell.out_channels
    return cells, in_channels[1]


class NetworkCifar(nn.Module):
    """The evaluation network for 32x32 images.

    Args:
        channels: Of the states in the first cells.
        num_classes: Outputs.
        layers: Cells.
        genotype: Their wiring.
    """

    def __init__(self, channels: int, num_classes: int = 10, layers: int = 20, genotype: Genotype = DARTS_V2) -> None:
        super().__init__()
        stem_channels = 3 * channels
        self.stem = nn.Sequential(nn.Conv2d(3, stem_channels, 3, padding=1, bias=False), nn.BatchNorm2d(stem_channels))
        self.cells, last = _cells(genotype, layers, (stem_channels, stem_channels), channels, follows_reduction=False)
        self.classifier = nn.Linear(last, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (N, num_classes) of normalised RGB images (N, 3, H, W), 32x32 in training."""
        before_last = last = self.stem(x)
        for cell in self.cells:
            before_last, last = last, cell(before_last, last)
        scores: Tensor = self.classifier(F.adaptive_avg_pool2d(last, 1).flatten(1))
        return scores


class NetworkImageNet(nn.Module):
    """The evaluation network for 224x224 images: two stems cut the image to an eighth first.

    Args:
        channels: Of the states in the first cells.
        num_classes: Outputs.
        layers: Cells.
        genotype: Their wiring.
    """

    def __init__(self, channels: int, num_classes: int = 1000, layers: int = 14, genotype: Genotype = DARTS_V2) -> None:
        super().__init__()
        self.stem0 = nn.Sequential(
            nn.Conv2d(3, channels // 2, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels // 2),
            nn.ReLU(),
            nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.stem1 = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.cells, last = _cells(genotype, layers, (channels, channels), channels, follows_reduction=True)
        self.classifier = nn.Linear(last, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (N, num_classes) of normalised RGB images (N, 3, H, W); H and W are multiples of 32."""
        before_last = self.stem0(x)
        last = self.stem1(before_last)
        for cell in self.cells:
            before_last, last = last, cell(before_last, last)
        scores: Tensor = self.classifier(F.adaptive_avg_pool2d(last, 1).flatten(1))
        return scores


def darts_cifar(num_classes: int = 10, *, width: float = 1.0) -> NetworkCifar:
    """DARTS_V2 for CIFAR, 20 cells of int(36 * width) channels: 3.35 M parameters, 528 MMACs."""
    return NetworkCifar(int(36 * width), num_classes)


def darts_imagenet(num_classes: int = 1000, *, width: float = 1.0) -> NetworkImageNet:
    """DARTS_V2 for ImageNet, 14 cells of int(48 * width) channels: 4.72 M parameters, 530 MMACs."""
    return NetworkImageNet(int(48 * width), num_classes)
