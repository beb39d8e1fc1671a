import pytest
import torch
from torch import nn

from sepdeploy.errors import UnsupportedModelError
from sepdeploy.transfer.prefix import run_until


def run(net, x, name="conv", calls=1, needs_outputs=True):
    return run_until(net, name, x, calls=calls, needs_outputs=needs_outputs)


@pytest.mark.parametrize("name", ["plain", "keyword", "swallows_everything", "reflect", "dict_output"])
@torch.no_grad()
def test_input_and_output_of_a_module(make_net, name):
    net, x = make_net(name)
    x = torch.cat([x, 2 * x])
    seen = run(net, x)
    assert torch.equal(seen.inputs[0], x)
    assert torch.equal(seen.outputs[0], net.conv(x))
    assert not net.conv._forward_hooks
    assert not net.conv._forward_pre_hooks
    assert run(net, x, needs_outputs=False).outputs == ()


@torch.no_grad()
def test_what_comes_after_is_not_computed(make_net):
    net, x = make_net("chain")
    net[1].forward = lambda x: pytest.fail("ran past the convolution")
    run(net, x, "0")
    run(net, x, "0", needs_outputs=False)


@torch.no_grad()
def test_input_written_to_between_two_calls(make_net):
    net, x = make_net("twice_in_place")
    seen = run(net, x, calls=2)
    assert torch.equal(seen.inputs[0], 2 * x)
    assert torch.equal(seen.outputs[0], net.conv(2 * x))
    assert torch.equal(seen.inputs[1], 2 * x + net.conv(2 * x))


@torch.no_grad()
def test_batch_survives_networks_that_normalize_in_place(make_net):
    net, x = make_net("input_in_place")
    before = x.clone()
    assert torch.equal(run(net, x).inputs[0], (before - 0.5) * 2)
    assert torch.equal(x, before)


@torch.no_grad()
def test_single_images_become_batches(make_net):
    net, x = make_net("unbatched")
    seen = run(net, x)
    assert seen.inputs[0].shape == seen.outputs[0].shape == (1, 8, 12, 12)


def test_network_that_calls_it_less_often(make_net):
    net, x = make_net("calls_by_value")
    assert run(net, x).inputs
    with pytest.raises(UnsupportedModelError, match="called conv 0 times in one forward pass, but 1 times"):
        run(net, x - 1000)
    assert not net.conv._forward_pre_hooks


def test_network_for_one_image_only():
    net = nn.Sequential(nn.Unflatten(0, (1, 1)), nn.Flatten(0, 1), nn.Conv2d(2, 2, 1)).eval()
    assert run(net, torch.zeros(1, 2, 3, 3), "2").inputs
    with pytest.raises(UnsupportedModelError, match=r"does not run on a batch of shape \(2, 2, 3, 3\): RuntimeError"):
        run(net, torch.zeros(2, 2, 3, 3), "2")
    assert not net[2]._forward_pre_hooks
