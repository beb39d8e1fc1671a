"""Damages against networks in which the layer is really replaced."""

import copy

import pytest
import torch
from torch import nn

from sepdeploy.analyze.damage import network_damage
from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.errors import ContractError
from sepdeploy.passes.replace_convs import replace_modules
from sepdeploy.planning import damage
from sepdeploy.planning.choices import propose_choices
from sepdeploy.planning.damage import deal_layers, images_per_form, measure_damages
from sepdeploy.transfer import refine
from sepdeploy.transfer.isolated import isolated_transfers

GRID = {
    "depthwise_separable": [SchemeOptions(terms=1), SchemeOptions(terms=2)],
    "low_rank": [SchemeOptions(rank_ratio=0.5)],
}


@pytest.fixture(autouse=True)
def short_descents(monkeypatch):
    monkeypatch.setattr(refine, "_MAX_ROUNDS", 1)
    monkeypatch.setattr(refine, "_ITERATIONS_PER_ROUND", 4)


class Net(nn.Module):
    """A stem, a residual block, class scores or maps."""

    def __init__(self, has_scores=True):
        super().__init__()
        self.stem, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.head, self.has_scores = nn.Linear(12, 5), has_scores

    def forward(self, x):
        x = self.relu(self.stem(x))
        x = self.relu(self.b(self.relu(self.a(x)) + x))
        scores = self.head(x.mean((2, 3)))
        return 4 * scores if self.has_scores else [x, scores]


class Case:
    def __init__(self, has_scores=True):
        torch.manual_seed(0)
        self.net = Net(has_scores).eval()
        self.images = torch.randn(80, 3, 10, 10)
        self.trace = trace_network(self.net, self.images[:1])
        self.fit = lambda: iter(self.images[:32].split(16))
        self.held_out = lambda: iter(self.images[32:].split(16))
        self.forms = propose_choices(self.trace, self.net, lambda _form: ((),), self.fit, grid=GRID)

    def measure(self, **options):
        return measure_damages(self.net, self.trace, self.forms, self.fit, self.held_out, **options)


@pytest.mark.parametrize("has_scores", [True, False])
def test_damages_are_those_of_the_network_with_one_form_in_place(has_scores):
    case = Case(has_scores)
    state = copy.deepcopy(case.net.state_dict())
    damages = case.measure()
    expected = {}
    for layer in case.forms:
        modules = isolated_transfers(
            case.net, case.trace.site(layer.name), [form.candidate for form in layer.forms], case.fit
        )
        for form, module in zip(layer.forms, modules, strict=True):
            replaced = copy.deepcopy(case.net)
            replace_modules(replaced, {layer.name: module})
            expected[layer.name, form.label] = network_damage(case.net, replaced, case.held_out())
    assert list(damages) == list(expected)
    assert damages == pytest.approx(expected, rel=1e-3)
    assert {name for name, _ in damages} == {"a", "b"}
    assert damages["a", "depthwise_separable T=2"] < damages["a", "depthwise_separable T=1"]
    assert all(torch.equal(value, state[key]) for key, value in case.net.state_dict().items())


def test_several_processes_share_the_layers():
    case = Case()
    alone = case.measure()
    parts = [case.measure(rank=rank, processes=2) for rank in (0, 1)]
    assert all(parts)
    assert not parts[0].keys() & parts[1].keys()
    told = []

    def gather(own):
        told.append(own)
        return parts

    gathered = case.measure(rank=1, processes=2, gather=gather)
    assert told == [parts[1]]
    assert gathered == alone
    assert list(gathered) == list(alone)
    # More processes than layers: some have nothing to do.
    assert case.measure(rank=2, processes=3) == {}


def test_layers_are_dealt_by_work():
    case = Case()
    hands = deal_layers(case.trace, case.forms, 2)
    names = [[layer.name for layer in hand] for hand in hands]
    assert names == [["a"], ["b"]]  # a comes first: it has the most to run; the stem has no forms
    (all_,) = deal_layers(case.trace, case.forms, 1)
    assert [layer.name for layer in all_] == ["a", "b"]


def test_larger_networks_are_measured_on_fewer_images(monkeypatch):
    case = Case()
    assert images_per_form(case.trace, case.forms) == 256
    macs = {site.name: site.macs for site in case.trace.sites}
    work = 3 * (case.trace.total_macs - macs["stem"]) + 3 * (case.trace.total_macs - macs["stem"] - macs["a"])
    monkeypatch.setattr(damage, "_WORK_MACS", 40 * work)
    assert images_per_form(case.trace, case.forms) == 40
    seen = []

    def held_out():
        for batch in case.images[32:].split(16):
            seen.append(len(batch))
            yield batch

    damages = measure_damages(case.net, case.trace, case.forms, case.fit, held_out)
    assert seen == 2 * [16, 16, 16]
    only_40 = measure_damages(case.net, case.trace, case.forms, case.fit, lambda: iter(case.images[32:72].split(16)))
    assert damages == only_40
    monkeypatch.setattr(damage, "_WORK_MACS", 1)
    assert images_per_form(case.trace, case.forms) == 32


def test_progress_counts_forms():
    seen = []
    Case().measure(progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 6), (6, 6)]


def test_what_comes_before_a_layer_runs_once_per_batch():
    case = Case()
    calls = []
    handle = case.net.stem.register_forward_hook(lambda *_: calls.append(1))
    fitted = list(
        isolated_transfers(case.net, case.trace.site("b"), [f.candidate for f in case.forms[2].forms], case.fit)
    )
    calls.clear()
    computed = []
    own = nn.Conv2d.forward

    def counting(self, x):
        computed.append(self)
        return own(self, x)

    nn.Conv2d.forward = counting
    try:
        damage._damages_of(case.net, "b", fitted, case.held_out())
    finally:
        nn.Conv2d.forward = own
        handle.remove()
    # Three batches, and once more to see that replaying is right.
    assert computed.count(case.net.stem) == 3
    assert computed.count(case.net.b) == 3 + 1


def test_no_images_are_refused():
    case = Case()
    with pytest.raises(ContractError, match="no held-out images"):
        measure_damages(case.net, case.trace, case.forms, case.fit, lambda: iter(()))
