from dataclasses import replace

import pytest
import torch
from torch import nn

from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.describe import describe_form
from sepdeploy.core.design import DesignOptions
from sepdeploy.core.plan import Reason, SchemeOptions
from sepdeploy.errors import UsageError
from sepdeploy.planning import design_network as module
from sepdeploy.planning.design_network import design_network
from sepdeploy.schemes.module import ChainConv2d

CODE = """
import torch
from torch import nn
import torch.nn.functional as F

class Net(nn.Module):
    def __init__(self, width=1.0):
        super().__init__()
        c = int(16 * width)
        self.stem = nn.Conv2d(3, c, 3, padding=1)
        self.norm = nn.BatchNorm2d(c)
        self.wide = nn.Conv2d(c, 2 * c, 3, stride=2, padding=1, bias=False)
        self.skip = nn.Conv2d(c, 2 * c, 1, stride=2)
        self.shared = nn.Conv2d(2 * c, 2 * c, 3, padding=1)
        self.again = nn.Conv2d(2 * c, 2 * c, 3, padding=1)
        self.again.weight = self.shared.weight
        self.held = [nn.Conv2d(2 * c, 2 * c, 3, padding=1)]
        self.own = self.held[0]
        self.last = nn.Linear(2 * c, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.wide(x) + self.skip(x))
        x = self.again(self.shared(self.held[0](x)))
        return self.last(x.mean((2, 3)))

def fixed():
    return Net()

def plain(width=1.0):
    c = int(16 * width)
    return nn.Sequential(
        nn.Conv2d(3, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU(),
        nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU(),
        nn.Conv2d(c, 2 * c, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(2 * c),
    )

class Looks(nn.Module):
    def forward(self, x):
        return x if x.mean() < 1e9 else -x

def looks(width=1.0):
    return nn.Sequential(Looks(), *plain(width))

built = plain()

def grouped():
    return nn.Conv2d(3, 12, 3, groups=3)
"""


@pytest.fixture(autouse=True)
def nets(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)


def options(**changes):
    return replace(DesignOptions("nets.py:plain", (3, 16, 16)), **changes)


def chains(network):
    return {name: part for name, part in network.named_modules() if isinstance(part, ChainConv2d)}


def test_a_variant_has_the_cost_that_its_result_says():
    designed = design_network(options(multiplier=2.0))
    result = designed.result
    traced = trace_network(designed.module.eval(), torch.zeros(1, 3, 16, 16))
    assert (traced.total_macs, traced.total_params) == (result.variant.macs, result.variant.params)
    assert result.arch == "nets.py:plain(width=2.0)"
    assert result.name == "o-plain_m2"
    assert (result.replaced, result.variant.convs) == (2, 3)
    assert list(chains(designed.module)) == ["3", "6"]
    assert designed.plan.kept["0"].reason is Reason.FEW_CHANNELS
    replaced = designed.plan.replaced
    fixed = result.variant.macs - sum(candidate.macs for candidate in replaced.values())
    assert fixed == 3 * 32 * 9 * 16 * 16
    for name, candidate in replaced.items():
        parts = designed.module.get_submodule(name)
        assert candidate.params == sum(p.numel() for p in parts.parameters())


@pytest.mark.parametrize("match", ["macs", "params", "both"])
def test_the_search_finds_what_the_built_network_costs(match):
    """The search runs on the meta device, the result comes from the network itself: they agree."""
    found = design_network(options(match=match)).result
    ratios = (found.variant.macs / found.original.macs, found.variant.params / found.original.params)
    wider = design_network(options(multiplier=found.multiplier + 0.125)).result.variant
    narrower = design_network(options(multiplier=found.multiplier - 0.125)).result.variant
    if match == "both":
        assert max(ratios) <= 1.01
        assert max(wider.macs / found.original.macs, wider.params / found.original.params) > 1.01
    else:
        cost, original = getattr(found.variant, match), getattr(found.original, match)
        assert all(abs(cost - original) <= abs(getattr(other, match) - original) for other in (wider, narrower))
    assert found.multiplier > 1
    assert cost_of_search(found) == found.variant


def cost_of_search(result):
    cost = module._cost_at(result.arch, {}, options())
    return replace(cost, convs=result.variant.convs)


def test_convolutions_that_cannot_be_replaced_stay():
    designed = design_network(options(arch="nets.py:Net", multiplier=1.5))
    assert list(chains(designed.module)) == ["wide"]
    reasons = {name: kept.reason for name, kept in designed.plan.kept.items()}
    assert reasons == {
        "stem": Reason.FEW_CHANNELS,
        "skip": Reason.POINTWISE,
        "shared": Reason.SHARED_WEIGHT,
        "again": Reason.SHARED_WEIGHT,
        "own": Reason.REPLACEMENT_FAILS,
    }


