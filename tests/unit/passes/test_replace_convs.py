import threading

import pytest
import torch
from torch import nn

from sepdeploy.errors import UnsupportedModelError, UsageError
from sepdeploy.passes.replace_convs import copy_network, replace_modules


def test_every_alias_gets_the_replacement(make_net):
    net, _ = make_net("aliased")
    new = nn.Identity()
    assert replace_modules(net, {"inner.b.0": new}) == ("inner.a", "inner.b.0")
    assert net.inner["a"] is new
    assert net.inner["b"][0] is new


def test_order_and_names_of_a_sequential_stay(make_net):
    net, _ = make_net("chain")
    names = [name for name, _ in net.named_children()]
    replace_modules(net, {"3": nn.Identity(), "0": nn.Identity()})
    assert [name for name, _ in net.named_children()] == names
    assert isinstance(net[3], nn.Identity)


@pytest.mark.parametrize("name", ["", "conv.weight", "nowhere", "conv.0"])
def test_unknown_names_are_refused_and_nothing_changes(make_net, name):
    net, _ = make_net("plain")
    conv = net.conv
    with pytest.raises(UsageError, match="no replaceable module"):
        replace_modules(net, {name: nn.Identity()})
    assert net.conv is conv


def test_copy_shares_no_parameter_and_keeps_sharing_inside(make_net):
    net, _ = make_net("shared_weight")
    copied = copy_network(net)
    assert copied[0].weight is copied[3].weight
    assert copied[0].weight is not net[0].weight
    assert torch.equal(copied[0].weight, net[0].weight)


def test_network_that_cannot_be_copied():
    net = nn.Sequential(nn.ReLU())
    net.lock = threading.Lock()
    with pytest.raises(UnsupportedModelError, match="cannot be copied: TypeError"):
        copy_network(net)
