import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from models.resnet_cifar import resnet20
from sepdeploy.analyze.blocks import Block
from sepdeploy.errors import UnsupportedModelError
from sepdeploy.train.block_ends import run_to, weights_by_block


def test_a_pass_stops_at_the_block_and_leaves_the_network_and_the_batch(make_net):
    net, x = make_net("relu_in_place")
    before = x.clone()
    later = []
    net[4].register_forward_pre_hook(lambda *arguments: later.append(arguments))
    (reached,) = run_to(net, "1", x)
    assert torch.equal(reached, net[1](F.relu(x)))
    assert later == []
    assert torch.equal(x, before)
    assert not any(module._forward_hooks for module in net.modules())
    assert torch.equal(run_to(net, "", x)[0], net(x.clone()))


def test_networks_that_catch_everything_do_not_hide_the_end(make_net):
    net, x = make_net("swallows_everything")
    assert torch.equal(run_to(net, "conv", x)[0], net.conv(x))


def test_what_fails_in_the_network_is_one_sentence(make_net):
    net, x = make_net("never_called")
    with pytest.raises(UnsupportedModelError, match="did not call unused"):
        run_to(net, "unused", x)
    with pytest.raises(UnsupportedModelError, match="the network cannot be trained: RuntimeError"):
        run_to(net, "conv", x[:, :3])


def test_each_weight_belongs_to_the_first_end_that_depends_on_it():
    net = resnet20(shortcut="projection").eval()
    net.layer1[1].bn2.weight.requires_grad_(False)
    blocks = [Block("layer1.0", ()), Block("layer1.2", ()), Block("layer2.0", ())]
    owned, activation_bytes = weights_by_block(net, blocks, torch.randn(1, 3, 32, 32))
    names = [name for name, _ in net.named_parameters()]
    assert owned[0] == tuple(n for n in names if n.startswith(("conv1", "bn1", "layer1.0.")))
    assert owned[1] == tuple(n for n in names if n.startswith(("layer1.1", "layer1.2")) and n != "layer1.1.bn2.weight")
    assert owned[2] == tuple(n for n in names if n.startswith("layer2.0"))
    assert "layer2.0.shortcut.0.weight" in owned[2]
    assert all(weight.grad is None for weight in net.parameters())
    # At least the inputs of the convolutions (one at 32x32 with 3 channels, eight with 16, one with 32 at 16x16).
    inputs = 4 * (3 * 32 * 32 + 8 * 16 * 32 * 32 + 32 * 16 * 16)
    assert inputs < activation_bytes < 5 * inputs


def test_weights_used_twice_or_out_of_reach_of_gradients(make_net):
    net, x = make_net("shared_weight")
    owned, _ = weights_by_block(net, [Block("2", ()), Block("", ())], x)
    assert "0.weight" in owned[0]
    assert owned[1] == ("3.bias", "4.weight", "4.bias")
    net, x = make_net("with_gradients")
    assert weights_by_block(net, [Block("", ())], x)[0] == ((),)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    assert weights_by_block(net, [Block("", ())], torch.ones(1, 4)) == (((),), 0)
