import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.errors import UnsupportedModelError
from sepdeploy.planning.candidates import propose_plan
from sepdeploy.planning.convert import convert_network
from sepdeploy.transfer import layer
from sepdeploy.transfer.anchor import find_anchor, run_to_anchor


class Block(nn.Module):
    """A stem; conv, norm, ReLU, conv, norm, plus the stem's output, ReLU; then one more convolution."""

    def __init__(self, inplace=False):
        super().__init__()
        torch.manual_seed(1)
        self.stem, self.a, self.b = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(3))
        self.norm_a, self.norm_b = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace)
        self.last = nn.Conv2d(8, 4, 3)
        with torch.no_grad():
            for norm in (self.norm_a, self.norm_b):
                norm.weight.copy_(torch.linspace(-1, 2, 8))
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
        self.eval()

    def forward(self, x):
        x = self.stem(x)
        y = self.norm_b(self.b(self.relu(self.norm_a(self.a(x)))))
        return self.last(F.relu(y + x))


def slopes_of(norm):
    return (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().double()


@pytest.mark.parametrize("inplace", [False, True])
def test_the_anchor_lies_behind_the_shortcut_and_the_activation(inplace):
    net, x = Block(inplace), torch.randn(4, 8, 6, 6)
    for name, norm, place in (("a", net.norm_a, "b"), ("b", net.norm_b, "last")):
        anchor = find_anchor(net, name, x)
        assert anchor.place[:2] == (place, False)
        assert torch.allclose(anchor.slopes, slopes_of(norm), rtol=1e-4)
        assert not anchor.is_affine
    assert find_anchor(net, "last", x).is_affine
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_what_mixes_pixels_or_channels_ends_the_search():
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(3, 1, 1), nn.ReLU()).eval()
    anchor = find_anchor(pooled, "0", torch.randn(2, 3, 6, 6))
    assert anchor.place[:2] == ("1", False)
    assert anchor.is_affine
    normalized = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU()).eval()
    assert find_anchor(normalized, "0", torch.randn(2, 3, 6, 6)).place[:2] == ("1", False)


def test_a_smooth_activation_has_its_largest_slope():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid()).eval()
    anchor = find_anchor(net, "0", 0.1 * torch.randn(2, 3, 6, 6))
    assert anchor.place[:2] == ("", True)
    assert bool((anchor.slopes <= 0.25).all())
    assert bool((anchor.slopes > 0.2).all())


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return torch.from_numpy(self.conv(x).numpy(force=True)).relu()


def test_channels_that_are_cut_off_have_the_slope_from_before():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([1.0, -2.0, 3.0, 1e-6]))
        net[1].bias[1] = -100
    anchor = find_anchor(net, "0", torch.randn(2, 3, 6, 6))
    assert anchor.place[:2] == ("", True)
    assert torch.allclose(anchor.slopes[:3], torch.tensor([1.0, -2.0, 3.0]).double(), rtol=1e-3)
    assert anchor.slopes[3] != 0


def test_networks_that_cannot_be_differentiated_have_none():
    assert find_anchor(Detached().eval(), "conv", torch.randn(2, 3, 6, 6)) is None


@torch.no_grad()
def test_running_to_the_anchor_gives_what_goes_in_and_comes_out():
    net, x = Block(inplace=True), torch.randn(4, 8, 6, 6)
    anchor = find_anchor(net, "b", x)
    seen = run_to_anchor(net, "b", x, anchor)
    stem = net.stem(x)
    hidden = F.relu(net.norm_a(net.a(stem)))
    assert torch.equal(seen.input, hidden)
    assert torch.equal(seen.output, net.b(hidden))
    assert torch.allclose(seen.result, F.relu(net.norm_b(net.b(hidden)) + stem), atol=1e-6)
    other = run_to_anchor(net, "b", x, anchor, lambda h: torch.zeros_like(h))
    assert torch.allclose(other.result, F.relu(net.norm_b(torch.zeros_like(hidden)) + stem), atol=1e-6)
    linear = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    vectors = torch.randn(3, 7, 6)
    seen = run_to_anchor(linear, "0", vectors, find_anchor(linear, "0", vectors))
    assert seen.input.shape == (21, 6, 1, 1)
    assert torch.allclose(seen.result.reshape(3, 7, 5), linear[:2](vectors), atol=1e-6)


