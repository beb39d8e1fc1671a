"""Parameters and multiply-accumulates of the reference networks against what others print.

MACs are those of convolutions and linear layers for one image; biases, batch norms, activations and pooling add none.
Parameters include batch norms and biases unless a test says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from sepdeploy.analyze.trace import trace_network
from sepdeploy.models import (
    darknet,
    darts,
    fractalnet,
    inception,
    mobilenet,
    resnet,
    resnet_cifar,
    resnext,
    vgg,
    xception,
)


@dataclass(frozen=True, slots=True)
class Published:
    """What a source prints of a network; text keeps the precision.

    Attributes:
        factory: Builds the network.
        size: Pixels of a side of the image.
        params: Their number, or millions if it has a point.
        macs_g: Billions of multiply-accumulates; None if nobody prints them.
        source: Where to find it.
        options: Arguments of the factory.
    """

    factory: Callable[..., nn.Module]
    size: int
    params: str
    macs_g: str | None
    source: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.factory.__name__, *map(str, self.options.values())])


OSEP = "Optimized Separable Convolution"
PUBLISHED = [
    Published(resnet_cifar.resnet20, 32, "0.270", "0.04055", f"{OSEP}, table 6"),
    Published(resnet_cifar.resnet32, 32, "0.464", "0.06886", f"{OSEP}, table 6"),
    Published(resnet_cifar.resnet56, 32, "0.853", "0.12548", f"{OSEP}, table 6"),
    Published(resnet_cifar.resnet110, 32, "1.728", "0.25289", f"{OSEP}, table 6"),
    Published(resnet_cifar.resnet20_imagenet40, 32, "4.58", "0.162", f"{OSEP}, table 7"),
    Published(resnet_cifar.resnet32_imagenet40, 32, "7.68", "0.275", f"{OSEP}, table 7"),
    Published(resnet_cifar.resnet56_imagenet40, 32, "13.88", "0.502", f"{OSEP}, table 7"),
    Published(resnet_cifar.resnet110_imagenet40, 32, "27.83", "1.012", f"{OSEP}, table 7"),
    Published(mobilenet.mobilenet_v1, 224, "4231976", "0.569", "pytorchcv; MobileNets paper, table 6"),
    Published(mobilenet.mobilenet_v1, 224, "2585560", "0.325", "pytorchcv; the paper, table 6", {"width": 0.75}),
    Published(mobilenet.mobilenet_v1, 224, "1331592", "0.149", "pytorchcv; the paper, table 6", {"width": 0.5}),
    Published(mobilenet.mobilenet_v1, 224, "470072", "0.041", "pytorchcv; the paper, table 6", {"width": 0.25}),
    Published(mobilenet.mobilenet_v2, 224, "3504872", "0.301", "torchvision, MobileNet_V2_Weights"),
    Published(darts.darts_cifar, 32, "3.35", "0.528", f"{OSEP}, table 3; the DARTS paper prints 3.3 M"),
    Published(darts.darts_imagenet, 224, "4718752", "0.530", f"pytorchcv; {OSEP}, table 5"),
    Published(resnet.resnet18, 224, "11689512", "1.814", "torchvision, ResNet18_Weights"),
    Published(vgg.vgg16, 224, "138357544", "15.47", "torchvision, VGG16_Weights"),
    Published(vgg.vgg16_bn, 224, "138365992", "15.47", "torchvision, VGG16_BN_Weights"),
    Published(resnext.resnext50_32x4d, 224, "25028904", "4.23", "torchvision, ResNeXt50_32X4D_Weights"),
    Published(resnext.resnext29_8x64d, 32, "34.4", None, "ResNeXt paper, table 7"),
    Published(inception.googlenet, 224, "6624904", "1.498", "torchvision, GoogLeNet_Weights"),
    Published(xception.xception, 299, "22855952", "8.4", "Xception paper, table 3; pytorchcv"),
    Published(darknet.darknet19, 224, "20842376", None, "pytorchcv"),
    Published(fractalnet.fractalnet_cifar, 32, "38.6", None, "FractalNet paper, table 1"),
    Published(fractalnet.fractalnet_cifar, 32, "33724618", None, "pytorchcv", {"is_projected": False}),
]


def build(factory: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """The network in eval mode with all-zero weights: far faster than to draw them."""
    with torch.device("meta"):
        model = factory(**options)
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.zero_()
    return model.eval()


def params_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def macs_of(model: nn.Module, size: int) -> int:
    return trace_network(model, torch.zeros(1, 3, size, size)).total_macs


def is_printed_as(text: str, value: float) -> bool:
    """Whether `value` is `text` when rounded, or cut off, to as many decimals: sources do either."""
    decimals = len(text.partition(".")[2])
    cut_off = math.floor(value * 10**decimals) / 10**decimals
    return text in (f"{value:.{decimals}f}", f"{cut_off:.{decimals}f}")


@pytest.mark.parametrize("published", PUBLISHED, ids=str)
def test_params_and_macs_are_those_published(published: Published) -> None:
    model = build(published.factory, **published.options)

    params = params_of(model)
    assert is_printed_as(published.params, params / 1e6 if "." in published.params else params)
    if published.macs_g is not None:
        assert is_printed_as(published.macs_g, macs_of(model, published.size) / 1e9)


@pytest.mark.parametrize(
    ("width", "macs_m", "params_m"),
    [
        (0.35, "59", "1.66"),
        (0.5, "97", "1.95"),
        (0.75, "209", "2.61"),
        (1.0, "300", "3.47"),
        (1.3, "509", "5.34"),
        (1.4, "582", "6.06"),
    ],
)
def test_mobilenet_v2_of_other_widths_is_that_of_the_authors(width: float, macs_m: str, params_m: str) -> None:
    """The table of TensorFlow's research/slim/nets/mobilenet, which leaves batch norms out of the parameters."""
    model = build(mobilenet.mobilenet_v2, width=width)
    norms = sum(params_of(module) for module in model.modules() if isinstance(module, nn.BatchNorm2d))

    assert is_printed_as(macs_m, macs_of(model, 224) / 1e6)
    assert is_printed_as(params_m, (params_of(model) - norms) / 1e6)


