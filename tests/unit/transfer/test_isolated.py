"""Transfers from sums alone against `transfer_layer`, which reads images anew for every form."""

import pytest
import torch
from torch import nn

from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.plan import Candidate, SchemeOptions
from sepdeploy.errors import ContractError, UnsupportedModelError
from sepdeploy.schemes.module import ChainLinear
from sepdeploy.schemes.scheme import find_scheme
from sepdeploy.transfer import isolated, refine
from sepdeploy.transfer.isolated import isolated_transfers, whitened_errors
from sepdeploy.transfer.last_factors import grouped_outputs, last_factor_columns
from sepdeploy.transfer.layer import transfer_layer
from sepdeploy.transfer.moments import LeastSquaresSums, patch_moments
from sepdeploy.transfer.prefix import run_until

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # PyTorch's own

FORMS = [
    ("depthwise_separable", SchemeOptions(terms=1)),
    ("depthwise_separable", SchemeOptions(terms=2)),
    ("spatial_separable", SchemeOptions(rank_ratio=0.3)),
    ("low_rank", SchemeOptions(rank_ratio=0.4)),
    ("grouped", SchemeOptions(groups=(2,))),
    ("optimized_separable", SchemeOptions(groups=(3, 2))),
    ("optimized_separable", SchemeOptions(groups=(2, 3), kernel_position=2)),
    ("optimized_separable", SchemeOptions(factors=3)),
    ("spatial_optimized", SchemeOptions()),
]
OF_GROUPED = FORMS[:4]
POINTWISE = [FORMS[3], FORMS[4], FORMS[5]]
LAYERS = {
    "plain": (lambda: nn.Conv2d(8, 10, 3, padding=1), FORMS),
    "strided": (lambda: nn.Conv2d(8, 8, (3, 4), stride=2, padding=(1, 2), bias=False), FORMS[::2]),
    "dilated": (lambda: nn.Conv2d(8, 8, 3, dilation=2, padding="same", padding_mode="reflect"), FORMS[1::2]),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, padding=1, groups=2), OF_GROUPED),
    "pointwise": (lambda: nn.Conv2d(8, 10, 1, stride=2), POINTWISE),
}


@pytest.fixture(autouse=True)
def short_descents(monkeypatch):
    """What is promised holds after any number of steps."""
    monkeypatch.setattr(refine, "_MAX_ROUNDS", 1)
    monkeypatch.setattr(refine, "_ITERATIONS_PER_ROUND", 4)


class Net(nn.Module):
    def __init__(self, layer, calls=1):
        super().__init__()
        self.before = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.layer, self.norm, self.calls = layer, nn.Identity(), calls

    def forward(self, x):
        x = self.before(x)
        for _ in range(self.calls):
            x = torch.relu(self.norm(self.layer(x)))
        return x


def with_norm(net, channels):
    """A norm of uneven slopes: the fit counts each channel as the norm does."""
    net.norm = nn.BatchNorm2d(channels)
    nn.init.uniform_(net.norm.weight, 0.2, 3)
    return net


def case(name, count=16, calls=1):
    torch.manual_seed(0)
    make, forms = LAYERS[name]
    layer = make()
    net = with_norm(Net(layer, calls), layer.out_channels).eval()
    coarse = torch.randn(count, 8, 4, 4)
    images = nn.functional.interpolate(coarse, size=12, mode="bilinear") + 0.1 * torch.randn(count, 8, 12, 12)
    site = trace_network(net, images[:1]).site("layer")
    candidates = [
        Candidate(scheme, find_scheme(scheme).design(site.spec, options), macs=0, params=0) for scheme, options in forms
    ]
    return net, site, candidates, lambda: iter(images.split(8))


@torch.no_grad()
def error_of(module, net, site, batches):
    """Relative error behind the norm, where it counts."""
    error = energy = 0.0
    for batch in batches():
        seen = run_until(net, site.name, batch, calls=len(site.calls), needs_outputs=True)
        for x, y in zip(seen.inputs, seen.outputs, strict=True):
            wanted = net.norm(y)
            error += float((net.norm(module(x)) - wanted).square().sum())
            energy += float((wanted - net.norm(torch.zeros_like(y))).square().sum())
    return (error / energy) ** 0.5


