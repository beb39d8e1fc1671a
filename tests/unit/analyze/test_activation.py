from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from sepdeploy.analyze.activation import find_activations
from sepdeploy.analyze.trace import trace_network
from sepdeploy.errors import UsageError


def found(net: nn.Module, example: torch.Tensor, *, includes_linear: bool = False) -> dict[str, str]:
    return find_activations(net, example, trace_network(net, example, includes_linear=includes_linear))


class Then(nn.Module):
    """A convolution, and any function of its output."""

    def __init__(self, run) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.run = run

    def forward(self, x):
        return self.run(self.conv(x))


def both(y):
    return F.relu(y) + y


def activated_then_read(y):
    z = F.relu_(y)
    return z + y  # the same tensor: both read what the ReLU left


def viewed(y):
    return F.relu(y.flatten(1))


def returned_too(y):
    return y, F.relu(y)


@pytest.mark.parametrize(
    ("run", "activation"),
    [
        (F.relu, "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (lambda y: y.clamp(min=0), "relu"),
        (lambda y: y.clamp_min(0), "relu"),
        (nn.ReLU6(), "relu6"),
        (nn.ReLU6(inplace=True), "relu6"),
        (lambda y: torch.clamp(y, 0, 6), "relu6"),
        (nn.Hardswish(), "hardswish"),
        (nn.SiLU(inplace=True), "silu"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.Hardsigmoid(), "hardsigmoid"),
        (nn.LeakyReLU(0.1), "leaky_relu"),
        (nn.GELU(), "gelu"),
        (activated_then_read, "relu"),
        (nn.Hardtanh(), ""),
        (lambda y: y.clamp(max=6), ""),
        (lambda y: y.clamp(y, y + 6), ""),
        (nn.Tanh(), ""),
        (nn.Identity(), ""),
        (both, ""),
        (viewed, ""),
        (returned_too, ""),
        (lambda y: y, ""),
    ],
)
def test_what_follows_a_convolution(run, activation) -> None:
    assert found(Then(run).eval(), torch.randn(1, 3, 6, 6)) == {"conv": activation}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chain", {"0": "relu", "3": "relu"}),
        ("residual", {"a": "relu", "b": ""}),  # behind b's batch norm the addition comes first
        ("relu_in_place", {"1": "relu", "4": ""}),
        ("twice", {"conv": ""}),  # followed by a ReLU the first time only
        ("never_called", {"conv": "", "unused": ""}),
        ("norm_input_read_elsewhere", {"conv": ""}),
        ("norm_with_activation", {"0": ""}),
        ("norm_with_children", {"0": "relu", "2": "", "4": "relu"}),  # no runtime fuses a PReLU
        ("frozen_norm", {"a": "relu", "b": ""}),
        ("functional", {"conv": "relu", ":conv2d[0]": ""}),
    ],
)
def test_networks(make_net, name, expected) -> None:
    assert found(*make_net(name)) == expected


def test_norms_of_several_operators_with_an_activation_inside(make_net) -> None:
    """Only what is behind the last of them reads the norm's result; also where the norm is called twice."""
    net, x = make_net("frozen_norm")
    frozen = type(net.norm)

    class Activated(frozen):
        def forward(self, x):
            return self.act(frozen.forward(self, x))

    net.norm.__class__ = Activated
    net.norm.act = nn.ReLU6(inplace=True)
    assert found(nn.Sequential(net.a, net.norm, net.a, net.norm, nn.Hardswish()), x) == {"0": "relu6"}
    net.norm.act = nn.Identity()
    assert found(nn.Sequential(net.a, net.norm, nn.Hardswish(), net.a, net.norm), x) == {"0": ""}


def test_children_of_a_convolution_are_no_part_of_a_norm() -> None:
    class Activated(nn.Conv2d):
        def forward(self, x):
            return self.act(super().forward(x))

    conv = Activated(8, 8, 1)
    conv.act = nn.ReLU()
    assert found(nn.Sequential(conv, nn.Sigmoid()).eval(), torch.randn(1, 8, 4, 4)) == {"0": "sigmoid"}


def test_a_convolution_called_twice_with_the_same_activation() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    assert found(nn.Sequential(conv, nn.ReLU(), conv, nn.ReLU()), torch.randn(1, 4, 6, 6)) == {"0": "relu"}


def test_linear_layers() -> None:
    net = nn.Sequential(nn.Flatten(2), nn.Linear(36, 8), nn.GELU(), nn.Linear(8, 2))
    assert found(net, torch.randn(1, 4, 6, 6), includes_linear=True) == {"1": "gelu", "3": ""}


@pytest.mark.filterwarnings("ignore:Using padding=:UserWarning")
def test_every_nasty_network_is_answered_and_left_alone(make_net, net_name) -> None:
    net, example = make_net(net_name)
    trace = trace_network(net, example)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
    assert set(find_activations(net, example, trace)) == {site.name for site in trace.sites}
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()] == hooks


def test_a_wrong_shape_is_a_sentence() -> None:
    net = Then(F.relu).eval()
    trace = trace_network(net, torch.randn(1, 3, 6, 6))
    with pytest.raises(UsageError, match="does not run on an input of shape"):
        find_activations(net, torch.randn(1, 5, 6, 6), trace)
