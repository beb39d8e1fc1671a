import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sepdeploy.analyze.trace import conv_spec, trace_network
from sepdeploy.core.conv import ConvSite
from sepdeploy.core.plan import Candidate, Kept, Reason, SchemeOptions
from sepdeploy.errors import ContractError, UsageError
from sepdeploy.planning.candidates import drop_failing, find_candidate, propose_plan
from sepdeploy.planning.convert import convert_network
from sepdeploy.schemes.module import ChainConv2d
from sepdeploy.schemes.scheme import find_scheme

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
    pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning"),
]

SCHEMES = ["depthwise_separable", "spatial_separable", "low_rank", "grouped", "optimized_separable"]
CHEAP = SchemeOptions(terms=1, rank_ratio=0.1)


@pytest.mark.parametrize("scheme", [*SCHEMES, "dense"])
def test_every_convolution_is_decided_once_and_the_costs_are_the_traces(make_net, net_name, scheme):
    net, x = make_net(net_name)
    trace = trace_network(net, x)
    plan = propose_plan(trace, scheme, CHEAP)
    assert [d.name for d in plan.decisions] == [site.name for site in trace.sites]
    assert len(plan.replaced) + len(plan.kept) == len(trace.sites)
    assert [(d.macs, d.params) for d in plan.decisions] == [(site.macs, site.params) for site in trace.sites]
    for decision in plan.decisions:
        if decision.name in plan.replaced:
            assert plan.replaced[decision.name].macs < decision.macs


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "name",
    ["plain", "chain", "twice", "aliased", "grouped", "same_even", "same_even_reflect", "replicate", "circular",
     "unbatched", "patches_as_batch", "stale_geometry", "nhwc"],
)  # fmt: skip
@torch.no_grad()
def test_promised_macs_are_those_of_the_converted_network(make_net, name, scheme):
    net, x = make_net(name)
    trace = trace_network(net, x)
    plan = propose_plan(trace, scheme, CHEAP)
    assert bool(plan.replaced) != (name == "grouped" and scheme in ("grouped", "optimized_separable"))
    converted, _ = convert_network(net, trace, plan, list, method="data-free")
    with FlopCounterMode(display=False) as counter:
        converted(x)
    promised = sum(c.macs for c in plan.replaced.values())
    kept = sum(d.macs for d in plan.decisions if d.name in plan.kept)
    assert counter.get_total_flops() // 2 == promised + kept


def test_promised_params_include_the_bias_that_transfer_adds(make_net):
    net, x = make_net("residual")
    trace = trace_network(net, x)
    plan = propose_plan(trace, "depthwise_separable", CHEAP)
    converted, _ = convert_network(net, trace, plan, lambda: [torch.randn(4, 8, 12, 12)])
    for name, candidate in plan.replaced.items():
        assert sum(p.numel() for p in converted.get_submodule(name).parameters()) == candidate.params


def test_unknown_scheme(make_net):
    net, x = make_net("plain")
    with pytest.raises(UsageError, match="there is no scheme 'magic'; choose one of dense, depthwise, grouped, depth"):
        propose_plan(trace_network(net, x), "magic", CHEAP)


def test_site_without_geometry_or_reason_is_our_bug():
    site = ConvSite("a", "Conv2d", None, (), 0)
    with pytest.raises(ContractError, match="neither a geometry nor a reason"):
        find_candidate(site, find_scheme("depthwise_separable"), CHEAP)


@pytest.mark.parametrize(
    "name",
    ["chain", "residual", "twice", "twice_in_place", "aliased", "list_reused", "grouped", "same_even",
     "same_even_reflect", "replicate", "unbatched", "keyword", "patches_as_batch", "autocast", "input_in_place",
     "dict_output", "nhwc", "stale_geometry", "relu_in_place", "conv_output_returned"],
)  # fmt: skip
def test_networks_that_do_not_notice_keep_their_plan(make_net, name):
    net, x = make_net(name)
    trace = trace_network(net, x)
    plan = propose_plan(trace, "depthwise_separable", CHEAP)
    assert plan.replaced
    before = x.clone()
    assert drop_failing(net, trace, plan, x) == plan
    assert torch.equal(x, before)


def test_only_the_convolutions_at_fault_are_dropped():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))

        def forward(self, x):
            if not isinstance(self.b, nn.Conv2d):
                raise TypeError("b must be a convolution")
            return self.c(self.b(self.a(x)))

    net, x = Picky().eval(), torch.randn(1, 8, 9, 9)
    trace = trace_network(net, x)
    plan = drop_failing(net, trace, propose_plan(trace, "depthwise_separable", CHEAP), x)
    assert list(plan.replaced) == ["a", "c"]
    assert plan.kept == {"b": Kept(Reason.REPLACEMENT_FAILS, "TypeError: b must be a convolution")}


def test_a_lack_of_memory_is_no_fault_of_a_convolution():
    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            if not isinstance(self.a, nn.Conv2d):
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return self.a(x)

    net, x = Large().eval(), torch.randn(1, 8, 9, 9)
    trace = trace_network(net, x)
    plan = propose_plan(trace, "depthwise_separable", CHEAP)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        drop_failing(net, trace, plan, x)


def test_convolutions_that_fail_only_together_are_dropped_one_by_one():
    class NeedsOne(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))

        def forward(self, x):
            if not (isinstance(self.a, nn.Conv2d) or isinstance(self.b, nn.Conv2d)):
                raise TypeError("one of them must be a convolution")
            return self.b(self.a(x))

    net, x = NeedsOne().eval(), torch.randn(1, 8, 9, 9)
    trace = trace_network(net, x)
    plan = drop_failing(net, trace, propose_plan(trace, "depthwise_separable", CHEAP), x)
    assert list(plan.replaced) == ["a"]
    assert isinstance(plan.replaced["a"], Candidate)


def test_the_kernel_goes_where_the_trained_weights_want_it():
    """Two factors leave open which one has the kernel; a kernel that one of the two holds exactly decides."""
    scheme = find_scheme("optimized_separable")
    for position in (1, 2):
        torch.manual_seed(position)
        net = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False)).eval()
        spec = conv_spec(net[0])
        form = scheme.design(spec, SchemeOptions(kernel_position=position))
        net[0].weight.data = ChainConv2d(form, spec, bias=False).weight.detach()
        x = torch.randn(1, 16, 8, 8)
        plan = propose_plan(trace_network(net, x), "optimized_separable", SchemeOptions(), net)
        assert plan.replaced["0"].form == form
        # Without weights, or with the place given, nothing is left to choose.
        assert propose_plan(trace_network(net, x), scheme.name, SchemeOptions()).replaced["0"].form == scheme.design(
            spec, SchemeOptions()
        )


def test_options_that_do_not_fit_one_layer_leave_it_dense(make_net):
    net, x = make_net("chain")
    plan = propose_plan(trace_network(net, x), "optimized_separable", SchemeOptions(groups=(10, 2)), net)
    assert plan.kept["0"].reason is Reason.OPTIONS_DO_NOT_FIT
    assert "10 groups are more than" in plan.kept["0"].detail
