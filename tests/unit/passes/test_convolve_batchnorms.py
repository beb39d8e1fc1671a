"""Batch norms without a convolution before them, as depthwise convolutions."""

import copy

import pytest
import torch
from torch import nn

from sepdeploy.analyze.flow_graph import capture_graph
from sepdeploy.core.chain import Chain, ChainSum, Factor
from sepdeploy.core.conv import ConvSpec
from sepdeploy.errors import ContractError
from sepdeploy.passes.convolve_batchnorms import (
    ConvolvedNorm,
    convolve_batchnorms,
    lone_batchnorms,
    norms_behind_layers,
)
from sepdeploy.passes.fold_batchnorm import fold_batchnorm, unfold_batchnorm
from sepdeploy.schemes.module import ChainConv2d


def trained(norm):
    norm.running_mean.normal_()
    norm.running_var.uniform_(0, 2)
    if norm.affine:
        norm.weight.data.normal_()
        norm.bias.data.normal_()
    return norm.eval()


class WithActivation(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class Net(nn.Module):
    """Norms at the input, behind a concatenation, called twice, behind a linear layer, and some that must stay."""

    def __init__(self):
        super().__init__()
        self.first, self.joined, self.twice = nn.BatchNorm2d(3), nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False)
        self.fancy, self.unused, self.shared, self.sharing = (
            each(6) for each in (WithActivation, nn.BatchNorm2d, nn.BatchNorm2d, nn.BatchNorm2d)
        )
        self.linear, self.flat, self.rows = nn.Linear(6, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(6)
        self.alias = self.first
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                trained(module)
        self.sharing.weight = self.shared.weight

    def forward(self, x):
        x = self.first(x)
        x = self.twice(self.twice(self.joined(torch.cat([x, x.relu()], 1)).relu()))
        x = self.sharing(self.shared(self.fancy(x)))
        return self.flat(self.linear(x.mean((2, 3)))), self.rows(x.flatten(2))


@torch.no_grad()
def test_norms_become_convolutions_and_the_function_stays():
    torch.manual_seed(0)
    net = Net().eval()
    x = torch.randn(2, 3, 4, 5)
    before = net(x)
    names = lone_batchnorms(net, x)
    assert names == ("first", "joined", "twice", "flat", "rows")
    assert not any(module._forward_hooks for module in net.modules())
    convolve_batchnorms(net, names)
    assert net.alias is net.first
    assert isinstance(net.first, ConvolvedNorm)
    assert lone_batchnorms(net, x) == ()
    for output, expected in zip(net(x), before, strict=True):
        assert torch.allclose(output, expected, rtol=1e-5, atol=1e-5)
    assert not any(module.training for module in net.modules())


@torch.no_grad()
@pytest.mark.parametrize("name", ["norm_with_children", "frozen_norm"])
def test_norms_of_other_classes_with_what_they_hold(make_net, name):
    """As in pre-activation networks of timm; the convolution before each is left out."""
    parts = [module for module in make_net(name)[0].modules() if "running_mean" in module._buffers]
    net = nn.Sequential(*parts).eval()
    x = torch.randn(2, 8, 4, 5)
    names = lone_batchnorms(net, x)
    assert len(names) == len(parts)
    changed = copy.deepcopy(net)
    convolve_batchnorms(changed, names)
    assert torch.allclose(changed(x), net(x), rtol=1e-5, atol=1e-5)
    for weight in changed.parameters():
        weight.mul_(1.1)
    back = unfold_batchnorm(net, changed, {})
    assert back.state_dict().keys() == net.state_dict().keys()
    assert torch.allclose(back(x), changed(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(back(x), net(x), atol=1e-2)


@torch.no_grad()
def test_frozen_norms_that_share_buffers_have_no_bias_or_are_inside_of_another_stay(make_net):
    frozen = make_net("frozen_norm")[0].norm
    sharing = copy.deepcopy(frozen)
    sharing.weight = frozen.weight
    lame, outer = copy.deepcopy(frozen), copy.deepcopy(make_net("norm_with_children")[0][1])
    lame.bias = None
    lame.forward = lambda x: nn.functional.batch_norm(x, lame.running_mean, lame.running_var, lame.weight, eps=lame.eps)
    outer.act = nn.BatchNorm2d(8).eval()
    net = nn.Sequential(frozen, sharing, lame, outer).eval()
    assert lone_batchnorms(net, torch.randn(2, 8, 4, 5)) == ("3",)


def test_norms_in_training_or_inside_of_a_form_stay():
    form = ChainSum((Chain((Factor(4, 4, (1, 1)), Factor(4, 4, (1, 1)))),))
    chain = ChainConv2d(form, ConvSpec(4, 4, (1, 1)), bias=False)
    chain.extra = trained(nn.BatchNorm2d(4))
    chain.register_forward_hook(lambda module, _, output: module.extra(output))
    net = nn.Sequential(chain, nn.BatchNorm2d(4).train(), nn.BatchNorm2d(4, track_running_stats=False).eval())
    assert lone_batchnorms(net, torch.randn(2, 4, 3, 3)) == ()


def test_frozen_norms_stay_frozen_and_others_are_our_bug():
    norm = trained(nn.BatchNorm2d(4)).requires_grad_(False)
    norm.act = nn.ReLU()  # which it does not run
    net = nn.Sequential(nn.ReLU(), norm)
    x = torch.randn(2, 4, 3, 3)
    before = net(x)
    with pytest.raises(ContractError, match="ReLU is no batch norm"):
        convolve_batchnorms(net, ["0"])
    convolve_batchnorms(net, ["1"])
    assert torch.allclose(net(x), before, atol=1e-5)
    assert not any(weight.requires_grad for weight in net.parameters())


@torch.no_grad()
def test_what_a_norm_holds_learns_by_itself(make_net):
    norm = make_net("norm_with_children")[0][3]
    norm.weight.requires_grad_(False)
    norm.bias.requires_grad_(False)
    net = nn.Sequential(norm, norm.act)  # which somebody else uses too
    names = lone_batchnorms(net, torch.randn(2, 8, 4, 5))
    assert names == ("0",)
    convolve_batchnorms(net, names)
    assert {name for name, weight in net.named_parameters() if weight.requires_grad} == {"0.act.weight"}


@torch.no_grad()
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.BatchNorm1d])
def test_trained_convolutions_go_back_into_their_norms(affine, kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.ReLU(), trained(kind(4, affine=affine, eps=0.1))).eval()
    x = torch.randn(5, 4, 3, 3) if kind is nn.BatchNorm2d else torch.randn(5, 4)
    changed = copy.deepcopy(net)
    convolve_batchnorms(changed, ["1"])
    for weight in changed.parameters():
        weight.mul_(1 + 0.1 * torch.rand_like(weight))
    found = unfold_batchnorm(net, changed, {})
    assert found.state_dict().keys() == net.state_dict().keys()
    assert torch.allclose(found(x), changed(x), atol=1e-5)
    assert not torch.allclose(found(x), net(x), atol=1e-3)


class Behind(nn.Module):
    """Norms behind linear layers and other convolutions, of which only two can be folded."""

    def __init__(self):
        super().__init__()
        self.up, self.rows = nn.ConvTranspose2d(4, 6, 2, bias=False), nn.Conv1d(6, 5, 1)
        self.linear, self.tokens, self.twice = nn.Linear(35, 3), nn.Linear(7, 7), nn.Linear(7, 5)
        self.norms = nn.ModuleList([nn.BatchNorm2d(6), *(nn.BatchNorm1d(n) for n in (5, 3, 5, 5)), nn.BatchNorm2d(4)])
        self.grouped = nn.ConvTranspose2d(4, 4, 1, groups=2)
        for norm in self.norms:
            trained(norm)

    def forward(self, x):
        x = self.norms[5](self.grouped(x))
        x = self.norms[1](self.rows(self.norms[0](self.up(x)).flatten(2).relu())[:, :, :7])
        y = self.norms[3](self.tokens(x))  # by token, not by what the layer makes
        z = self.twice(y.mean(1))
        return self.norms[2](self.linear(y.flatten(1))), self.norms[4](z) + z


@torch.no_grad()
def test_norms_behind_other_layers_are_folded_and_unfolded():
    torch.manual_seed(0)
    net, x = Behind().eval(), torch.randn(2, 4, 3, 2)
    names = lone_batchnorms(net, x)
    assert len(names) == 6
    pairs = norms_behind_layers(net, names, capture_graph(net, x))
    assert pairs == {"up": "norms.0", "linear": "norms.2"}  # of `rows` a slice is read, and not the whole
    folded = copy.deepcopy(net)
    fold_batchnorm(folded, pairs)
    assert isinstance(folded.norms[0], nn.Identity)
    convolve_batchnorms(folded, [name for name in names if name not in pairs.values()])
    for weight in folded.parameters():
        weight.mul_(1.1)
    unfolded = unfold_batchnorm(net, folded, pairs)
    assert unfolded.state_dict().keys() == net.state_dict().keys()
    for output, expected, other in zip(unfolded(x), folded(x), net(x), strict=True):
        assert torch.allclose(output, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(output, other, atol=1e-2)
    fresh = copy.deepcopy(net)
    fold_batchnorm(fresh, pairs)
    for output, expected in zip(fresh(x), net(x), strict=True):
        assert torch.allclose(output, expected, rtol=1e-4, atol=1e-5)


def test_a_parametrized_layer_keeps_the_norm_behind_it():
    """Its weights are computed anew at every call: what is folded into them would be lost."""
    net = nn.Sequential(nn.Linear(4, 4), trained(nn.BatchNorm1d(4)), nn.Linear(4, 4), trained(nn.BatchNorm1d(4))).eval()
    nn.utils.parametrize.register_parametrization(net[2], "bias", nn.Identity())
    x = torch.randn(2, 4)
    assert norms_behind_layers(net, ("1", "3"), capture_graph(net, x)) == {"0": "1"}
