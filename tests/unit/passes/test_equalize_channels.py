import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from sepdeploy.core.chain import Chain, ChainSum, Factor, Shuffle
from sepdeploy.core.conv import ConvSpec
from sepdeploy.passes.equalize_channels import KeptScale, equalize_channels
from sepdeploy.schemes.module import ChainConv2d


class Residual(nn.Module):
    """Depthwise, a convolution that runs twice, a sum, a shuffle by reshaping, padding, flattened features."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.twice = nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.last = nn.Conv2d(14, 6, 1)
        self.classifier = nn.Linear(24, 4)

    def forward(self, x):
        x = F.relu(self.first(x), inplace=True)
        y = F.leaky_relu(self.twice(self.twice(self.depthwise(x))))
        x = F.max_pool2d(F.relu(x + y), 2)
        z = self.grouped(x).view(x.size(0), 2, 6, 4, 4).transpose(1, 2).reshape(x.size(0), 12, 4, 4)
        z = F.relu(self.last(F.pad(z, (0, 0, 0, 0, 1, 1))))
        return self.classifier(F.avg_pool2d(z, 2).flatten(1))


class Branches(nn.Module):
    """Slices, a concatenation, PReLU, a module under two names, a gate, and a tensor that is an output too."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Conv2d(4, 4, 3, padding=1)
        self.right = self.left
        self.prelu = nn.PReLU(8)
        self.gate = nn.Conv2d(8, 8, 1)
        self.seen = nn.Conv2d(8, 6, 1)
        self.last = nn.Conv2d(6, 5, 1)

    def forward(self, x):
        x = self.first(x)
        x = self.prelu(torch.cat([self.left(x[:, :4]), self.right(x[:, 4:])], 1))
        x = x * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        seen = self.seen(x)
        return seen, self.last(F.relu(seen))


class TiedWeight(nn.Module):
    """A weight that is also read as a number, and one with ReLU6 behind it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.second = nn.Conv2d(4, 4, 1)
        self.third = nn.Conv2d(4, 4, 1)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = F.relu6(self.second(x))
        return self.last(F.relu(self.third(x))) * self.first.weight.sum()


def chains():
    """Two terms of grouped convolutions with a shuffle, then a plain convolution."""
    pair = (Factor(8, 8, (3, 3), padding=(1, 1, 1, 1), groups=8), Factor(8, 12, (1, 1)))
    shuffled = (Factor(8, 8, (1, 1), groups=4), Shuffle(4), Factor(8, 12, (3, 3), padding=(1, 1, 1, 1), groups=2))
    form = ChainSum((Chain(pair), Chain(shuffled)))
    chain = ChainConv2d(form, ConvSpec(8, 12, (3, 3), padding=(1, 1, 1, 1)), bias=True)
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), chain, nn.ReLU(), nn.Conv2d(12, 3, 1))


def unbalanced(network, seed=0):
    """Rows of weights over four decades, one dead channel and one channel of zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in {id(p): p for p in network.parameters() if p.dim() > 1}.values():
            spread = torch.randn(len(weight), generator=generator).exp2() ** 2
            weight.mul_(spread.reshape(-1, *[1] * (weight.dim() - 1)) / spread.max())
            weight[1] = 0
    return network.eval()


NETWORKS = {"residual": Residual, "branches": Branches, "tied": TiedWeight, "chains": chains}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_function_stays_the_same(name):
    torch.manual_seed(3)
    network = unbalanced(NETWORKS[name]())
    x = torch.randn(5, 3, 8, 8)
    before = [output.detach() for output in _outputs(network(x))]
    layers = equalize_channels(network, x[:1], lambda: [x])
    assert sum(layer.scaled for layer in layers) > 0
    for expected, found in zip(before, _outputs(network(x)), strict=True):
        assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()


def test_ranges_become_even():
    network = unbalanced(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)))
    x = torch.randn(5, 3, 8, 8)
    layers = {layer.name: layer for layer in equalize_channels(network, x[:1], lambda: [x])}
    first, depthwise = layers["0.weight"], layers["2.weight"]
    # What only a depthwise convolution reads costs no weight anything: all of the imbalance can go.
    assert first.spread_before > 3
    assert first.spread_after == pytest.approx(1, rel=1e-3)
    assert depthwise.spread_after < depthwise.spread_before
    assert (first.readers, first.is_linear) == (("2.weight",), False)
    assert (depthwise.readers, depthwise.is_linear) == (("3.weight",), True)


def test_what_others_read_and_what_is_clipped_keeps_its_scale():
    network = unbalanced(TiedWeight())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    x = torch.randn(2, 3, 8, 8)
    layers = {layer.name: layer for layer in equalize_channels(network, x[:1], lambda: [x])}
    assert torch.equal(network.first.weight, before["first.weight"])
    assert layers["first.weight"].kept is KeptScale.READ_BY_OTHERS
    assert layers["second.weight"].kept is KeptScale.CLIPPED
    assert layers["second.weight"].scaled == 0
    assert layers["third.weight"].scaled > 0


def test_outputs_keep_their_scale():
    layers = {layer.name: layer for layer in equalize_channels(
        unbalanced(Branches()), torch.randn(1, 3, 8, 8), lambda: [torch.randn(2, 3, 8, 8)]
    )}  # fmt: skip
    assert layers["seen.weight"].kept is KeptScale.READ_BY_OTHERS
    assert layers["seen.weight"].scaled == 0


def _outputs(returned):
    return returned if isinstance(returned, tuple) else (returned,)
