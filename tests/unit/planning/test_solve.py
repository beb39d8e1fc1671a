"""The solver keeps limits, breaks ties, says what cannot be reached, and handles any scale."""

import ctypes
import math
import os
from itertools import pairwise

import numpy as np
import pytest

from sepdeploy.core.chain import Chain, ChainSum, Factor
from sepdeploy.core.plan import Candidate
from sepdeploy.core.selection import Choice, LayerChoices
from sepdeploy.errors import ContractError, UsageError
from sepdeploy.planning.knapsack import Knapsack, Limit
from sepdeploy.planning.solve import Limits, UnreachableLimitError, pareto_front, solve

FORM = Candidate("grouped", ChainSum((Chain((Factor(4, 4, (3, 3), groups=2),)),)), 1, 1)


def choice(label, difference, damage, macs=0, params=0, peak_bytes=None, *, keeps=False):
    form = None if keeps else FORM
    return Choice(label, form, (), difference, difference, difference, damage, macs, params, peak_bytes)


def layer(name, *others, macs=100, params=10, peak_bytes=None):
    return LayerChoices(name, (choice("dense", 0.0, 0.0, macs, params, peak_bytes, keeps=True), *others))


def labels(solution):
    return {name: chosen.label for name, chosen in solution.chosen.items()}


LAYERS = (
    layer("a", choice("half", -1.0, 0.1, 50, 5), choice("tenth", -3.0, 0.5, 10, 1)),
    layer("b", choice("half", -2.0, 0.3, 50, 5), choice("slower", 1.0, 0.01, 5, 9)),
)


@pytest.mark.parametrize(
    ("minimize", "limits", "expected"),
    [
        ("latency", Limits(), "tenth half"),
        ("latency", Limits(damage=0.5), "half half"),
        ("latency", Limits(damage=0.4), "half half"),
        ("latency", Limits(damage=0.0), "dense dense"),
        ("latency", Limits(params=9), "tenth half"),
        ("latency", Limits(macs=15), "tenth slower"),
        ("damage", Limits(), "dense dense"),
        ("damage", Limits(latency=-0.5), "half dense"),
        ("damage", Limits(latency=-2.0), "dense half"),
        ("damage", Limits(latency=-2.0, params=11), "half half"),
        ("damage", Limits(macs=60), "half slower"),
        ("macs", Limits(), "tenth slower"),
        ("macs", Limits(latency=-3.0), "tenth half"),
        ("macs", Limits(damage=0.02), "dense slower"),
        ("params", Limits(), "tenth half"),
        ("params", Limits(damage=0.5), "half half"),
    ],
)
def test_best_plan_within_limits(minimize, limits, expected):
    solution = solve(LAYERS, minimize=minimize, limits=limits)
    assert " ".join(labels(solution).values()) == expected
    assert solution.gap == 0
    for total, name in (("difference",) * 2, ("damage",) * 2, ("macs",) * 2, ("params",) * 2):
        assert getattr(solution, total) == sum(getattr(each, name) for each in solution.chosen.values())
    assert solution.objective == getattr(solution, "difference" if minimize == "latency" else minimize)


def test_a_plans_own_sums_are_limits_that_it_keeps():
    damages = (0.1, 0.2, 0.3, 0.7, 1e-9)
    layers = [layer(str(damage), choice("fast", -1.0, damage)) for damage in damages]
    everything = solve(layers, minimize="latency")
    again = solve(layers, minimize="latency", limits=Limits(damage=everything.damage))
    assert again.difference == -5.0
    assert solve(layers, minimize="damage", limits=Limits(latency=-5.0)).damage == math.fsum(damages)


def test_sums_that_differ_by_rounding_are_the_same_limit():
    layers = [layer(str(index), choice("fast", -0.1, 0.1)) for index in range(10)]
    assert sum([0.1] * 10) < math.fsum([0.1] * 10)
    assert solve(layers, minimize="latency", limits=Limits(damage=sum([0.1] * 10))).damage == 1.0
    assert solve(layers, minimize="damage", limits=Limits(latency=-1.0 - 1e-12)).difference == -1.0