def test_darknet19_takes_as_many_operations_as_published() -> None:
    """YOLO9000, section 3, prints 5.58 billion operations, where one multiply-accumulate is two."""
    assert is_printed_as("5.58", 2 * macs_of(build(darknet.darknet19), 224) / 1e9)


@pytest.mark.parametrize(("groups", "group_width", "params"), [(32, 4, 4775754), (16, 64, 68155210)])
def test_resnext29_of_other_cardinalities_has_the_params_of_pytorchcv(
    groups: int, group_width: int, params: int
) -> None:
    with torch.device("meta"):
        model = resnext.ResNeXt((3, 3, 3), groups, group_width, 10, is_for_small_images=True)

    assert params_of(model) == params


def test_resnext29_macs_follow_from_its_table() -> None:
    """Nobody prints them: stem, nine bottlenecks of three convolutions, three projections, classifier."""
    stem, classifier = 27 * 64 * 32**2, 1024 * 10
    stages = 0
    for place, in_channels in enumerate((64, 256, 512)):
        middle, out_channels, pixels = 512 * 2**place, 256 * 2**place, (32 >> place) ** 2
        grouped = 9 * middle * middle // 8 * pixels
        first = in_channels * middle * pixels * (4 if place else 1)  # the grouped convolution has the stride
        stages += first + 2 * out_channels * middle * pixels + 3 * (grouped + middle * out_channels * pixels)
        stages += in_channels * out_channels * pixels

    assert macs_of(build(resnext.resnext29_8x64d), 32) == stem + stages + classifier


@pytest.mark.parametrize("columns", [1, 2, 3, 4])
def test_fractalnet_macs_follow_from_its_rule(columns: int) -> None:
    """Nobody prints them: each block has 2^columns - 1 convolutions of equal size after its projection."""
    macs, in_channels = 512 * 10, 3
    for place, channels in enumerate((64, 128, 256, 512, 512)):
        pixels = (32 >> place) ** 2
        macs += 9 * channels**2 * pixels * (2**columns - 1)
        macs += in_channels * channels * pixels if in_channels != channels else 0
        in_channels = channels

    assert macs_of(build(fractalnet.fractalnet_cifar, columns=columns), 32) == macs