@pytest.mark.parametrize("name", LAYERS)
def test_as_good_as_the_transfer_of_each_form_alone(name):
    net, site, candidates, batches = case(name)
    for candidate, module in zip(candidates, isolated_transfers(net, site, candidates, batches), strict=True):
        alone, _ = transfer_layer(net, net, site, candidate, batches, "anchored", is_quick=True)
        expected, found = (error_of(each, net, site, batches) for each in (alone, module))
        assert found == pytest.approx(expected, rel=0.1, abs=2e-3), candidate.scheme
        assert not module.training
        assert module.form == candidate.form.with_output_bias()


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_sums_of_the_last_factors_follow_from_those_of_the_windows(name):
    net, site, candidates, batches = case(name)
    layer = isolated._layer_of(net, site, batches)
    sums = isolated._window_sums(layer, net, batches)
    for candidate in candidates:
        module = layer.module(candidate, None)
        mapped = isolated._mapped(sums.total, isolated._map_to_last_factors(module), module)
        out_groups = module.form.terms[0].factors[-1].out_groups
        read = LeastSquaresSums(*mapped.gram.shape[:1], mapped.gram.shape[1] - 1, mapped.cross.shape[2])
        for batch in batches():
            seen = run_until(net, site.name, batch, calls=1, needs_outputs=True)
            targets = seen.outputs[0] * layer.slopes[:, None, None].float()
            read.add(last_factor_columns(module, seen.inputs[0]), grouped_outputs(targets, out_groups))
        assert mapped.positions == read.positions
        assert mapped.target_energy == pytest.approx(read.target_energy, rel=1e-4)
        for found, expected in ((mapped.gram, read.gram), (mapped.cross, read.cross)):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_moments_of_the_first_factor_follow_from_those_of_the_windows(name):
    net, site, candidates, batches = case(name)
    layer = isolated._layer_of(net, site, batches)
    gram = isolated._window_sums(layer, net, batches).total.gram[:, :-1, :-1]
    compared = 0
    for candidate in candidates:
        first = candidate.form.terms[0].factors[0]
        found = isolated._first_moments(gram, site.spec, first)
        module = layer.module(candidate, None)
        expected = torch.zeros_like(found)
        for batch in batches():
            (x,) = run_until(net, site.name, batch, calls=1, needs_outputs=False).inputs
            expected += patch_moments(module.pad(x), first)
        if first.kernel_size == site.spec.kernel_size:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
            compared += 1
        else:  # windows see the same pixels, but not each of them equally often
            difference = found / found.norm() - expected / expected.norm()
            assert float(difference.norm()) < 0.1, candidate.scheme
    assert compared >= 2


def test_whitened_errors_are_those_of_the_closed_forms():
    net, site, candidates, batches = case("plain")
    net.norm = nn.Identity()
    errors = whitened_errors(net, site, candidates, batches)
    for candidate, error in zip(candidates, errors, strict=True):
        whitened, _ = transfer_layer(net, net, site, candidate, batches, "whitened")
        assert error == pytest.approx(error_of(whitened, net, site, batches), rel=0.1), candidate.scheme
    # More terms err less, and fitting them on top of the closed form errs less still.
    assert errors[1] < errors[0]
    fitted = [error_of(m, net, site, batches) for m in isolated_transfers(net, site, candidates, batches)]
    assert all(a < b for a, b in zip(fitted, errors, strict=True))


@pytest.mark.parametrize("most_features", [72, 71])
def test_all_factors_are_refined(monkeypatch, most_features):
    """Until held-out positions stop gaining, or in wider layers for one round."""
    monkeypatch.setattr(refine, "_ITERATIONS_PER_ROUND", 15)
    monkeypatch.setattr(isolated, "_MAX_ROUNDS_FEATURES", most_features)
    net, site, candidates, batches = case("plain")
    refined = [error_of(m, net, site, batches) for m in isolated_transfers(net, site, candidates, batches)]
    descents = []
    monkeypatch.setattr(isolated, "refine_factors", lambda _module, *sums: descents.append(sums))
    solved = [error_of(m, net, site, batches) for m in isolated_transfers(net, site, candidates, batches)]
    for candidate, after, before in zip(candidates, refined, solved, strict=True):
        if candidate.scheme in ("low_rank", "grouped"):  # solved for in closed form
            assert after == before
        else:
            assert after <= before, candidate.scheme
    assert sum(refined) < 0.98 * sum(solved)
    assert len(descents) == len(candidates) - 2
    assert all((held_out.positions == 0) == (most_features == 71) for _, held_out in descents)


