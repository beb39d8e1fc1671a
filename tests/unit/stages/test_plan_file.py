import dataclasses

import pytest
import torch
from torch import nn

from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.artifact import Precision
from sepdeploy.core.codec import write_json
from sepdeploy.core.measurement import Method
from sepdeploy.core.plan import Reason, SchemeOptions
from sepdeploy.core.selection import Choice, LayerChoices, Selection
from sepdeploy.errors import UsageError
from sepdeploy.planning.candidates import propose_plan
from sepdeploy.stages.plan_file import read_given_plan


@pytest.fixture
def traced():
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3)).eval()
    return trace_network(net, torch.zeros(1, 8, 9, 9))


@pytest.fixture
def selection(traced):
    forms = propose_plan(traced, "depthwise_separable", SchemeOptions(terms=1)).replaced
    layers = []
    for site in traced.sites:
        form = forms[site.name]
        dense = Choice("dense", None, (), 0.0, 0.0, 0.0, 0.0, site.macs, site.params)
        one = Choice("one term", form, ("fold_norm",), -0.5, -0.6, -0.4, 0.1, form.macs, form.params)
        layers.append(LayerChoices(site.name, (dense, one)))
    return Selection(
        {"0": "one term", "2": "dense"}, "abc", "ort", Precision.FLOAT32, 1, "ms", Method.WALL_CLOCK, 2.0, tuple(layers)
    )


def test_what_is_chosen_becomes_the_plan(tmp_path, traced, selection):
    write_json(tmp_path / "plan.json", selection)
    plan = read_given_plan(tmp_path / "plan.json", traced, "abc")
    assert list(plan.replaced) == ["0"]
    assert plan.replaced["0"].lowering == ("fold_norm",)
    assert plan.lowered_for == "ort float32"
    assert plan.kept["2"].reason is Reason.NOT_CHOSEN
    assert "one term: -0.5 ms, damage 0.1" in plan.kept["2"].detail

    edited = (tmp_path / "plan.json").read_text().replace('"2": "dense"', '"2": "one term"')
    (tmp_path / "edited.json").write_text(edited)
    assert list(read_given_plan(tmp_path / "edited.json", traced, "abc").replaced) == ["0", "2"]


def test_layers_that_the_plan_does_not_list_stay(tmp_path, selection, traced):
    shorter = dataclasses.replace(selection, layers=selection.layers[:1], chosen={"0": "one term"})
    write_json(tmp_path / "plan.json", shorter)
    plan = read_given_plan(tmp_path / "plan.json", traced, "abc")
    assert list(plan.replaced) == ["0"]
    assert plan.kept["2"].detail == "the plan does not list it"


def test_the_plan_of_a_bundle_is_taken_as_it_is(tmp_path, traced):
    plan = propose_plan(traced, "low_rank", SchemeOptions())
    write_json(tmp_path / "plan.json", plan)
    assert read_given_plan(tmp_path / "plan.json", traced, "any") == plan


def test_plans_of_other_networks_are_refused(tmp_path, traced, selection):
    path = tmp_path / "plan.json"
    write_json(path, selection)
    with pytest.raises(UsageError, match="another checkpoint"):
        read_given_plan(path, traced, "def")
    other = trace_network(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)), torch.zeros(1, 8, 9, 9))
    with pytest.raises(UsageError, match="decides about 2, which the network does not have"):
        read_given_plan(path, other, "abc")
    narrow = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 12, 3))
    with pytest.raises(UsageError, match="gives 0 a form for other channels"):
        read_given_plan(path, trace_network(narrow, torch.zeros(1, 4, 9, 9)), "abc")


@pytest.mark.parametrize("text", ["", "[]", '{"layers": 3}', '{"decisions": "x"}', '{"layers": [], "chosen": {}}'])
def test_files_that_are_no_plan_are_refused(tmp_path, traced, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UsageError, match=r"plan\.json"):
        read_given_plan(tmp_path / "plan.json", traced, "abc")
    with pytest.raises(UsageError, match=r"nothing\.json"):
        read_given_plan(tmp_path / "nothing.json", traced, "abc")


def test_a_layer_without_a_faster_form_says_so(tmp_path, traced, selection):
    dense, one = selection.layers[1].choices
    slower = LayerChoices("2", (dense, dataclasses.replace(one, difference=0.2)))
    nothing = LayerChoices("0", selection.layers[0].choices[:1], {"low_rank r=4": "no runtime"})
    changed = dataclasses.replace(selection, layers=(nothing, slower), chosen={"0": "dense", "2": "dense"})
    write_json(tmp_path / "plan.json", changed)
    kept = read_given_plan(tmp_path / "plan.json", traced, "abc").kept
    assert (kept["0"].reason, kept["0"].detail) == (Reason.NOTHING_WEIGHED, "low_rank r=4: no runtime")
    assert kept["2"].reason is Reason.NOT_FASTER
