"""Channels without weights whose biases have to fit into 32 bits."""

import pytest
import torch
from torch import nn

from sepdeploy.analyze.flow_graph import capture_graph
from sepdeploy.core.int8 import Affine
from sepdeploy.quantize.lift_dead_channels import has_dead_channels, lift_dead_channels
from sepdeploy.quantize.simulate import quantized_places, weight_scales


@torch.no_grad()
@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)])
def test_biases_fit_and_outputs_stay(layer):
    torch.manual_seed(0)
    net = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)).eval()
    x = torch.randn(2, 4, 4, 4)
    graph = capture_graph(net, x)
    affines = {node.name: Affine(0.02, 100) for node in quantized_places(graph)}
    assert not has_dead_channels(graph, affines)
    for weight, bias in ((layer.weight, layer.bias), (net[3].weight, net[3].bias)):
        weight[0], weight[1] = 0, weight[1] * 1e-12
        bias[:2] = torch.tensor([0.5, -3.0])
    before, alive = net(x), [weight[2:].clone() for weight in (layer.weight, net[3].weight)]
    assert has_dead_channels(graph, affines)
    lift_dead_channels(graph, affines)
    assert not has_dead_channels(graph, affines)
    for weight, bias in ((layer.weight, layer.bias), (net[3].weight, net[3].bias)):
        codes = bias / (0.02 * weight_scales(weight))
        assert codes[:2].abs().numpy() == pytest.approx(2.0**29, rel=1e-5)
    assert torch.allclose(net(x), before, atol=1e-4)
    assert all(torch.equal(*pair) for pair in zip(alive, (layer.weight[2:], net[3].weight[2:]), strict=True))


def test_dead_channels_with_nothing_to_add_stay_dead():
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU()).eval()
    nn.init.zeros_(net[0].weight)
    nn.init.zeros_(net[0].bias)
    graph = capture_graph(net, torch.randn(1, 4, 4, 4))
    assert not has_dead_channels(graph, {node.name: Affine(0.02, 100) for node in quantized_places(graph)})