def test_counts_are_kept_to_the_last_one():
    # 1 more than the limit is 1e-11 of it, within the solver's own tolerance.
    half = 50_000_000_000
    others = choice("fast", -1.0, 0.0, half + 1), choice("less", -0.9, 0.0, half)
    layers = [layer(name, *others, macs=1) for name in "ab"]
    best = solve(layers, minimize="latency", limits=Limits(macs=2 * half + 1))
    assert (best.difference, best.macs, best.gap) == (-1.9, 2 * half + 1, 0)
    assert solve(layers, minimize="latency", limits=Limits(macs=2 * half)).macs == 2 * half


def test_memory_is_a_limit_for_every_layer():
    layers = [
        layer(
            "a", choice("fast", -3.0, 0.0, peak_bytes=900), choice("small", -1.0, 0.0, peak_bytes=400), peak_bytes=500
        ),
        layer("b", choice("fast", -1.0, 0.0, peak_bytes=500), peak_bytes=500),
    ]
    assert labels(solve(layers, minimize="latency"))["a"] == "fast"
    assert labels(solve(layers, minimize="latency", limits=Limits(peak_bytes=900)))["a"] == "fast"
    assert labels(solve(layers, minimize="latency", limits=Limits(peak_bytes=899))) == {"a": "small", "b": "fast"}
    with pytest.raises(UnreachableLimitError, match=r"while b runs cannot be at most 499: .* 500") as raised:
        solve(layers, minimize="latency", limits=Limits(peak_bytes=499))
    assert (raised.value.measure, raised.value.limit, raised.value.least) == ("peak_bytes", 499, 500)
    with pytest.raises(ContractError, match="not known"):
        solve(LAYERS, minimize="latency", limits=Limits(peak_bytes=499))


@pytest.mark.parametrize(
    ("limits", "measure", "least"),
    [
        (Limits(latency=-6.0), "latency", -5.0),
        (Limits(macs=14), "macs", 15),
        (Limits(params=5), "params", 6),
        (Limits(damage=-0.1), "damage", 0.0),
        (Limits(latency=-4.0, damage=0.4), "latency", -3.0),
        (Limits(damage=0.05, params=18), "damage", 0.1),
        (Limits(latency=-4.0, damage=0.4, params=5), "params", 6),
    ],
)
def test_a_limit_that_cannot_be_kept_is_named_with_the_nearest(limits, measure, least):
    with pytest.raises(UnreachableLimitError) as raised:
        solve(LAYERS, minimize="damage", limits=limits)
    assert (raised.value.measure, raised.value.least) == (measure, pytest.approx(least))
    assert raised.value.limit == limits.of_sums[measure]
    assert isinstance(raised.value, UsageError)
    assert f"cannot be at most {raised.value.limit:g}" in str(raised.value)
    assert ("other limits" in str(raised.value)) == (len(limits.of_sums) == 2)


def test_the_nearest_to_a_limit_can_be_had():
    with pytest.raises(UnreachableLimitError) as raised:
        solve(LAYERS, minimize="damage", limits=Limits(latency=-4.0, damage=0.4))
    reached = solve(LAYERS, minimize="damage", limits=Limits(latency=raised.value.least, damage=0.4))
    assert (reached.difference, reached.damage) == (-3.0, 0.4)


def test_ties_take_less_damage_then_less_latency_then_fewer_replaced():
    same = layer("a", choice("worse", -1.0, 0.2), choice("better", -1.0, 0.1), choice("again", -1.0, 0.1))
    assert labels(solve([same], minimize="latency")) == {"a": "better"}
    free = layer("a", choice("slow", 0.5, 0.0), choice("fast", -0.5, 0.0), choice("equal", 0.0, 0.0))
    assert labels(solve([free], minimize="damage")) == {"a": "fast"}
    assert labels(solve([layer("a", choice("equal", 0.0, 0.0))], minimize="damage")) == {"a": "dense"}


