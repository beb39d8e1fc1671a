"""What is said of the cheaper plan that recovery left room for."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from sepdeploy.core.looser_plan import LooserOutcome, LooserPlan, TriedPlan
from sepdeploy.core.options import ConvertOptions, SelectionOptions
from sepdeploy.stages.looser_plan import looser_notes, tried_plan

HELD = TriedPlan("ms", 10.0, 7.3, 1.35, 1.3, 1.4, drop_points=0.31)
FOUND = TriedPlan("ms", 10.0, 6.58, 1.49, 1.45, 1.53)
ROOM = "recovery left room under --max-drop (0.31 of 1 points lost), so a cheaper plan was tried: "
COSTS = (
    "predicted 1.52x faster than the original (the plan before it: 1.37x faster), measured as a whole 1.49x (before "
    "it: 1.35x)"
)


@pytest.mark.parametrize(
    ("outcome", "found", "error", "expected"),
    [
        (
            LooserOutcome.HANDED_OVER, replace(FOUND, drop_points=0.82), "",
            f"{COSTS}; its file lost 0.82 points; it is the plan that is handed over",
        ),
        (
            LooserOutcome.OVER_LIMIT, replace(FOUND, drop_points=1.2), "",
            f"{COSTS}; its file lost 1.20 points; that is more than --max-drop allows, so it was put aside",
        ),
        (
            LooserOutcome.NOT_CHEAPER, FOUND, "",
            f"{COSTS}; that is too little to be worth another recovery, so it was put aside",
        ),
        (
            LooserOutcome.FAILED, FOUND, "the training diverged",
            f"{COSTS}; it failed, so it was put aside (the training diverged)",
        ),
        (LooserOutcome.FAILED, None, "no memory", "it failed, so it was put aside (no memory)"),
    ],
)  # fmt: skip
def test_one_sentence_says_what_became_of_it(outcome, found, error, expected):
    assert looser_notes(LooserPlan(outcome, 1.0, 5.7, HELD, found, error)) == (ROOM + expected,)


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("MACs", "1.52x fewer MACs than the original (the plan before it: 1.37x fewer); "),
        ("kcycles", "predicted 1.52x fewer modelled cycles than the original (the plan before it: 1.37x fewer); "),
    ],
)
def test_what_is_counted_is_not_called_faster(unit, expected):
    held, found = (replace(plan, unit=unit, speedup=None) for plan in (HELD, FOUND))
    (note,) = looser_notes(LooserPlan(LooserOutcome.NOT_CHEAPER, 1.0, 5.7, held, found))
    assert expected in note


def test_where_none_was_tried_nothing_is_said():
    assert looser_notes(None) == ()


@pytest.mark.parametrize(
    ("goal", "expected"),
    [
        ("latency", TriedPlan("ms", 10.0, 7.3, 1.35, 1.3, 1.4)),
        ("params", TriedPlan("parameters", 100, 70)),
        ("macs", TriedPlan("MACs", 1000, 600)),
    ],
)
def test_a_plan_costs_what_it_was_chosen_to_make_small(goal, expected):
    selection = SimpleNamespace(
        unit="ms", original_cost=10.0, predicted_cost=7.3, speedup=1.35, speedup_low=1.3, speedup_high=1.4
    )
    plan = SimpleNamespace(replaced={"0": SimpleNamespace(params=20)}, macs_of=lambda _traced: 600)
    traced = SimpleNamespace(total_macs=1000, total_params=100, site=lambda _name: SimpleNamespace(params=50))
    options = ConvertOptions(Path("m.pt"), "a:b", "c", scheme="auto", selection=SelectionOptions(goal=goal))
    assert tried_plan(options, plan, SimpleNamespace(selection=selection), traced) == expected
