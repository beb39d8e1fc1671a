"""Channels without weights whose biases have to fit into 32 bits."""

import pytest
import torch
from torch import nn

from sepdeploy.analyze.flow_graph import capture_graph
from sepdeploy.core.int8 import Affine
from sepdeploy.quantize.lift_dead_channels import has_dead_channels, lift_dead_channels
from sepdeploy.quantize.simulate import quantized_places, weight_scales


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "channels last", "transposed"])
def test_biases_fit_and_outputs_stay(kind):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3)
    if kind == "channels last":
        layer.to(memory_format=torch.channels_last)
    elif kind == "transposed":
        layer = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=2)
    net = nn.Sequential(layer, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3)).eval()
    axis = 1 if kind == "transposed" else 0
    x = torch.randn(2, 4, 4, 4)
    graph = capture_graph(net, x)
    affines = {node.name: Affine(0.02, 100) for node in quantized_places(graph)}
    assert not has_dead_channels(graph, affines)
    layers = [(layer.weight.movedim(axis, 0), layer.bias), (net[4].weight, net[4].bias)]
    for weight, bias in layers:
        weight[0], weight[1] = 0, weight[1] * 1e-12
        bias[:2] = torch.tensor([0.5, -3.0])
    before, alive = net(x), [weight[2:].clone() for weight, _ in layers]
    assert has_dead_channels(graph, affines)
    lift_dead_channels(graph, affines)
    assert not has_dead_channels(graph, affines)
    for weight, bias in layers:
        codes = bias / (0.02 * weight_scales(weight))
        assert codes[:2].abs().numpy() == pytest.approx(2.0**29, rel=1e-5)
    assert torch.allclose(net(x), before, atol=1e-3)
    assert all(torch.equal(weight[2:], kept) for (weight, _), kept in zip(layers, alive, strict=True))


def test_dead_channels_with_nothing_to_add_stay_dead():
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU()).eval()
    nn.init.zeros_(net[0].weight)
    nn.init.zeros_(net[0].bias)
    graph = capture_graph(net, torch.randn(1, 4, 4, 4))
    assert not has_dead_channels(graph, {node.name: Affine(0.02, 100) for node in quantized_places(graph)})