class Shy(nn.Module):
    """Stops before its activation when the image is dark."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU()

    def forward(self, x):
        y = self.conv(x)
        return self.relu(y) if float(x.mean()) > 0 else y


@torch.no_grad()
def test_networks_that_end_before_the_anchor_are_refused():
    net, x = Shy().eval(), torch.rand(2, 3, 6, 6)
    anchor = find_anchor(net, "conv", x)
    anchor = replace(anchor, place=("relu", True, 0, 0))
    with pytest.raises(UnsupportedModelError, match="did not come from conv to relu"):
        run_to_anchor(net, "conv", -x, anchor)


def converted_error(net, x, unseen, monkeypatch=None):
    """Relative error of the block's output on unseen images, with one term everywhere."""
    if monkeypatch:
        monkeypatch.setattr(layer, "find_anchor", lambda *_: None)
    traced = trace_network(net, x[:1])
    plan = propose_plan(traced, "depthwise_separable", SchemeOptions(terms=1))
    assert set(plan.replaced) == {"stem", "a", "b", "last"}
    converted, _ = convert_network(net, traced, plan, lambda: iter(x.split(64)))
    tail = nn.Identity()
    net, converted = copy.deepcopy(net), copy.deepcopy(converted)
    net.last = converted.last = tail
    with torch.no_grad():
        return float((net(unseen) - converted(unseen)).norm() / net(unseen).norm())


def test_errors_behind_the_nonlinearity_fall_against_the_layers_own_output(monkeypatch):
    torch.manual_seed(0)
    net, x, unseen = Block(), torch.randn(256, 8, 8, 8), torch.randn(64, 8, 8, 8)
    anchored = converted_error(net, x, unseen)
    assert anchored < 0.97 * converted_error(net, x, unseen, monkeypatch)


@torch.no_grad()
def test_whitened_is_closed_form_on_the_original_networks_inputs():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False)).eval()
    x = torch.randn(64, 8, 8, 8).cumsum(2).cumsum(3)  # neighbours are alike: far from white
    traced = trace_network(net, x[:1])
    plan = propose_plan(traced, "depthwise_separable", SchemeOptions(terms=1))
    errors = {}
    for method in ("data-free", "whitened"):
        converted, (transfer,) = convert_network(net, traced, plan, lambda: iter(x.split(32)), method=method)
        assert (transfer.method, transfer.output_error, converted[0].bias) == (method, None, None)
        errors[method] = float((converted(x) - net(x)).norm())
    assert errors["whitened"] < 0.9 * errors["data-free"]


def test_a_second_solve_that_held_out_images_do_not_confirm_is_undone(monkeypatch):
    torch.manual_seed(0)
    net, x = Block(), torch.randn(64, 8, 8, 8)
    traced = trace_network(net, x[:1])
    plan = propose_plan(traced, "depthwise_separable", SchemeOptions(terms=1))

    def transferred(**options):
        converted, transfers = convert_network(net, traced, plan, lambda: iter(x.split(32)), **options)
        return converted.a.factor_weights()[0][-1], transfers[1].output_error

    quick, _ = transferred(is_quick=True)
    best, lowest = transferred()
    assert not torch.allclose(best, quick)
    solve, rounds = layer._solve, []

    def spoil_every_second(module, site, reading):
        rounds.append(site.name)
        error = solve(module, site, reading)
        if rounds.count(site.name) == 2:
            for weight in module.factor_weights()[0]:
                weight.mul_(0.5)
        return error

    monkeypatch.setattr(layer, "_solve", spoil_every_second)
    undone, error = transferred()
    assert rounds.count("a") == 2
    assert torch.allclose(undone, quick, atol=1e-6)
    assert lowest < error < 1
