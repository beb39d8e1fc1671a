import copy

import numpy as np
import pytest
import torch
from torch import nn

from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.errors import ContractError
from sepdeploy.passes.fold_batchnorm import fold_batchnorm, unfold_batchnorm
from sepdeploy.planning.candidates import propose_plan
from sepdeploy.planning.convert import convert_network

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
    pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning"),
]


def outputs_of(net, x):
    outputs = net(x.clone())
    return [y for y in torch.utils._pytree.tree_leaves(outputs) if isinstance(y, torch.Tensor)]


def pairs_of(trace):
    return {site.name: site.norm for site in trace.sites if site.norm is not None}


@torch.no_grad()
def test_folding_what_the_trace_allows_is_exact_for_every_net(make_net, net_name):
    if net_name in ("remade_in_forward", "norm_in_training"):
        pytest.skip("answers differently on every call")
    net, x = make_net(net_name)
    before = outputs_of(net, x)
    gone = fold_batchnorm(net, pairs_of(trace_network(net, x)))
    assert not any(isinstance(net.get_submodule(name), nn.BatchNorm2d) for name in gone)
    for output, expected in zip(outputs_of(net, x), before, strict=True):
        assert torch.allclose(
            output, expected, rtol=1e-4, atol=1e-5 * float(expected.nan_to_num().abs().max()), equal_nan=True
        )


@pytest.mark.parametrize("scheme", ["depthwise_separable", "spatial_separable"])
@pytest.mark.parametrize("name", ["chain", "residual", "twice", "with_gradients", "norm_with_children", "frozen_norm"])
@torch.no_grad()
def test_folding_into_replaced_convolutions_is_exact(make_net, name, scheme):
    net, x = make_net(name)
    trace = trace_network(net, x)
    plan = propose_plan(trace, scheme, SchemeOptions())
    assert plan.replaced
    converted, _ = convert_network(net, trace, plan, list, method="data-free")
    before = outputs_of(converted, x)
    assert fold_batchnorm(converted, pairs_of(trace))
    for output, expected in zip(outputs_of(converted, x), before, strict=True):
        assert torch.allclose(output, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_affine_and_bias_in_every_combination(affine, bias):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 6, 3, bias=bias), nn.BatchNorm2d(6, affine=affine, eps=0.1)).eval()
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0, 2)
    reference = copy.deepcopy(net)
    assert fold_batchnorm(net, {"0": "1"}) == ("1",)
    x = torch.randn(2, 4, 6, 6)
    assert torch.allclose(net(x), reference(x), atol=1e-5)


class MoreState(nn.BatchNorm2d):
    """A plain norm all the same: what it has besides, it does not use."""

    def __init__(self, channels):
        super().__init__(channels)
        self.register_buffer("mask", torch.ones(1))
        self.eps, self.act = np.float32(0.1), nn.ReLU()


@torch.no_grad()
def test_plain_norms_with_more_in_them():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 6, 3), MoreState(6), nn.Conv2d(6, 6, 1)).eval()
    x = torch.randn(2, 4, 6, 6)
    pairs = pairs_of(trace_network(net, x))
    assert pairs == {"0": "1"}
    folded = copy.deepcopy(net)
    fold_batchnorm(folded, pairs)
    assert torch.allclose(folded(x), net(x), atol=1e-5)
    assert torch.allclose(unfold_batchnorm(net, folded, pairs)(x), net(x), atol=1e-5)


def test_wrong_pairs_are_our_bug():
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(ContractError, match="ReLU is no batch norm with running statistics"):
        fold_batchnorm(net, {"0": "1"})
    with pytest.raises(ContractError, match="BatchNorm2d is no batch norm with running statistics"):
        fold_batchnorm(net, {"0": "2"})


@pytest.mark.parametrize("name", ["chain", "residual", "twice", "norm_with_children", "frozen_norm"])
@pytest.mark.parametrize("scheme", [None, "depthwise_separable"])
@torch.no_grad()
def test_unfolding_gives_the_folded_function_back_in_the_old_structure(make_net, name, scheme):
    net, x = make_net(name)
    trace = trace_network(net, x)
    if scheme:
        net = convert_network(net, trace, propose_plan(trace, scheme, SchemeOptions()), lambda: [x])[0]
    folded = copy.deepcopy(net)
    fold_batchnorm(folded, pairs_of(trace))
    for parameter in folded.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))  # as training would
    unfolded = unfold_batchnorm(net, folded, pairs_of(trace))
    assert unfolded.state_dict().keys() == net.state_dict().keys()
    for output, expected in zip(outputs_of(unfolded, x), outputs_of(folded, x), strict=True):
        assert torch.allclose(output, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    again = copy.deepcopy(unfolded)
    fold_batchnorm(again, pairs_of(trace))
    for weight, expected in zip(again.parameters(), folded.parameters(), strict=True):
        assert torch.allclose(weight, expected, rtol=1e-6, atol=0)
