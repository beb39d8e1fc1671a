"""What every reference network must do, and what the parts of some families compute."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

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

Factory = Callable[..., nn.Module]

IMAGE_SIZES: dict[Factory, int] = {  # smaller than in training where that makes no difference
    resnet_cifar.resnet20: 32,
    resnet_cifar.resnet20_imagenet40: 32,
    mobilenet.mobilenet_v1: 64,
    mobilenet.mobilenet_v2: 64,
    darts.darts_cifar: 32,
    darts.darts_imagenet: 64,
    resnet.resnet18: 64,
    vgg.vgg16: 32,
    vgg.vgg16_bn: 32,
    resnext.resnext50_32x4d: 64,
    resnext.resnext29_8x64d: 32,
    inception.googlenet: 64,
    xception.xception: 71,
    darknet.darknet19: 32,
    fractalnet.fractalnet_cifar: 32,
}

FIRST_AND_LAST_NAMES: dict[Factory, tuple[str, str, str]] = {
    resnet_cifar.resnet20: ("conv1.weight", "layer2.0.bn2.running_var", "linear.bias"),
    resnet_cifar.resnet20_imagenet40: ("conv1.weight", "layer2.0.shortcut.0.weight", "linear.bias"),
    mobilenet.mobilenet_v1: (
        "features.init_block.conv.weight",
        "features.stage4.unit6.pw_conv.bn.weight",
        "output.bias",
    ),
    mobilenet.mobilenet_v2: ("features.0.0.weight", "features.17.conv.1.0.weight", "classifier.1.bias"),
    darts.darts_cifar: ("stem.0.weight", "cells.7.preprocess0.conv_1.weight", "classifier.bias"),
    darts.darts_imagenet: ("stem0.0.weight", "cells.13._ops.7.op.2.weight", "classifier.bias"),
    resnet.resnet18: ("conv1.weight", "layer4.0.downsample.1.running_mean", "fc.bias"),
    vgg.vgg16: ("features.0.weight", "features.28.bias", "classifier.6.bias"),
    vgg.vgg16_bn: ("features.0.weight", "features.41.running_mean", "classifier.6.bias"),
    resnext.resnext50_32x4d: ("conv1.weight", "layer1.0.downsample.0.weight", "fc.bias"),
    resnext.resnext29_8x64d: ("conv1.weight", "layer3.2.bn3.bias", "fc.bias"),
    inception.googlenet: ("conv1.conv.weight", "inception4e.branch4.1.bn.bias", "fc.bias"),
    xception.xception: ("conv1.weight", "block12.rep.4.pointwise.weight", "fc.bias"),
    darknet.darknet19: (
        "features.stage1.unit1.conv.weight",
        "features.stage6.unit5.bn.bias",
        "output.final_conv.bias",
    ),
    fractalnet.fractalnet_cifar: (
        "features.unit1.projection.conv.weight",
        "features.unit5.block.blocks.block4.subblock3.conv.weight",
        "output.bias",
    ),
}

EXPORTED = [factory for factory in IMAGE_SIZES if factory is not darts.darts_cifar]

each_factory = pytest.mark.parametrize("factory", IMAGE_SIZES, ids=lambda factory: factory.__name__)


@torch.no_grad()
def build(factory: Factory) -> nn.Module:
    """A narrow network in eval mode; its batch norms know real statistics, else deep networks forget their input."""
    torch.manual_seed(0)
    model = factory(num_classes=7, width=0.25).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the statistics are then those of the images that follow
    model(images_for(factory, count=4))
    return model.eval()


def images_for(factory: Factory, count: int = 2) -> Tensor:
    size = IMAGE_SIZES[factory]
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@each_factory
@torch.inference_mode()
def test_scores_are_finite_repeatable_and_independent_of_the_batch(factory: Factory) -> None:
    model, images = build(factory), images_for(factory)
    before = images.clone()

    scores = model(images)

    assert scores.shape == (2, 7)
    assert scores.isfinite().all()
    assert torch.equal(model(images), scores)
    assert torch.equal(images, before)
    alone = torch.cat([model(image[None]) for image in images])
    scale = scores.abs().max().item()
    torch.testing.assert_close(alone, scores, rtol=0, atol=1e-3 * scale)  # untrained batch norms amplify rounding
    assert (scores[0] - scores[1]).abs().max() > 1e-2 * scale


@pytest.mark.parametrize("factory", EXPORTED, ids=lambda factory: factory.__name__)
def test_networks_export_with_the_same_outputs(factory: Factory) -> None:
    """All but the twenty cells of DARTS for CIFAR, slow to export and the same as those for ImageNet."""
    model, images = build(factory), images_for(factory, count=1)

    exported = torch.export.export(model, (images,)).module()

    torch.testing.assert_close(exported(images), model(images))


@each_factory
def test_every_convolution_is_a_module_that_a_scheme_may_replace(factory: Factory) -> None:
    model = build(factory)

    sites = trace_network(model, images_for(factory, count=1)).sites

    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert sorted(site.name for site in sites) == sorted(convs)
    assert [site.name for site in sites if site.reason is not None] == []
    assert all(len(site.calls) == 1 for site in sites)


@each_factory
def test_width_scales_every_channel_but_those_of_images_and_classes(factory: Factory) -> None:
    with torch.device("meta"):
        one, half = factory(width=1.0), factory(width=0.5)

    pairs = list(zip(one.parameters(), half.parameters(), strict=True))
    assert pairs[0][1].shape[1] == 3
    assert pairs[-1][0].shape == pairs[-1][1].shape
    for full, scaled in pairs[1:-2]:
        scaled_dimensions = [b / a for a, b in zip(full.shape[:2], scaled.shape[:2], strict=True) if a != b]
        assert scaled_dimensions or tuple(full.shape) in NOT_SCALED[factory]
        assert all(0.4 < ratio <= 0.75 for ratio in scaled_dimensions)


NOT_SCALED: dict[Factory, set[tuple[int, ...]]] = {factory: set() for factory in IMAGE_SIZES} | {
    mobilenet.mobilenet_v2: {(1280,)},  # the last convolution keeps its channels below width 1
}


@each_factory
def test_the_default_width_is_one(factory: Factory) -> None:
    with torch.device("meta"):
        assert [p.shape for p in factory().parameters()] == [p.shape for p in factory(width=1.0).parameters()]


@each_factory
def test_parameters_have_the_names_of_the_known_checkpoints(factory: Factory) -> None:
    with torch.device("meta"):
        names = list(factory().state_dict())

    first, inner, last = FIRST_AND_LAST_NAMES[factory]
    assert (names[0], names[-1]) == (first, last)
    assert inner in names


@each_factory
def test_all_parameters_are_trained(factory: Factory) -> None:
    model = build(factory).train()

    model(images_for(factory, count=4)).square().sum().backward()

    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(
    ("factory", "channels"), [(darts.darts_cifar, 42), (darts.darts_imagenet, 56)], ids=["cifar", "imagenet"]
)
def test_darts_reaches_the_channels_that_the_optimized_separable_paper_uses(factory: Factory, channels: int) -> None:
    with torch.device("meta"):
        model = factory(width=7 / 6)

    assert model.cells[0].preprocess1.op[1].out_channels == channels


def test_a_darts_normal_cell_is_wired_as_its_genotype() -> None:
    """Every operation and the preprocessing replaced by a known factor, the state of the output shows the wiring."""
    cell = darts.darts_cifar(width=0.25).cells[1]
    cell.preprocess0, cell.preprocess1 = Scale(1), Scale(10)
    for place in range(8):
        cell._ops[place] = Scale(place + 1)
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)

    states = cell(one, one).flatten().tolist()

    first = 1 * 1 + 2 * 10  # operations 1 and 2 on states 0 and 1
    second = 3 * 1 + 4 * 10
    third = 5 * 10 + 6 * 1
    fourth = 7 * 1 + 8 * first
    assert states == [first, second, third, fourth]


def test_a_darts_reduction_cell_is_wired_as_its_genotype() -> None:
    cell = darts.darts_cifar(width=0.25).cells[6]
    strides = [type(operation).__name__ for operation in cell._ops]
    cell.preprocess0, cell.preprocess1 = Scale(1), Scale(10)
    for place in range(8):
        cell._ops[place] = Scale(place + 1)
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)

    states = cell(one, one).flatten().tolist()

    pool, skip = "MaxPool2d", "Identity"
    assert strides == [pool, pool, skip, pool, pool, skip, skip, pool]
    first = 1 * 1 + 2 * 10
    assert states == [first, 3 * first + 4 * 10, 5 * 1 + 6 * first, 7 * first + 8 * 10]


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def test_factorized_reduce_reads_even_and_odd_pixels() -> None:
    reduce = darts.FactorizedReduce(1, 3).eval()
    nn.init.ones_(reduce.conv_1.weight)
    nn.init.ones_(reduce.conv_2.weight)
    x = torch.arange(16.0).reshape(1, 1, 4, 4)

    y = reduce(x)

    scale = (1 + reduce.bn.eps) ** -0.5
    torch.testing.assert_close(y[:, :1], x[:, :, ::2, ::2] * scale)
    torch.testing.assert_close(y[:, 1:], x[:, :, 1::2, 1::2].expand(-1, 2, -1, -1) * scale)


def test_a_fractal_block_joins_columns_by_their_mean() -> None:
    block = fractalnet.FractalBlock(1, 1, columns=3)
    assert [len(level) for level in block.blocks] == [1, 2, 1, 3]
    factors = itertools.count(1)
    for level in block.blocks:
        for place in range(len(level)):
            level[place] = Scale(next(factors))
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)

    y = block(x)

    halfway = (2 * 1 + 3) / 2  # two convolutions of the deepest column, one of the second
    assert y.item() == pytest.approx((5 * 4 * halfway + 6 * halfway + 7) / 3)


def test_fractalnet_refuses_no_columns() -> None:
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        fractalnet.fractalnet_cifar(columns=0)


def test_an_inception_block_concatenates_four_branches() -> None:
    torch.manual_seed(0)
    block = inception.InceptionBlock(4, 1, (2, 3), (2, 5), 7).eval()
    x = torch.randn(1, 4, 6, 6)

    y = block(x)

    assert y.shape == (1, 16, 6, 6)
    pooled = F.max_pool2d(x, 3, 1, padding=1)
    parts = [block.branch1(x), block.branch2(x), block.branch3(x), block.branch4[1](pooled)]
    assert torch.equal(y, torch.cat(parts, dim=1))


def test_an_inverted_residual_adds_its_input_only_where_shapes_agree() -> None:
    shapes = itertools.product((1, 2), (8, 16))
    is_residual = {
        (stride, out): mobilenet.InvertedResidual(8, out, stride, 6).eval().is_residual for stride, out in shapes
    }
    assert is_residual == {(1, 8): True, (1, 16): False, (2, 8): False, (2, 16): False}

    block = mobilenet.InvertedResidual(8, 8, 1, 6).eval()
    x = torch.randn(1, 8, 5, 5)
    torch.testing.assert_close(block(x) - x, block.conv(x))


def test_an_xception_block_has_no_activation_within_a_separable_convolution() -> None:
    block = xception.XceptionBlock((4, 6, 6), stride=2)

    assert [type(layer).__name__ for layer in block.rep] == [
        *("ReLU", "SeparableConv", "BatchNorm2d") * 2,
        "MaxPool2d",
    ]
    separable = block.rep[1]
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(separable(x), separable.pointwise(separable.conv1(x)))
    assert block.eval()(x).shape == (1, 6, 3, 3)


def test_middle_xception_blocks_add_their_input() -> None:
    block = xception.XceptionBlock((4, 4, 4, 4), stride=1).eval()
    x = torch.randn(1, 4, 5, 5)

    assert torch.equal(block(x), x + block.rep(x))


def test_the_first_xception_block_has_no_activation_of_its_own() -> None:
    """The stem ends in one."""
    first, second = (getattr(xception.xception(width=0.1), name) for name in ("block1", "block2"))

    assert isinstance(first.rep[0], xception.SeparableConv)
    assert isinstance(second.rep[0], nn.ReLU)
