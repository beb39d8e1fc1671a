"""What is weighed for each layer, and why the rest is not."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.plan import Kept, Reason, SchemeOptions
from sepdeploy.errors import UsageError
from sepdeploy.planning import choices
from sepdeploy.planning.choices import GRID, MAX_FORMS, propose_choices
from sepdeploy.schemes.scheme import SCHEMES, find_scheme
from sepdeploy.transfer.isolated import whitened_errors


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=32),
        nn.Conv2d(32, 48, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, 40),
    ).eval()


def propose(net=None, lowerings=lambda _form: ((),), **options):
    net = network() if net is None else net
    images = torch.randn(8, 3, 6, 6)
    trace = trace_network(net, images[:1], includes_linear=True)
    return {each.name: each for each in propose_choices(trace, net, lowerings, lambda: iter([images]), **options)}


def labels_of(layer):
    return [form.label for form in layer.forms]


@pytest.fixture(scope="module")
def proposed():
    return propose()


def test_every_layer_has_forms_or_a_reason(proposed):
    assert list(proposed) == ["0", "2", "4", "5", "8"]
    assert proposed["0"].kept == Kept(Reason.FEW_CHANNELS)
    assert proposed["4"].kept == Kept(Reason.DEPTHWISE)
    for name in ("0", "4"):
        assert not proposed[name].forms
        assert set(proposed[name].refused) == set(GRID)
    for name in ("2", "5", "8"):
        assert proposed[name].kept is None
        assert 1 < len(proposed[name].forms) <= MAX_FORMS
        assert len(set(labels_of(proposed[name]))) == len(proposed[name].forms)


def test_all_schemes_are_weighed_where_they_apply(proposed):
    assert set(GRID) == set(SCHEMES) - {"dense", "depthwise"}
    assert {form.candidate.scheme for form in proposed["2"].forms} == set(GRID)
    for name in ("5", "8"):  # no spatial extent
        assert {form.candidate.scheme for form in proposed[name].forms} <= {
            "low_rank",
            "grouped",
            "optimized_separable",
        }
        assert proposed[name].refused["depthwise_separable"] == Reason.POINTWISE.value
    labels = labels_of(proposed["2"])
    assert {"depthwise_separable T=1", "depthwise_separable T=2", "grouped g=4", "low_rank r=8"} <= set(labels)


def test_forms_are_those_of_their_scheme_and_cheaper_than_dense(proposed):
    site = trace_network(network(), torch.zeros(1, 3, 6, 6)).site("2")
    for label, candidate, lowerings in proposed["2"].forms:
        assert candidate.macs < site.macs
        assert label.startswith(candidate.scheme)
        assert lowerings == ((),)
    (two,) = [form.candidate for form in proposed["2"].forms if form.label == "depthwise_separable T=2"]
    assert two.form == find_scheme("depthwise_separable").design(site.spec, SchemeOptions(terms=2))
    for scheme in GRID:
        macs = [form.candidate.macs for form in proposed["2"].forms if form.candidate.scheme == scheme]
        assert macs == sorted(macs)


def test_options_that_do_not_pay_are_refused_with_the_numbers(proposed):
    refused = proposed["2"].refused["spatial_separable rank_ratio=0.7"]
    assert refused.startswith(Reason.NOT_CHEAPER.value)
    assert "442368 MACs against 331776" in refused
    only = propose(schemes=["spatial_separable"], grid={"spatial_separable": [SchemeOptions(rank_ratio=0.7)]})["2"]
    assert only.kept == Kept(Reason.NOT_CHEAPER, "442368 MACs against 331776")
    assert not only.forms


def test_equal_forms_come_once_and_different_ones_have_different_labels():
    options = [SchemeOptions(rank_ratio=ratio) for ratio in (0.2, 0.21, 0.5)]
    layer = propose(grid={"low_rank": options})["2"]
    assert labels_of(layer) == ["low_rank r=6", "low_rank r=7", "low_rank r=16"]
    padded, uneven = (SchemeOptions(groups=(3,), group_rounding=rounding) for rounding in ("padded", "uneven"))
    layer = propose(grid={"grouped": [padded, uneven, uneven]})["2"]
    assert labels_of(layer) == ["grouped g=3", "grouped g=3 #2"]
    middle = [
        SchemeOptions(groups=(4, 4), middle_channels=(channels,), kernel_position=place)
        for channels in (32, 16)
        for place in (1, 2)
    ]
    layer = propose(grid={"optimized_separable": middle})["2"]
    assert {f"optimized_separable g=4,4{rest}" for rest in ("", " k@2", " C=16", " C=16 k@2")} == {
        *labels_of(layer),
        *layer.refused,
    }


def test_forms_in_which_schemes_meet_come_once(proposed):
    forms = [form.candidate.form for form in proposed["2"].forms]
    assert len(set(forms)) == len(forms)
    form = proposed["2"].forms[0].candidate
    other = replace(form, scheme="another scheme")
    assert choices._repeated({"a": form, "b": other, "c": form}) == {"b": "the same as a", "c": "the same as a"}


def test_a_form_that_costs_more_and_errs_more_is_dominated():
    groups = {"good": (8, 2), "bad": (4, 16)}
    grid = {"optimized_separable": [SchemeOptions(groups=g, kernel_position=1) for g in groups.values()]}
    net, images = network(), torch.randn(8, 3, 6, 6)
    site = trace_network(net, images[:1]).site("2")
    layer = propose(net, grid=grid)["2"]
    assert labels_of(layer) == ["optimized_separable g=8,2"]
    assert layer.refused["optimized_separable g=4,16"].startswith("optimized_separable g=8,2 costs no more and errs by")
    apart = {
        options.groups: propose(net, grid={"optimized_separable": [options]})["2"] for options in grid.popitem()[1]
    }
    candidates = [apart[each].forms[0].candidate for each in groups.values()]
    assert candidates[0].macs <= candidates[1].macs
    good, bad = whitened_errors(net, site, candidates, lambda: iter([images]))
    assert good < bad


def test_a_form_that_costs_more_but_errs_less_is_weighed(monkeypatch):
    def errors(_net, _site, candidates, _batches):
        return [-candidate.macs for candidate in candidates]

    monkeypatch.setattr(choices, "whitened_errors", errors)
    grid = {"optimized_separable": [SchemeOptions(groups=g, kernel_position=1) for g in ((8, 2), (4, 16))]}
    assert len(propose(grid=grid)["2"].forms) == 2


def test_forms_are_compared_only_with_their_like(monkeypatch):
    monkeypatch.setattr(choices, "whitened_errors", lambda _net, _site, candidates, _batches: [1.0] * len(candidates))
    # Of equal error, but of another structure, with narrower groups, or not cheaper in everything.
    grid = {
        "depthwise_separable": [SchemeOptions(terms=1), SchemeOptions(terms=2)],
        "grouped": [SchemeOptions(groups=(2,)), SchemeOptions(groups=(8,))],
        "low_rank": [SchemeOptions(rank_ratio=0.5), SchemeOptions(rank_ratio=0.75)],
    }
    assert len(propose(grid=grid)["2"].forms) == 6
    # Groups of 16 channels and more are all wide enough.
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3)).eval()
    wide = {"grouped": [SchemeOptions(groups=(2,)), SchemeOptions(groups=(4,))]}
    layer = propose(net, grid=wide)["1"]
    assert labels_of(layer) == ["grouped g=4"]
    assert "grouped g=4 costs no more" in layer.refused["grouped g=2"]


def test_of_two_equal_in_everything_the_first_stays(monkeypatch):
    monkeypatch.setattr(choices, "whitened_errors", lambda _net, _site, candidates, _batches: [1.0] * len(candidates))
    monkeypatch.setattr(choices, "_costs", lambda _candidate, _site: (1.0,))
    grid = {"grouped": [SchemeOptions(groups=(g,)) for g in (2, 4, 8)]}
    assert labels_of(propose(grid=grid)["2"]) == ["grouped g=8"]  # cheapest first


def test_more_forms_than_are_worth_measuring_are_thinned(monkeypatch):
    every = propose(schemes=["depthwise_separable", "grouped"])["2"]
    assert len(every.forms) == 7
    monkeypatch.setattr(choices, "MAX_FORMS", 6)
    some = propose(schemes=["depthwise_separable", "grouped"])["2"]
    assert labels_of(some) == [
        "depthwise_separable T=1",
        "depthwise_separable T=2",
        "depthwise_separable T=4",
        "grouped g=8",
        "grouped g=4",
        "grouped g=2",
    ]
    assert some.refused["depthwise_separable T=3"] == (
        "6 forms per layer are measured: of depthwise_separable 3, spread over 4"
    )


def test_the_target_says_how_a_form_may_be_written_and_refuses_what_it_cannot_run():
    def lowerings(form):
        return () if len(form.terms) > 1 else ((), ("fold_shuffle",))

    layer = propose(lowerings=lowerings, schemes=["depthwise_separable", "grouped"])["2"]
    assert labels_of(layer)[0] == "depthwise_separable T=1"
    assert "depthwise_separable T=2" not in labels_of(layer)
    assert layer.refused["depthwise_separable T=2"] == "the target has no way to run it"
    assert all(form.lowerings == ((), ("fold_shuffle",)) for form in layer.forms)
    nothing = propose(lowerings=lambda _form: ())["2"]
    assert not nothing.forms
    assert nothing.kept is None  # it is the target's doing: the refusals say so


def test_schemes_without_a_grid_are_refused():
    with pytest.raises(UsageError, match="no grid for the scheme 'dense'; choose among depthwise_separable, "):
        propose(schemes=["dense"])


def test_structural_reasons_are_kept(make_net):
    net, x = make_net("shared_weight")
    proposed = propose_choices(trace_network(net, x), net, lambda _form: ((),), lambda: iter([x]))
    assert {each.kept for each in proposed} == {Kept(Reason.SHARED_WEIGHT)}