def test_ties_between_plans_are_broken_alike():
    less = [layer("a", choice("fast", -2.0, 0.5)), layer("b", choice("fast", -2.0, 0.25)), layer("c")]
    assert labels(solve(less, minimize="latency", limits=Limits(damage=0.5))) == {
        "a": "dense",
        "b": "fast",
        "c": "dense",
    }
    # One layer replaced, or two, with the same latency and damage.
    fewer = [layer("a", choice("fast", -1.0, 1.0)), layer("b", choice("fast", -1.0, 1.0), choice("best", -2.0, 2.0))]
    assert labels(solve(fewer, minimize="latency", limits=Limits(damage=2.0))) == {"a": "dense", "b": "best"}


def test_identical_layers_give_the_same_plan_every_time():
    layers = [layer(str(index), choice("half", -1.0, 1.0), choice("tenth", -2.5, 3.0)) for index in range(12)]
    first = solve(layers, minimize="latency", limits=Limits(damage=17.0))
    assert (first.difference, first.damage) == (-15.5, 17.0)
    assert all(solve(layers, minimize="latency", limits=Limits(damage=17.0)) == first for _ in range(3))


def test_scales_from_millionths_to_thousands_in_one_problem():
    layers = [
        layer("tiny", choice("fast", -1e-4, 3e-6), choice("faster", -1.5e-4, 4e-6)),
        layer("mild", choice("fast", -1e4, 2.5e-6)),
        layer("huge", choice("fast", -1e4, 1e3)),
    ]
    least = solve(layers, minimize="damage", limits=Limits(latency=-1e4 - 1.4e-4))
    assert labels(least) == {"tiny": "faster", "mild": "fast", "huge": "dense"}
    assert least.damage == pytest.approx(6.5e-6)
    assert labels(solve(layers, minimize="latency", limits=Limits(damage=6e-6))) == {
        "tiny": "fast",
        "mild": "fast",
        "huge": "dense",
    }


def test_numbers_that_are_not_finite_are_never_chosen():
    broken = layer("a", choice("nan", -9.0, math.nan), choice("inf", -9.0, math.inf), choice("good", -1.0, 0.1))
    assert labels(solve([broken], minimize="latency")) == {"a": "good"}
    with pytest.raises(ContractError, match="finite"):
        solve([LayerChoices("a", (choice("nan", math.nan, 0.0),))], minimize="latency")


def test_no_layers_and_layers_without_a_choice():
    empty = solve([], minimize="latency", limits=Limits(damage=0.0))
    assert (empty.chosen, empty.difference, empty.params, empty.gap) == ({}, 0.0, 0, 0.0)
    kept = [layer("a"), layer("b")]
    assert solve(kept, minimize="latency", limits=Limits(damage=1.0)).macs == 200
    with pytest.raises(UnreachableLimitError):
        solve([], minimize="latency", limits=Limits(latency=-1.0))


def test_slower_choices_are_taken_where_a_limit_asks_for_them():
    layers = [layer("a", choice("small", 2.0, 0.1, 10, 1)), layer("b", choice("small", 0.5, 0.1, 10, 4))]
    assert solve(layers, minimize="latency").difference == 0
    assert labels(solve(layers, minimize="latency", limits=Limits(params=14))) == {"a": "dense", "b": "small"}


def large_problem(seed, count=60, offered=20):
    generator = np.random.default_rng(seed)
    layers = []
    for index in range(count):
        share, noise = generator.uniform(0.05, 1, (2, offered))
        forms = [
            choice(f"{s:.3f}", float(s * (0.7 + n) - 1), float((1 - s) ** 2 * (0.5 + n)), int(1000 * s), int(100 * s))
            for s, n in zip(share, noise, strict=True)
        ]
        layers.append(layer(str(index), *forms, macs=1000, params=100))
    return layers


