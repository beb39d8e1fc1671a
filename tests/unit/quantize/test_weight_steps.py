"""Bias correction and adaptive rounding on layers where it is known what they should win."""

import copy

import pytest
import torch
from torch import nn

from sepdeploy.analyze.flow_graph import capture_graph
from sepdeploy.core.int8 import Affine
from sepdeploy.quantize.correct_biases import correct_biases
from sepdeploy.quantize.round_adaptively import round_adaptively
from sepdeploy.quantize.simulate import fake_quantized, weight_scales


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(32, 8, 1)).eval().requires_grad_(False)


@pytest.fixture
def images():
    """All channels alike and positive: rounding errors of the weights of a row add up."""
    torch.manual_seed(1)
    return (torch.rand(16, 1, 4, 4) + 0.5).expand(16, 32, 4, 4).contiguous()


def error(network, wanted, images):
    """Difference of outputs with rounded weights, activations being as good as exact, per output channel."""
    graph = capture_graph(network, images[:1])
    coarse = fake_quantized(graph, {"input_1": Affine(0.01, 0)})
    rounded = torch.round(images / 0.01).clamp(0, 255) * 0.01
    return (coarse(images)[0] - wanted(rounded)).detach()


def test_biases_take_back_the_mean_error(network, images):
    before = copy.deepcopy(network)
    shift = error(network, before, images).mean((0, 2, 3))
    assert (
        correct_biases(network, images[:1], {"input_1": Affine(0.01, 0)}, lambda: [images[:8], images[8:]]) == "1 bias"
    )
    after = error(network, before, images).mean((0, 2, 3))
    assert after.abs().max() < 0.05 * shift.abs().max()
    assert torch.equal(network[0].weight, before[0].weight)


def test_a_network_without_biases_is_left_alone(images):
    network = nn.Sequential(nn.Conv2d(32, 8, 1, bias=False)).eval()
    assert correct_biases(network, images[:1], {"input_1": Affine(0.01, 0)}, lambda: [images]) == ""


def test_weights_go_to_the_side_that_keeps_the_output(network, images):
    before = copy.deepcopy(network)
    nearest = error(network, before, images).square().mean()
    detail = round_adaptively(network, images[:1], {"input_1": Affine(0.01, 0)}, lambda: [images])
    assert detail.startswith("1 weights, ")
    assert error(network, before, images).square().mean() < 0.25 * nearest
    # On the grid that the exporters find again: the largest weight of each row is where it was.
    scale = weight_scales(before[0].weight).reshape(-1, 1, 1, 1)
    assert torch.allclose(weight_scales(network[0].weight).reshape(-1, 1, 1, 1), scale, rtol=1e-6)
    codes = network[0].weight / scale
    assert (codes - codes.round()).abs().max() < 1e-3
    assert ((codes - before[0].weight / scale).abs() <= 1 + 1e-3).all()


@pytest.mark.parametrize(("groups", "is_rounded"), [(1, True), (2, False)])
def test_transposed_convolutions_are_rounded_per_output_channel(groups, is_rounded):
    torch.manual_seed(0)
    network = nn.Sequential(nn.ConvTranspose2d(8, 6, 2, stride=2, groups=groups)).eval().requires_grad_(False)
    network[0].weight *= torch.logspace(-2, 0, network[0].weight.shape[1]).reshape(1, -1, 1, 1)  # outputs differ
    graph = capture_graph(network, torch.ones(1, 8, 3, 3))
    simulated = fake_quantized(graph, {})
    rounded = copy.deepcopy(network)
    if is_rounded:
        scale = network[0].weight.abs().amax((0, 2, 3)).reshape(1, -1, 1, 1) / 127
        rounded[0].weight.copy_(torch.round(network[0].weight / scale) * scale)
    x = torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(simulated(x)[0], rounded(x))
    assert is_rounded == bool((rounded(x) != network(x)).any())
