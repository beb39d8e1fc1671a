import pytest
import torch

from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.plan import Decision, Kept, Plan, Reason, Replaced, SchemeOptions
from sepdeploy.errors import UsageError
from sepdeploy.passes.fold_batchnorm import fold_batchnorm
from sepdeploy.planning.candidates import propose_plan
from sepdeploy.planning.convert import convert_network
from sepdeploy.schemes.module import ChainConv2d

OPTIONS = SchemeOptions(terms=1)


@pytest.fixture
def images():
    return torch.randn(8, 8, 12, 12, generator=torch.Generator().manual_seed(0))


def proposal(make_net, name):
    net, x = make_net(name)
    trace = trace_network(net, x)
    return net, trace, propose_plan(trace, "depthwise_separable", OPTIONS)


def test_exactly_the_planned_convolutions_are_replaced(make_net, images):
    net, trace, plan = proposal(make_net, "residual")
    plan = plan.with_outcome("a", Kept(Reason.EXCEEDS_MAX_DROP))
    seen = []
    converted, transfers = convert_network(
        net, trace, plan, lambda: [images], progress=lambda done, total: seen.append((done, total))
    )
    assert [name for name, m in converted.named_modules() if isinstance(m, ChainConv2d)] == ["b"]
    assert [t.name for t in transfers] == ["b"]
    assert seen == [(1, 1)]
    assert not any(isinstance(m, ChainConv2d) for m in net.modules())
    assert not any(m.training for m in converted.modules())


def test_order_is_the_traces_whatever_the_plans(make_net, images):
    net, trace, plan = proposal(make_net, "residual")
    turned = Plan(plan.scheme, plan.options, plan.decisions[::-1])
    _, transfers = convert_network(net, trace, turned, lambda: [images])
    assert [t.name for t in transfers] == ["a", "b"]


def test_plan_of_another_network(make_net, images):
    net, trace, plan = proposal(make_net, "residual")
    (candidate, _) = plan.replaced.values()
    other = Plan(plan.scheme, plan.options, (Decision("nowhere", 1, 1, Replaced(candidate)),))
    with pytest.raises(UsageError, match="the plan replaces nowhere, which the network does not have"):
        convert_network(net, trace, other, lambda: [images])


@torch.no_grad()
def test_memory_gives_the_same_network_and_is_not_changed_by_what_is_done_to_it(make_net, images):
    net, trace, plan = proposal(make_net, "residual")
    memory = {}
    first, transfers = convert_network(net, trace, plan, lambda: [images], memory=memory)
    expected = first(images)
    fold_batchnorm(first, {site.name: site.norm for site in trace.sites})
    for parameter in first.parameters():
        parameter.zero_()
    again, same_transfers = convert_network(net, trace, plan, lambda: pytest.fail("transferred anew"), memory=memory)
    assert torch.equal(again(images), expected)
    assert same_transfers == transfers


def test_alias_and_second_call_run_the_replacement(make_net, images):
    for name in ("aliased", "list_reused", "twice"):
        net, trace, plan = proposal(make_net, name)
        converted, _ = convert_network(net, trace, plan, lambda: [images], method="data-free")
        replaced = [m for m in converted.modules() if isinstance(m, ChainConv2d)]
        assert len(replaced) == 1
        calls = []
        replaced[0].register_forward_hook(lambda *args, calls=calls: calls.append(1))
        converted(images)
        assert len(calls) == 2