def test_pointwise_convolutions_are_replaced_on_demand():
    designed = design_network(options(arch="nets.py:Net", multiplier=1.0, replaces_pointwise=True))
    assert sorted(chains(designed.module)) == ["skip", "wide"]
    assert designed.module(torch.zeros(2, 3, 16, 16)).shape == (2, 10)
    separable = options(arch="nets.py:Net", multiplier=1.0, replaces_pointwise=True, scheme="depthwise_separable")
    assert list(chains(design_network(separable).module)) == ["wide"]


def test_a_network_that_looks_at_values_is_searched_on_the_cpu():
    on_meta, on_cpu = design_network(options()), design_network(options(arch="nets.py:looks"))
    assert on_cpu.result.multiplier == on_meta.result.multiplier > 1
    assert on_cpu.result.variant == on_meta.result.variant


def test_middle_norms_and_activations():
    designed = design_network(options(multiplier=1.0, middle="norm_activation", activation="relu6"))
    forms = {name: describe_form(part.form) for name, part in chains(designed.module).items()}
    assert all(text.count("norm, relu6, ") == 1 for text in forms.values())
    assert designed.module.training
    assert sum(isinstance(part, nn.ReLU6) for part in designed.module.modules()) == 2


def test_fresh_weights_have_the_variance_of_the_convolution_in_place():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second, other = (design_network(options(multiplier=4.0, seed=seed)).module for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    part = chains(first)["3"]
    with torch.no_grad():
        out = part(torch.randn(32, 64, 12, 12))[:, :, 2:-2, 2:-2] - part.bias[:, None, None]
    assert float(out.var()) == pytest.approx(1 / 3, rel=0.25)


def test_options_that_fit_no_convolution():
    with pytest.raises(UsageError, match=r"options do not fit its geometry: --kernel-position 9 is beyond"):
        design_network(options(multiplier=1.0, scheme_options=SchemeOptions(kernel_position=9)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "nets.py:fixed"}, "nets.py:fixed has no argument that scales its channels"),
        ({"arch": "nets.py:grouped", "multiplier": 1.0}, "replaces no convolution of nets.py:grouped: it is depthwise"),
        ({"scheme": "dense"}, "dense replaces no convolution of nets.py:plain: the dense scheme replaces nothing"),
        ({"width_argument": "depth"}, "has no argument 'depth'"),
        ({"input_shape": (5, 16, 16)}, "does not run on an input of shape"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(UsageError, match=message):
        design_network(options(**changes))


def test_a_fixed_network_is_designed_at_multiplier_one():
    result = design_network(options(arch="nets.py:fixed", multiplier=1.0)).result
    assert result.name == "o-fixed"
    assert result.arch == "nets.py:fixed"
    assert result.variant.macs < result.original.macs


def test_a_built_network_stays_as_it_is(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "nets_to_import.py").write_text((tmp_path / "nets.py").read_text())  # a name that no other test imports
    import nets_to_import as nets

    before = {name: value.clone() for name, value in nets.built.state_dict().items()}
    designed = design_network(options(arch="nets_to_import:built", multiplier=1.0))
    assert chains(designed.module)
    assert not chains(nets.built)
    assert nets.built.training
    assert all(torch.equal(before[name], value) for name, value in nets.built.state_dict().items())


@pytest.mark.parametrize(("scheme", "keeps"), [("depthwise", False), ("spatial_optimized", True), ("grouped", False)])
def test_receptive_fields(scheme, keeps):
    assert design_network(options(multiplier=1.0, scheme=scheme)).result.keeps_receptive_field is keeps


PAPER = [
    ("resnet20(shortcut='projection')", "optimized_separable", "o-resnet20_m3.625", "221710", "40704400"),
    ("resnet32(shortcut='projection')", "optimized_separable", "o-resnet32_m3.75", "367030", "67202400"),
    ("resnet20", "depthwise_separable", "d-resnet20_m2.75", "250194", "39025888"),
]


@pytest.mark.parametrize(("factory", "scheme", "name", "params", "macs"), PAPER)
def test_the_rule_gives_the_multipliers_of_the_paper(factory, scheme, name, params, macs):
    """Table 6; o-: .221 M, .04070 G and .367 M, .06726 G; d-: .250 M (printed as x2.72, .0400 G)."""
    middle = "norm" if scheme == "depthwise_separable" else "linear"
    rounding = SchemeOptions(terms=1, group_rounding="padded")
    result = design_network(
        DesignOptions(f"models.resnet_cifar:{factory}", (3, 32, 32), scheme, rounding, middle=middle)
    ).result
    assert result.name == name
    assert (str(result.variant.params), str(result.variant.macs)) == (params, macs)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [56, 110])
def test_the_deep_networks_of_the_paper(depth):
    arch = f"models.resnet_cifar:resnet{depth}(shortcut='projection')"
    result = design_network(
        DesignOptions(arch, (3, 32, 32), scheme_options=SchemeOptions(group_rounding="padded"))
    ).result
    assert result.multiplier == 3.875