def test_layers_too_wide_for_window_sums_get_their_last_factors_solved(monkeypatch):
    net, site, candidates, batches = case("plain")
    candidates = [*candidates[:3], candidates[5]]
    narrow = [error_of(m, net, site, batches) for m in isolated_transfers(net, site, candidates, batches)]
    monkeypatch.setattr(isolated, "MAX_WINDOW_FEATURES", 71)
    wide = list(isolated_transfers(net, site, candidates, batches))
    found = [error_of(m, net, site, batches) for m in wide]
    whitened = [transfer_layer(net, net, site, c, batches, "whitened")[0] for c in candidates]
    for a, b, closed in zip(narrow, found, whitened, strict=True):
        assert 0.98 * a < b < error_of(closed, net, site, batches)
    monkeypatch.setattr(isolated, "_SUM_BYTES", 1)  # several passes, the same result
    for one, other in zip(wide, isolated_transfers(net, site, candidates, batches), strict=True):
        assert torch.equal(one.weight, other.weight)
    errors = whitened_errors(net, site, candidates, batches)
    assert errors[1] < errors[0] < 1


def test_layers_called_twice_are_fitted_on_both_calls():
    torch.manual_seed(0)
    net, site, _, batches = case("strided")
    net = Net(nn.Conv2d(8, 8, 3, padding=1), calls=2).eval()
    site = trace_network(net, next(batches())[:1]).site("layer")
    form = find_scheme("spatial_separable").design(site.spec, SchemeOptions(rank_ratio=0.3))
    candidate = Candidate("spatial_separable", form, macs=0, params=0)
    (module,) = isolated_transfers(net, site, [candidate], batches)
    alone, _ = transfer_layer(net, net, site, candidate, batches, "anchored", is_quick=True)
    assert error_of(module, net, site, batches) == pytest.approx(error_of(alone, net, site, batches), rel=0.05)


def test_linear_layers_are_fitted_too():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4)).eval()
    images = torch.randn(64, 4) @ torch.randn(4, 32) + 0.1 * torch.randn(64, 32)
    site = trace_network(net, images[:1], includes_linear=True).site("1")
    form = find_scheme("low_rank").design(site.spec, SchemeOptions(rank_ratio=0.34))
    (module,) = isolated_transfers(
        net, site, [Candidate("low_rank", form, macs=0, params=0)], lambda: iter(images.split(16))
    )
    assert isinstance(module, ChainLinear)
    with torch.no_grad():
        expected = net[1](images)
        assert float((module(images) - expected).norm() / expected.norm()) < 0.1


def test_large_maps_are_sampled(monkeypatch):
    net, site, candidates, batches = case("plain", count=40)
    candidates = candidates[1:3]
    expected = [error_of(m, net, site, batches) for m in isolated_transfers(net, site, candidates, batches)]
    monkeypatch.setattr(isolated, "_LEAST_POSITIONS", 1)  # 1,152 positions of 5,760 are left
    monkeypatch.setattr(isolated, "_ENOUGH_IMAGES", 40)
    sums = isolated._window_sums(isolated._layer_of(net, site, batches), net, batches)
    assert 1152 <= sums.total.positions <= 1162
    found = [error_of(m, net, site, batches) for m in isolated_transfers(net, site, candidates, batches)]
    assert found == pytest.approx(expected, rel=0.15)


def test_refusals():
    net, site, candidates, batches = case("plain")
    with pytest.raises(ContractError, match="no calibration images"):
        list(isolated_transfers(net, site, candidates, lambda: iter(())))
    with torch.no_grad():
        net.before[0].weight.fill_(1e38)
    with pytest.raises(UnsupportedModelError, match="layer reads or returns NaN or values too large"):
        list(isolated_transfers(net, site, candidates, batches))
