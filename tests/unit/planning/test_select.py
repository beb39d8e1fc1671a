"""The search for the best plan, on networks whose layers differ in how well they separate."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.measurement import Quality
from sepdeploy.core.plan import Reason, SchemeOptions
from sepdeploy.core.selection import Choice, LayerChoices
from sepdeploy.planning.candidates import find_candidate
from sepdeploy.planning.select import Search, plan_of
from sepdeploy.planning.solve import Limits
from sepdeploy.schemes.scheme import find_scheme

DAMAGES = {1: 0.3, 2: 0.1, 3: 0.02}
SAVINGS = {1: 3.0, 2: 2.0, 3: 1.0}


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = []
    for _ in range(4):
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


class FakeEvaluator:
    """Loses `points` of accuracy for each unit of the damage of what is replaced, and more than that together."""

    def __init__(self, points: float) -> None:
        self.points = points
        self.seen: list[float] = []

    def quality(self, network, limit_points=None, *, most=None):
        damage = sum(DAMAGES[len(m.form.terms)] for m in network.modules() if hasattr(m, "form"))
        self.seen.append(damage)
        drop = self.points * damage * (1 + damage)
        return Quality(100, None, 1 - drop / 100, None, 0.0, drop, "agreement"), False

    def original_quality(self):
        return Quality(100, None, 1.0, None, 0.0, 0.0, "agreement")


@pytest.fixture
def make():
    net = network()
    traced = trace_network(net, torch.zeros(1, 8, 6, 6))
    layers = []
    for site in traced.sites:
        choices = [Choice("dense", None, (), 0.0, 0.0, 0.0, 0.0, site.macs, site.params)]
        for terms in DAMAGES:
            form = find_candidate(site, find_scheme("depthwise_separable"), SchemeOptions(terms=terms))
            cost = -SAVINGS[terms]
            numbers = (cost, cost - 0.1, cost + 0.1, DAMAGES[terms], form.macs, form.params)
            choices.append(Choice(f"T={terms}", form, ("fold_norm",), *numbers))
        layers.append(LayerChoices(site.name, tuple(choices)))

    def search(points=10.0, limits=None, minimize="latency", memory=None):
        return Search(
            net, traced, tuple(layers), "ms", "ort float32", lambda: iter([torch.randn(8, 8, 6, 6)]),
            FakeEvaluator(points), minimize=minimize, limits=limits or Limits(), method="data-free",
            memory={} if memory is None else memory, progress=lambda _: None,
        )  # fmt: skip

    return search


def saved(plan) -> float:
    return sum(SAVINGS[len(candidate.form.terms)] for candidate in plan.replaced.values())


def best_within(points: float, limit: float) -> float:
    """By trying all: how many layers become T=1, T=2, T=3."""
    best = 0.0
    for ones in range(5):
        for twos in range(5 - ones):
            for threes in range(5 - ones - twos):
                damage = 0.3 * ones + 0.1 * twos + 0.02 * threes
                if points * damage * (1 + damage) <= limit + 1e-9:
                    best = max(best, 3.0 * ones + 2.0 * twos + threes)
    return best


@pytest.mark.parametrize("limit", [0.0, 0.3, 1.0, 2.5, 4.0, 8.0, 30.0])
def test_the_fastest_plan_within_the_limit_is_found(make, limit):
    search = make()
    guarded = search.within_drop(limit)
    assert guarded.quality.drop_points <= limit
    assert saved(guarded.plan) == pytest.approx(best_within(10.0, limit))
    assert guarded.steps[-1].drop_points == guarded.quality.drop_points
    assert all(step.is_accepted == (step.drop_points <= limit) for step in guarded.steps)
    for candidate in guarded.plan.replaced.values():
        assert candidate.lowering == ("fold_norm",)


def test_a_last_measurement_over_the_limit_leads_to_a_milder_plan(make):
    search = make()
    quality = search.evaluator.quality
    search.evaluator.quality = lambda network, limit_points=None, **_: (
        quality(network) if limit_points is None else (replace(quality(network)[0], drop_points=0.0), False)
    )
    guarded = search.within_drop(2.5)  # every quick look says that nothing is lost
    assert 0 < guarded.quality.drop_points <= 2.5
    assert guarded.plan.replaced


def test_nothing_is_replaced_where_nothing_holds(make):
    guarded = make(points=1e6).within_drop(0.5)
    assert not guarded.plan.replaced
    assert guarded.quality.drop_points == 0.0
    assert {kept.reason for kept in guarded.plan.kept.values()} == {Reason.NOT_CHOSEN}


def test_the_least_damage_within_a_limit_of_latency(make):
    plan = make(limits=Limits(latency=-7.0)).least_damage()
    assert saved(plan) >= 7
    assert sorted(len(c.form.terms) for c in plan.replaced.values()) == [2, 2, 2, 3]


def test_macs_may_be_what_is_made_small(make):
    search = make(minimize="macs")
    assert {len(c.form.terms) for c in search.within_drop(1000.0).plan.replaced.values()} == {1}


def test_what_was_measured_is_not_measured_again(make):
    memory = {}
    first = make(memory=memory).within_drop(2.5)
    again = make(memory=memory)
    assert again.within_drop(2.5).plan == first.plan
    assert len(again.evaluator.seen) == 1  # the network handed over


def test_the_front_goes_from_the_original_to_the_fastest(make):
    search = make()
    front = list(search.front(6, 100))
    assert [solution.difference for solution, _ in front] == sorted((s.difference for s, _ in front), reverse=True)
    assert front[-1][0].difference == -12.0
    assert front[-1][1].drop_points > 0
    assert search.nothing().difference == 0


def test_layers_that_must_stay_keep_their_reason(make):
    search = make()
    kept = search.layers[0]
    from sepdeploy.core.plan import Kept

    stays = LayerChoices(kept.name, kept.choices[:1], kept=Kept(Reason.HAS_HOOKS))
    slower = LayerChoices("2", (kept.choices[0], replace(kept.choices[1], difference=0.5)))
    chosen = dict.fromkeys(("0", "2", "4", "6"), kept.choices[0])
    plan = plan_of(search.trace, (stays, slower, *search.layers[2:]), chosen, "ms", "ort float32")
    assert [plan.kept[name].reason for name in chosen] == [
        Reason.HAS_HOOKS, Reason.NOT_FASTER, Reason.NOT_CHOSEN, Reason.NOT_CHOSEN,
    ]  # fmt: skip
    assert plan.kept["2"].detail == "T=1: +0.5 ms, damage 0.3"