def test_a_large_problem_is_proven():
    layers = large_problem(0)
    for share in (0.02, 0.3):
        damage = share * solve(layers, minimize="latency").damage
        solution = solve(layers, minimize="latency", limits=Limits(damage=damage), time_limit_s=60)
        assert solution.gap == 0
        assert 0.99 * damage < solution.damage <= damage * (1 + 1e-9)
        back = solve(layers, minimize="damage", limits=Limits(latency=solution.difference), time_limit_s=60)
        assert back.damage <= solution.damage * (1 + 1e-7)


def test_the_solver_is_silent(capfd):
    layers = large_problem(21, count=20, offered=10)  # HiGHS 1.12 repairs a solution of this one and says so
    whole = solve(layers, minimize="latency")
    solve(layers, minimize="latency", limits=Limits(damage=0.05 * whole.damage))
    ctypes.CDLL(None).fflush(None)
    os.write(1, b"still heard\n")
    assert capfd.readouterr() == ("still heard\n", "")


def test_out_of_time_returns_a_plan_and_an_honest_gap():
    layers = large_problem(1)
    damage = 0.1 * solve(layers, minimize="latency").damage
    rushed = solve(layers, minimize="latency", limits=Limits(damage=damage), time_limit_s=0.0)
    best = solve(layers, minimize="latency", limits=Limits(damage=damage), time_limit_s=60)
    assert rushed.damage <= damage
    assert best.gap == 0
    assert best.difference <= rushed.difference
    assert rushed.difference * (1 + rushed.gap) <= best.difference + 1e-6
    if rushed.gap == 0:
        assert rushed.difference == pytest.approx(best.difference)


def test_a_group_with_nothing_that_fits_all_limits_is_infeasible():
    values = [np.array([0.0, 2.0, 0.0, 1.0]), np.array([2.0, 0.0, 0.0, 1.0])]
    limits = [Limit(value, 1.0) for value in values]
    assert Knapsack([2, 2], np.array([1.0, 1.0, 0.0, 0.0]), [], limits).search(5.0) is None


@pytest.mark.parametrize("minimize", ["latency", "macs", "params"])
def test_front_runs_from_least_damage_to_least_cost_without_dominated_plans(minimize):
    layers = large_problem(2, count=8, offered=6)
    front = pareto_front(layers, minimize=minimize, points=8)
    field = "difference" if minimize == "latency" else minimize
    costs = [getattr(solution, field) for solution in front]
    assert 4 <= len(front) <= 8
    assert all(before > after for before, after in pairwise(costs))
    assert all(before.damage < after.damage for before, after in pairwise(front))
    assert front[0].damage == 0
    cheapest = solve(layers, minimize=minimize)
    assert costs[-1] == pytest.approx(cheapest.objective)
    assert front[-1].damage == pytest.approx(cheapest.damage)
    for solution in front:
        best = solve(layers, minimize="damage", limits=Limits(**{minimize: getattr(solution, field)}))
        assert solution.damage == pytest.approx(best.damage)


def test_front_within_limits_and_of_one_plan():
    front = pareto_front(LAYERS, limits=Limits(damage=0.45), points=5)
    assert [labels(solution)["a"] for solution in front] == ["dense", "half", "dense", "half"]
    assert max(solution.damage for solution in front) <= 0.45
    assert [labels(solution) for solution in pareto_front([layer("a")])] == [{"a": "dense"}]
    faster_for_nothing = pareto_front([layer("a", choice("free", -1.0, 0.0))])
    assert [labels(solution) for solution in faster_for_nothing] == [{"a": "free"}]


@pytest.mark.parametrize("wrong", [{"points": 1}, {"minimize": "damage"}])
def test_a_front_needs_two_ends(wrong):
    with pytest.raises(ContractError):
        pareto_front(LAYERS, **wrong)
