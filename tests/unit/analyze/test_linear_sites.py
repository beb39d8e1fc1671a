"""Linear layers as 1x1 convolutions: listed only when asked for, replaced like any other."""

import pytest
import torch
from torch import nn

from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.plan import Reason, SchemeOptions
from sepdeploy.planning.candidates import drop_failing, propose_plan
from sepdeploy.planning.convert import convert_network
from sepdeploy.schemes.module import ChainLinear


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.tokens = nn.Linear(8, 24)  # called on (N, H * W, 8)
        self.hidden = nn.Linear(24, 32)
        self.conv = nn.Conv2d(3, 8, 3)
        self.unused = nn.Linear(4, 4)

    def forward(self, x):
        tokens = self.tokens(self.stem(x).flatten(2).transpose(1, 2)).relu()
        return self.hidden(tokens.mean(1)) + self.conv(x).mean((2, 3)).repeat(1, 4)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Classifier().eval()


def images(count=1):
    return torch.randn(count, 3, 6, 5, generator=torch.Generator().manual_seed(1))


def test_sites_in_the_order_of_calls(network):
    trace = trace_network(network, images(), includes_linear=True)
    assert [site.name for site in trace.sites] == ["stem", "tokens", "hidden", "conv", "unused"]
    tokens, hidden, unused = (trace.site(name) for name in ("tokens", "hidden", "unused"))
    assert tokens.calls[0].input_shape == (1, 8, 30, 1)
    assert tokens.macs == 30 * 8 * 24
    assert hidden.calls[0].output_shape == (1, 32, 1, 1)
    assert hidden.params == 24 * 32 + 32
    assert unused.reason is Reason.NOT_CALLED
    assert trace.total_macs == sum(site.macs for site in trace.sites)


def test_not_listed_unless_asked(network):
    assert {site.name for site in trace_network(network, images()).sites} == {"stem", "conv"}


def test_tied_weights_and_own_forward_stay():
    class Doubling(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 12), nn.Linear(12, 12), Doubling(12, 12))
    net[2].weight = net[1].weight
    trace = trace_network(net, torch.randn(1, 3, 2, 2), includes_linear=True)
    assert [site.reason for site in trace.sites] == [Reason.SHARED_WEIGHT] * 2 + [Reason.CUSTOM_FORWARD]


@pytest.mark.parametrize("method", ["data-free", "anchored"])
@torch.no_grad()
def test_linear_layers_are_converted(network, method):
    trace = trace_network(network, images(), includes_linear=True)
    options = SchemeOptions(groups=(1, 1), middle_channels=(64,))
    plan = propose_plan(trace, "optimized_separable", options, network)
    # Wider than the original, so nothing is cheaper: taken by hand.
    assert plan.kept["tokens"].reason is Reason.NOT_CHEAPER
    plan = propose_plan(trace, "low_rank", SchemeOptions(rank_ratio=0.4), network)
    assert set(plan.replaced) == {"tokens", "hidden"}
    plan = drop_failing(network, trace, plan, images())
    assert set(plan.replaced) == {"tokens", "hidden"}
    converted, transfers = convert_network(network, trace, plan, lambda: [images(40)], method=method)
    assert isinstance(converted.tokens, ChainLinear)
    assert converted(images(2)).shape == (2, 32)
    weight = converted.tokens.weight
    assert weight.shape == network.tokens.weight.shape
    error = float((weight - network.tokens.weight).norm() / network.tokens.weight.norm())
    if method == "data-free":
        assert transfers[0].kernel_error == pytest.approx(error, rel=1e-3)
        values = torch.linalg.svdvals(network.tokens.weight)
        assert error == pytest.approx(float(values[3:].norm() / values.norm()), rel=1e-3)
    else:
        change = converted(images(30)) - network(images(30))
        assert float(change.norm() / network(images(30)).norm()) < 0.5


def test_refusals_speak_of_the_1x1_kernel(network):
    trace = trace_network(network, images(), includes_linear=True)
    plan = propose_plan(trace, "depthwise_separable", SchemeOptions(), network)
    assert plan.kept["tokens"].reason is Reason.POINTWISE
