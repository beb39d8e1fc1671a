"""Every reason to keep a convolution has a network that gives it, and such a convolution is not touched."""

import pytest
import torch
from torch import nn

from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.plan import Kept, Plan, Reason, SchemeOptions
from sepdeploy.planning.candidates import drop_failing, propose_plan
from sepdeploy.planning.convert import convert_network

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
    pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning"),
]

DEPTHWISE, SPATIAL = "depthwise_separable", "spatial_separable"

CASES = [
    (Reason.NOT_CALLED, "never_called", "unused", DEPTHWISE),
    (Reason.NOT_CALLED, "called_past_hooks", "conv", DEPTHWISE),
    (Reason.NOT_CONV2D, "mixed_dimensions", "c1", DEPTHWISE),
    (Reason.NOT_CONV2D, "mixed_dimensions", "c3", DEPTHWISE),
    (Reason.TRANSPOSED, "mixed_dimensions", "up", DEPTHWISE),
    (Reason.FUNCTIONAL, "functional", ":conv2d[0]", SPATIAL),
    (Reason.CUSTOM_FORWARD, "own_forward", "0", DEPTHWISE),
    (Reason.CUSTOM_FORWARD, "patched_forward", "conv", DEPTHWISE),
    (Reason.PARAMETRIZED, "weight_norm", "0", DEPTHWISE),
    (Reason.PARAMETRIZED, "spectral_norm", "0", DEPTHWISE),
    (Reason.PARAMETRIZED, "old_weight_norm", "0", SPATIAL),
    (Reason.PARAMETRIZED, "old_spectral_norm", "0", SPATIAL),
    (Reason.HAS_HOOKS, "hooked", "0", DEPTHWISE),
    (Reason.SHARED_WEIGHT, "shared_weight", "0", DEPTHWISE),
    (Reason.SHARED_WEIGHT, "shared_weight", "3", DEPTHWISE),
    (Reason.SHARED_WEIGHT, "remade_in_forward", "conv", DEPTHWISE),
    (Reason.SHARED_WEIGHT, "weight_used_elsewhere", "conv", DEPTHWISE),
    (Reason.QUANTIZED_OR_NOT_FLOAT, "complex_weight", "conv", DEPTHWISE),
    (Reason.NOT_FINITE, "not_finite", "conv", DEPTHWISE),
    (Reason.POINTWISE, "pointwise", "conv", DEPTHWISE),
    (Reason.POINTWISE, "pointwise", "conv", SPATIAL),
    (Reason.DEPTHWISE, "depthwise", "conv", DEPTHWISE),
    (Reason.DEPTHWISE, "depthwise", "conv", SPATIAL),
    (Reason.ONE_DIMENSIONAL_KERNEL, "row_kernel", "conv", SPATIAL),
    (Reason.FEW_CHANNELS, "few_channels", "conv", DEPTHWISE),
    (Reason.FEW_CHANNELS, "few_channels", "conv", SPATIAL),
    (Reason.FEW_CHANNELS, "few_channels", "conv", "low_rank"),
    (Reason.GROUPED, "grouped", "conv", "grouped"),
    (Reason.GROUPED, "grouped", "conv", "depthwise"),
    (Reason.GROUPED, "grouped", "conv", "optimized_separable"),
    (Reason.GROUPED, "grouped", "conv", "spatial_optimized"),
    (Reason.DEPTHWISE, "depthwise", "conv", "low_rank"),
    (Reason.DEPTHWISE, "depthwise", "conv", "optimized_separable"),
    (Reason.POINTWISE, "pointwise", "conv", "spatial_optimized"),
    (Reason.ONE_DIMENSIONAL_KERNEL, "row_kernel", "conv", "spatial_optimized"),
    (Reason.SCHEME_IS_DENSE, "plain", "conv", "dense"),
]

NOT_FROM_PROPOSE = {
    Reason.NOT_CHEAPER,  # below: it depends on the options
    Reason.OPTIONS_DO_NOT_FIT,  # likewise, tests/unit/planning/test_candidates.py
    Reason.REPLACEMENT_FAILS,  # below: drop_failing
    Reason.EXCEEDS_MAX_DROP,  # the guard, tests/unit/planning/test_guard.py
    Reason.NOT_TRIED,  # likewise
    Reason.NOTHING_WEIGHED,  # the selection, tests/unit/stages/test_plan_file.py
    Reason.NOT_FASTER,  # likewise
    Reason.NOT_CHOSEN,  # likewise
    Reason.NOT_FASTER_WHOLE,  # tests/unit/stages/test_select_stage.py
}


def test_every_reason_has_a_network_or_another_stage():
    assert {reason for reason, *_ in CASES} | NOT_FROM_PROPOSE == set(Reason)
    assert not {reason for reason, *_ in CASES} & NOT_FROM_PROPOSE


def outputs_of(net, x):
    return [y for y in torch.utils._pytree.tree_leaves(net(x.clone())) if isinstance(y, torch.Tensor)]


@pytest.mark.parametrize(("reason", "name", "site", "scheme"), CASES)
@torch.no_grad()
def test_convolution_is_kept_and_computes_the_same(make_net, reason, name, site, scheme):
    net, x = make_net(name)
    trace = trace_network(net, x)
    plan = propose_plan(trace, scheme, SchemeOptions())
    assert plan.kept[site] == Kept(reason)
    only_kept = Plan(plan.scheme, plan.options, tuple(d for d in plan.decisions if isinstance(d.outcome, Kept)))
    torch.manual_seed(1)
    expected = outputs_of(net, x)
    torch.manual_seed(1)  # one of the nets draws its weights on each call
    converted, transfers = convert_network(net, trace, only_kept, lambda: [x])
    assert transfers == ()
    assert converted is not net
    for output, before in zip(outputs_of(converted, x), expected, strict=True):
        assert torch.equal(output.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize(
    ("name", "scheme", "options"),
    [("plain", DEPTHWISE, SchemeOptions(terms=9)), ("plain", SPATIAL, SchemeOptions(rank_ratio=1.0))],
)
def test_not_cheaper(make_net, name, scheme, options):
    net, x = make_net(name)
    plan = propose_plan(trace_network(net, x), scheme, options)
    kept = plan.kept["conv"]
    assert kept.reason is Reason.NOT_CHEAPER
    separable, dense = (int(word) for word in kept.detail.split() if word.isdigit())
    assert separable >= dense == plan.decisions[0].macs


@pytest.mark.parametrize(
    ("name", "detail"),
    [
        ("looks_at_type", "its outputs change"),
        ("reads_private_attribute", "AttributeError"),
        ("held_in_plain_list", "goes on using the old convolution"),
    ],
)
def test_replacement_that_the_network_notices(make_net, name, detail):
    net, x = make_net(name)
    trace = trace_network(net, x)
    plan = propose_plan(trace, DEPTHWISE, SchemeOptions())
    assert plan.replaced
    left = drop_failing(net, trace, plan, x)
    assert not left.replaced
    (kept,) = (kept for kept in left.kept.values() if kept.reason is Reason.REPLACEMENT_FAILS)
    assert detail in kept.detail


def test_network_that_is_one_bare_convolution():
    net, x = nn.Conv2d(8, 8, 3).eval(), torch.randn(1, 8, 9, 9)
    trace = trace_network(net, x)
    plan = drop_failing(net, trace, propose_plan(trace, DEPTHWISE, SchemeOptions()), x)
    assert plan.kept[""].reason is Reason.REPLACEMENT_FAILS
