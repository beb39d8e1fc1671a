"""The promise: a plan whose whole does not measure faster is given up, layer by layer, at the end to the original."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.artifact import Precision
from sepdeploy.core.measurement import Environment, Latency, Method, Quality
from sepdeploy.core.options import ConvertOptions, SelectionOptions
from sepdeploy.core.plan import Kept, Reason, SchemeOptions
from sepdeploy.core.progress import Silent
from sepdeploy.core.selection import Choice, LayerChoices, Selection
from sepdeploy.errors import UsageError
from sepdeploy.planning.candidates import propose_plan
from sepdeploy.planning.guard import Guarded
from sepdeploy.planning.select import plan_of
from sepdeploy.planning.solve import solve
from sepdeploy.render.selection import explanation
from sepdeploy.stages import select
from sepdeploy.stages.select import with_plan

NAMES = ("0", "2", "4", "6", "8")
QUALITY = Quality(10, None, 1.0, None, 0.0, 0.0, "agreement")


class Plans:
    """What `Search` offers to the check by the clock, without images."""

    gap = 0.0

    def __init__(self, weighed: Selection, traced) -> None:
        self.weighed, self.traced, self.limits = weighed, traced, None
        self.finished = 0

    def sketch(self, plan):
        return nn.Identity()

    def finish(self, plan, limit_points):
        self.finished += 1
        return Guarded(plan, nn.Identity(), (), (), QUALITY)

    def _plan(self, chosen):
        return plan_of(self.traced, self.weighed.layers, chosen, "ms", "ort float32")

    def within_drop(self, limit_points):
        return self.finish(self._plan({layer.name: layer.choices[1] for layer in self.weighed.layers}), None)

    def least_damage(self):
        return self._plan(solve(self.weighed.layers, minimize="damage", limits=self.limits).chosen)


@pytest.fixture
def weighed_and_traced():
    layers = [nn.Conv2d(8, 8, 3, padding=1) if place % 2 == 0 else nn.ReLU() for place in range(9)]
    traced = trace_network(nn.Sequential(*layers).eval(), torch.zeros(1, 8, 6, 6))
    forms = propose_plan(traced, "depthwise_separable", SchemeOptions(terms=1)).replaced
    weighed = []
    for place, (name, form) in enumerate(forms.items()):
        gain = 0.1 * (place + 1)  # the first layers gain least
        dense = Choice("dense", None, (), 0.0, 0.0, 0.0, 0.0, 1000, 584, peak_bytes=500)
        numbers = (-gain, -gain - 0.05, -gain + 0.05, 0.01, form.macs, form.params)
        weighed.append(LayerChoices(name, (dense, Choice("one", form, (), *numbers, peak_bytes=300))))
    chosen = dict.fromkeys(forms, "dense")
    selection = Selection(chosen, "abc", "ort", Precision.FLOAT32, 1, "ms", Method.WALL_CLOCK, 4.0, tuple(weighed))
    return selection, traced


def run(weighed_and_traced, speedup_of, limit=1.0, **selection):
    weighed, traced = weighed_and_traced
    options = ConvertOptions(Path("m.pt"), "a:b", "c", selection=SelectionOptions(**selection))
    timed = []

    def latency(plan, network) -> Latency:
        timed.append(tuple(plan.replaced))
        low, middle, high = speedup_of(plan.replaced)
        return Latency(
            4.0 / middle, 1.0, 1.0, 1.0, 10, 1, Method.WALL_CLOCK, Environment("", 1, "", "", 1), "",
            speedup=middle, speedup_low=low, speedup_high=high,
        )  # fmt: skip

    plans = Plans(weighed, traced)
    guarded, summary = select._Run(options, weighed, plans, traced, limit, latency, Silent()).result()
    assert plans.finished == 1 + bool(summary.given_up)  # a full transfer costs minutes
    return guarded.plan, summary, timed


def test_a_faster_plan_is_handed_over_with_its_prediction(weighed_and_traced):
    plan, summary, timed = run(weighed_and_traced, lambda replaced: (1.4, 1.6, 1.8))
    assert tuple(plan.replaced) == NAMES
    assert timed == [NAMES]
    assert summary.predicted_cost == pytest.approx(4.0 - 1.5)
    assert summary.measured_cost == pytest.approx(2.5)
    assert (summary.speedup_low, summary.given_up) == (1.4, ())


def test_the_layers_of_the_least_sure_gain_are_given_up_first(weighed_and_traced):
    plan, summary, timed = run(weighed_and_traced, lambda r: (0.98, 1.01, 1.1) if len(r) > 2 else (1.01, 1.1, 1.2))
    assert [len(names) for names in timed] == [5, 4, 3, 2]
    assert tuple(plan.replaced) == ("6", "8")
    assert summary.given_up == ("0", "2", "4")
    assert {plan.kept[name].reason for name in summary.given_up} == {Reason.NOT_FASTER_WHOLE}
    assert plan.kept["0"].detail == "0.98 to 1.10x the original's speed with it"
    assert summary.predicted_cost == pytest.approx(4.0 - 0.9)


def test_a_plan_that_is_not_proven_to_be_the_best_says_so(weighed_and_traced, monkeypatch):
    monkeypatch.setattr(Plans, "gap", 0.02)
    _, summary, _ = run(weighed_and_traced, lambda r: (1.4, 1.6, 1.8))
    assert summary.notes == ("the solver ran out of time: another plan may be better by up to 2%",)


def test_what_is_never_faster_ends_with_the_original(weighed_and_traced):
    plan, summary, timed = run(weighed_and_traced, lambda r: (1.0, 1.2, 1.4))  # the lower end must be above 1
    assert not plan.replaced
    assert set(summary.given_up) == set(NAMES)
    assert (summary.measured_cost, summary.speedup, summary.predicted_cost) == (None, None, 4.0)
    assert len(timed) == 5


def test_another_goal_is_not_judged_by_the_clock(weighed_and_traced):
    plan, summary, timed = run(weighed_and_traced, lambda r: (0.5, 0.5, 0.5), goal="macs")
    assert len(plan.replaced) == 5
    assert not timed
    assert summary.speedup is None


def test_a_limit_of_latency_is_solved_anew_where_the_whole_is_slower_than_its_parts(weighed_and_traced):
    # The whole takes 0.2 ms more than the parts say.
    def speedup_of(replaced):
        saved = sum(0.1 * (NAMES.index(name) + 1) for name in replaced)
        speedup = 4.0 / (4.0 - saved + 0.2)
        return (0.99 * speedup, speedup, 1.01 * speedup)

    plan, summary, timed = run(weighed_and_traced, speedup_of, limit=None, max_latency=3.25)
    assert len(timed) >= 2
    assert summary.measured_cost <= 3.25 + 1e-9
    assert len(plan.replaced) < 5
    plan, summary, _ = run(weighed_and_traced, lambda r: (2.0, 2.0, 2.0), limit=None, max_latency_ratio=0.9)
    assert tuple(plan.replaced) == ("8",) or summary.predicted_cost <= 3.6


def test_a_limit_that_the_whole_misses_is_not_called_unreachable(weighed_and_traced):
    # The whole takes as long as the original, whatever is replaced: the fastest plan is handed over, and measured.
    plan, _, timed = run(weighed_and_traced, lambda r: (1.01, 1.02, 1.03), limit=None, max_latency=3.0)
    assert len(timed[0]) < 5
    assert tuple(plan.replaced) == timed[-1] == NAMES


def test_forms_that_may_not_be_faster_are_not_taken(weighed_and_traced):
    weighed, _ = weighed_and_traced
    dense, one = weighed.layers[0].choices
    unsure = dataclasses.replace(one, difference=-0.1, difference_low=-0.3, difference_high=0.02)
    layer = select._sure(dataclasses.replace(weighed.layers[0], choices=(dense, unsure)))
    assert layer.choices == (dense,)
    assert layer.kept.reason is Reason.NOT_FASTER
    assert layer.kept.detail == "one: -0.1, 95% interval -0.3 to +0.02"
    both = select._sure(dataclasses.replace(weighed.layers[0], choices=(dense, unsure, one)))
    assert (both.choices, both.kept) == ((dense, one), None)


def test_limits_of_size_and_memory(weighed_and_traced):
    weighed, traced = weighed_and_traced
    options = ConvertOptions(Path("m.pt"), "a:b", "c", selection=SelectionOptions(max_memory_bytes=400))
    assert select._limits_of(options, weighed, traced).peak_bytes == 400
    plan, _, _ = run(weighed_and_traced, lambda r: (2.0, 2.0, 2.0), limit=None, max_memory_bytes=400)
    assert len(plan.replaced) == 5
    params = weighed.layers[0].choices[1].params
    assert traced.total_params == 5 * 584
    plan, _, _ = run(
        weighed_and_traced, lambda r: (2.0, 2.0, 2.0), limit=None, max_size_bytes=4 * (3 * 584 + 2 * params)
    )
    assert len(plan.replaced) == 2


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_latency": 2.4}, "fastest plan is predicted at 2.5 ms, the original takes 4"),
        ({"max_latency_ratio": 0.5}, "fastest plan is predicted at 2.5 ms"),
        ({"max_size_bytes": 100}, "smallest plan has 2,880 bytes of weights"),
        ({"max_memory_bytes": 200}, "the least peak of activations is 300 bytes"),
    ],
)
def test_limits_out_of_reach_are_refused_with_what_can_be_reached(weighed_and_traced, limits, message):
    with pytest.raises(UsageError, match=message):
        run(weighed_and_traced, lambda r: (2.0, 2.0, 2.0), limit=None, **limits)


def test_what_was_asked_for_is_not_given_up_for_speed(weighed_and_traced):
    plan, _, timed = run(weighed_and_traced, lambda r: (0.5, 0.6, 0.7), limit=None, max_memory_bytes=400)
    assert len(plan.replaced) == 5
    assert not timed


def test_the_plan_goes_back_into_the_file(weighed_and_traced):
    weighed, traced = weighed_and_traced
    chosen = {layer.name: layer.choices[layer.name == "4"] for layer in weighed.layers}
    plan = plan_of(traced, weighed.layers, chosen, "ms", "ort float32")
    kept = Kept(Reason.NOT_FASTER_WHOLE, "0.9 to 1.1x the original's speed with it")
    after = with_plan(weighed, plan.with_outcome("4", kept))
    assert after.chosen["4"] == "dense"
    assert after.taken_back["4"].endswith("(0.9 to 1.1x the original's speed with it)")
    assert after.taken_back["4"] in explanation(after, "4")[1]
    assert with_plan(weighed, plan).taken_back == {}
    assert with_plan(weighed, plan).chosen == {**dict.fromkeys(NAMES, "dense"), "4": "one"}
