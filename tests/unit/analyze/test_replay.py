"""Replays against complete runs, on every nasty network and on networks made to mislead the recording."""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from sepdeploy.analyze.replay import Replay
from sepdeploy.analyze.trace import output_tensors, trace_network
from sepdeploy.errors import UnsupportedModelError
from sepdeploy.passes.replace_convs import replace_modules


class Net(nn.Module):
    def __init__(self, run, **modules):
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)
        self.eval()

    def forward(self, x):
        return self.run(self, x)


class Counting(nn.Conv2d):
    """Counts how often it computes."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.calls = 0

    def forward(self, input):
        self.calls += 1
        return super().forward(input)


def conv(kind=nn.Conv2d):
    return kind(4, 4, 3, padding=1)


def state_of(net):
    """Everything on the modules besides their tensors."""
    return {
        name: (sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks), module.forward)
        for name, module in net.named_modules()
    }


def other(layer):
    """A layer of the same shape with other weights."""
    changed = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(-0.7)
    return changed


def complete(net, name, replacement, x):
    """Outputs with the layer really replaced."""
    changed = copy.deepcopy(net)
    replace_modules(changed, {name: replacement})
    with torch.no_grad():
        return output_tensors(changed(x.clone()))


def assert_same(outputs, expected):
    assert len(outputs) == len(expected)
    for a, b in zip(outputs, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def assert_replays(net, name, x, *, shares_prefix=True):
    before = state_of(net)
    replay = Replay(net, name, x)
    assert replay.shares_prefix == shares_prefix
    with torch.no_grad():
        assert_same(replay.outputs, output_tensors(net(x.clone())))
    replacement = other(net.get_submodule(name))
    for _ in range(2):  # the second finds nothing spoilt by the first
        assert_same(replay.run(replacement), complete(net, name, replacement, x))
    assert state_of(net) == before
    return replay


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_every_network_replays_every_layer(make_net, net_name):
    net, x = make_net(net_name)
    x = torch.cat([x, x.flip(-1)])
    replaceable = [s.name for s in trace_network(net, x[:1], includes_linear=True).sites if s.reason is None]
    given = x.clone()
    for name in replaceable:
        if net_name in ("held_in_plain_list", "reads_private_attribute"):  # cannot have another module there
            assert_same(Replay(net, name, x).run(net.get_submodule(name)), output_tensors(net(x.clone())))
        elif net_name != "looks_at_type":
            assert_replays(net, name, x)
    assert torch.equal(x, given)


def test_what_comes_before_the_layer_is_not_computed_again():
    early, late = conv(Counting), conv(Counting)
    net = Net(lambda n, x: n.late(F.relu(n.middle(n.blocks(x)))), blocks=nn.Sequential(early), middle=conv(), late=late)
    replay = assert_replays(net, "middle", torch.randn(2, 4, 5, 5))
    early.calls = late.calls = 0
    replay.run(other(net.middle))
    assert (early.calls, late.calls) == (0, 1)
    # The whole block is remembered, not its parts; what holds the layer is not.
    assert [module for module, _ in replay._records] == [net.blocks]
    inner = Net(lambda n, x: n.blocks(x), blocks=nn.Sequential(conv(Counting), conv(), conv(Counting)))
    replay = assert_replays(inner, "blocks.1", torch.randn(2, 4, 5, 5))
    assert [module for module, _ in replay._records] == [inner.blocks[0]]


def test_modules_called_before_and_after_the_layer():
    def run(n, x):
        y = n.shared(n.block(x))  # block calls `shared` too: of that call only the block's output counts
        y = n.layer(y) + n.shared(y)
        return n.shared(y)

    shared = conv(Counting)
    net = Net(run, shared=shared, block=nn.Sequential(shared, nn.ReLU()), layer=conv())
    replay = assert_replays(net, "layer", torch.randn(2, 4, 5, 5))
    shared.calls = 0
    replay.run(other(net.layer))
    assert shared.calls == 2  # in the sum and at the end


def test_changes_in_place_are_made_again():
    """The activation changes what the shortcut reads, as in networks that activate before they convolve."""

    def run(n, x):
        y = n.first(x)
        z = n.relu(y)  # y is z
        z += 0.5
        out = n.layer(z)
        out += y
        return out

    net = Net(run, first=conv(), relu=nn.ReLU(inplace=True), layer=conv())
    replay = assert_replays(net, "layer", torch.randn(2, 4, 5, 5))
    assert len(replay._records) == 2
    with_block = Net(run, first=conv(), relu=nn.Sequential(nn.Identity(), nn.ReLU(inplace=True)), layer=conv())
    assert_replays(with_block, "layer", torch.randn(2, 4, 5, 5))


def test_what_is_remembered_is_not_spoilt_by_changes_in_place():
    def run(n, x):
        y = n.first(x)
        y += 1
        out = n.layer(y)
        y *= 2
        return out + y

    assert_replays(Net(run, first=conv(), layer=conv()), "layer", torch.randn(2, 4, 5, 5))


def test_outputs_of_any_structure():
    class Both(nn.Module):
        def forward(self, x, scale):
            return {"maps": [x, scale * x], "scale": scale, "none": None}

    def run(n, x):
        seen = n.both(x, scale=2.0)
        return n.layer(seen["maps"][1]) * seen["scale"] + seen["maps"][0]

    assert len(assert_replays(Net(run, both=Both(), layer=conv()), "layer", torch.randn(2, 4, 5, 5))._records) == 1


def test_what_cannot_be_copied_is_computed_again():
    class Box:
        def __init__(self, x):
            self.x = x

    class Boxing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = conv()

        def forward(self, x):
            return Box(self.inner(x))

    net = Net(lambda n, x: n.layer(n.boxing(x).x), boxing=Boxing(), layer=conv())
    replay = assert_replays(net, "layer", torch.randn(2, 4, 5, 5))
    assert [module for module, _ in replay._records] == [net.boxing.inner]


def test_hooks_of_the_user_act_once():
    net = Net(lambda n, x: n.layer(n.first(x)), first=conv(), layer=conv())
    net.first.register_forward_hook(lambda _module, _args, output: 2 * output)
    assert_replays(net, "layer", torch.randn(2, 4, 5, 5))


def test_networks_that_swallow_failures():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = conv(Counting)

        def forward(self, x):
            self.inner(x)
            raise ValueError("not today")

    def run(n, x):
        try:
            x = n.failing(x)
        except ValueError:
            x = x + 1
        return n.layer(x)

    assert_replays(Net(run, failing=Failing(), layer=conv()), "layer", torch.randn(2, 4, 5, 5))


def test_hidden_state_and_chance_get_complete_runs():
    class Alternating(nn.Module):
        count = 0

        def forward(self, x):
            self.count += 1
            return x + self.count

    net = Net(lambda n, x: n.layer(n.first(x)) + n.last(x), first=Alternating(), layer=conv(), last=Alternating())
    replay = Replay(net, "layer", torch.randn(2, 4, 5, 5))
    assert not replay.shares_prefix
    assert not replay._records
    noisy = Net(lambda n, x: n.layer(n.first(x) + torch.rand(1)), first=conv(), layer=conv())
    assert not Replay(noisy, "layer", torch.randn(2, 4, 5, 5)).shares_prefix
    plain = Net(lambda n, x: n.layer(n.first(x)), first=conv(Counting), layer=conv())
    x = torch.randn(2, 4, 5, 5)
    replay = Replay(plain, "layer", x, shares_prefix=False)
    plain.first.calls = 0
    assert_same(replay.run(other(plain.layer)), complete(plain, "layer", other(plain.layer), x))
    assert plain.first.calls == 1


def test_failures_say_why_and_leave_nothing():
    def fails(n, x):
        raise RuntimeError("only one image at a time")

    net = Net(fails, layer=conv())
    before = state_of(net)
    with pytest.raises(UnsupportedModelError, match="only one image at a time; its forward pass must work for any"):
        Replay(net, "layer", torch.randn(2, 4, 5, 5))
    assert state_of(net) == before
    unused = Net(lambda n, x: n.first(x), first=conv(), layer=conv())
    with pytest.raises(UnsupportedModelError, match="never called layer"):
        Replay(unused, "layer", torch.randn(2, 4, 5, 5))
    assert state_of(unused)["first"][0] == sorted(vars(conv()))
