import pytest
import torch
from torch import nn

from sepdeploy.errors import UnsupportedModelError
from sepdeploy.train.features import FeatureTap


def test_outputs_come_in_the_order_of_the_names_before_they_are_changed_in_place():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    with FeatureTap(model, ("2", "0")) as tap:
        out = model(x)
        last, first = tap.features
    assert torch.equal(last, out)
    assert torch.equal(first, model[0](x))
    assert first.min() < 0  # the ReLU worked on the original
    last.sum().backward()
    assert model[0].weight.grad.abs().sum() > 0


def test_nothing_stays_on_the_network(make_net):
    net, x = make_net("residual")
    with FeatureTap(net, ("bn1", "")) as tap:
        net(x)
        assert len(tap.features) == 2
    assert not any(module._forward_hooks for module in net.modules())
    with pytest.raises(UnsupportedModelError, match="did not call bn1"):
        _ = tap.features


def test_the_network_itself_gives_all_its_tensors(make_net):
    net, x = make_net("dict_output")
    with FeatureTap(net, ("conv", "")) as tap:
        net(x)
        shapes = [tuple(feature.shape) for feature in tap.features]
    assert shapes == [(1, 8, 12, 12), (1, 8, 12, 12), (1, 8)]


def test_the_last_call_counts(make_net):
    net, x = make_net("twice")
    with FeatureTap(net, ("bn",)) as tap:
        out = net(x)
        assert torch.equal(tap.features[0], out)


def test_a_module_that_never_ran_is_named(make_net):
    net, x = make_net("never_called")
    with FeatureTap(net, ("unused",)) as tap:
        net(x)
        with pytest.raises(UnsupportedModelError, match="did not call unused"):
            _ = tap.features
