"""The solver against every plan there is, and what must hold for any limits."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sepdeploy.core.chain import Chain, ChainSum, Factor
from sepdeploy.core.plan import Candidate
from sepdeploy.core.selection import Choice, LayerChoices
from sepdeploy.planning.solve import Limits, UnreachableLimitError, solve

FORM = Candidate("grouped", ChainSum((Chain((Factor(4, 4, (3, 3), groups=2),)),)), 1, 1)
FIELDS = {"latency": "difference", "damage": "damage", "macs": "macs", "params": "params"}

quick = settings(deadline=None, max_examples=60, derandomize=True, database=None)


def choices(numbers):
    """A layer's choices from (difference, damage, macs, params); the first keeps the layer."""
    made = []
    for index, (difference, damage, macs, params) in enumerate(numbers):
        difference, damage = (difference, damage) if index else (0.0, 0.0)
        form = FORM if index else None
        made.append(Choice(str(index), form, (), difference, difference, difference, damage, macs, params))
    return tuple(made)


@st.composite
def problems(draw, number):
    offers = st.lists(number, min_size=1, max_size=4).map(choices)
    offered = draw(st.lists(offers, min_size=1, max_size=4))
    return [LayerChoices(str(index), each) for index, each in enumerate(offered)]


counts = st.integers(1, 6)
coarse = st.tuples(st.integers(-4, 3).map(float), st.integers(0, 3).map(float), counts, counts)  # with many ties
wide = st.tuples(
    st.tuples(st.sampled_from([-1, 1]), st.floats(-4, 4)).map(lambda pair: pair[0] * 10 ** pair[1]),
    st.one_of(st.just(0.0), st.floats(-6, 3).map(lambda exponent: 10**exponent)),
    st.integers(1, 10**11),
    st.integers(1, 10**8),
)


def total(plan, measure):
    return math.fsum(getattr(choice, FIELDS[measure]) for choice in plan)


@st.composite
def limited(draw, number):
    """A problem, an objective, and limits that are the sums of some plan, each of its own."""
    layers = draw(problems(number))
    plans = list(itertools.product(*(layer.choices for layer in layers)))
    measures = draw(st.sets(st.sampled_from(sorted(FIELDS))))
    limits = {measure: total(draw(st.sampled_from(plans)), measure) for measure in sorted(measures)}
    return layers, plans, draw(st.sampled_from(sorted(FIELDS))), limits


def rank(plan, objective):
    replaced = sum(choice.candidate is not None for choice in plan)
    return (total(plan, objective), total(plan, "damage"), total(plan, "latency"), replaced)


def within(plans, limits):
    return [plan for plan in plans if all(total(plan, each) <= most for each, most in limits.items())]


@given(limited(coarse))
@quick
def test_best_of_all_plans_with_its_tie_break(problem):
    layers, plans, objective, limits = problem
    allowed = within(plans, limits)
    if not allowed:
        with pytest.raises(UnreachableLimitError):
            solve(layers, minimize=objective, limits=Limits(**limits))
        return
    solution = solve(layers, minimize=objective, limits=Limits(**limits))
    found = tuple(solution.chosen.values())
    assert within([found], limits)
    assert rank(found, objective) == min(rank(plan, objective) for plan in allowed)
    assert solution.gap == 0


@given(limited(wide))
@quick
def test_best_of_all_plans_at_any_scale(problem):
    layers, plans, objective, limits = problem
    allowed = within(plans, limits)
    if not allowed:
        with pytest.raises(UnreachableLimitError):
            solve(layers, minimize=objective, limits=Limits(**limits))
        return
    solution = solve(layers, minimize=objective, limits=Limits(**limits))
    for measure, most in limits.items():
        reached = total(solution.chosen.values(), measure)
        assert reached <= most + 1e-8 * math.fsum(abs(getattr(c, FIELDS[measure])) for c in solution.chosen.values())
    least = min(total(plan, objective) for plan in allowed)
    spread = max(total(plan, objective) for plan in allowed) - least
    assert solution.objective <= least + 1e-6 * min(spread, max(abs(least), 1e-6))


@given(problems(wide), st.sampled_from(["latency", "damage"]), st.lists(st.floats(0, 1), min_size=2, max_size=4))
@quick
def test_a_tighter_limit_is_never_better(layers, objective, shares):
    limit = "damage" if objective == "latency" else "latency"
    free, least = solve(layers, minimize=objective), solve(layers, minimize=limit)
    low, high = least.objective, getattr(free, FIELDS[limit])
    objectives = [
        solve(layers, minimize=objective, limits=Limits(**{limit: low + (high - low) * share})).objective
        for share in sorted(shares)
    ]
    for tight, loose in itertools.pairwise(objectives):
        assert loose <= tight + 1e-7 * abs(tight)
