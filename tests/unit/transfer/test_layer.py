import copy
import weakref

import pytest
import torch
from torch import nn

from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.plan import Candidate, SchemeOptions
from sepdeploy.errors import UnsupportedModelError
from sepdeploy.passes.replace_convs import replace_modules
from sepdeploy.planning.candidates import propose_plan
from sepdeploy.planning.convert import convert_network
from sepdeploy.schemes.module import ChainConv2d
from sepdeploy.schemes.scheme import find_scheme
from sepdeploy.transfer import layer, refine
from sepdeploy.transfer.layer import transfer_layer
from sepdeploy.transfer.moments import LeastSquaresSums, patches
from sepdeploy.transfer.refine import refine_factors

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # PyTorch's own

SCHEMES = ["depthwise_separable", "spatial_separable"]
OPTIONS = SchemeOptions(terms=2, rank_ratio=0.3)


def correlated_images(count=24, channels=8, size=12, seed=0):
    """Smooth images whose channels resemble each other, as real activations do."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, size // 3, size // 3, generator=generator)
    mix = torch.randn(channels, 3, generator=torch.Generator().manual_seed(1234))  # whatever the seed: one distribution
    images = nn.functional.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
    noise = torch.randn(count, channels, size, size, generator=generator)
    return torch.einsum("oc,nchw->nohw", mix, images) + 0.05 * noise


@pytest.fixture(autouse=True)
def one_round(monkeypatch):
    """Descents short enough for a test; what is promised holds after any number of rounds."""
    monkeypatch.setattr(refine, "_MAX_ROUNDS", 1)
    monkeypatch.setattr(refine, "_ITERATIONS_PER_ROUND", 8)


def batches_of(images, size=8):
    return lambda: iter(images.split(size))


def transfer_all(net, x, scheme, method, images, options=OPTIONS):
    """Replace whatever has no structural reason, cheaper or not."""
    trace = trace_network(net, x)
    converted = copy.deepcopy(net)
    transfers = []
    for site in trace.sites:
        if site.reason is None:
            candidate = Candidate(scheme, find_scheme(scheme).design(site.spec, options), macs=0, params=0)
            module, transfer = transfer_layer(net, converted, site, candidate, batches_of(images), method)
            replace_modules(converted, {site.name: module})
            transfers.append(transfer)
    return converted, transfers


def output_error(net, converted, x):
    outputs, expected = (torch.utils._pytree.tree_leaves(n(x.clone())) for n in (converted, net))
    pairs = [(y, z) for y, z in zip(outputs, expected, strict=True) if isinstance(y, torch.Tensor)]
    difference = sum(float((y - z).square().sum()) for y, z in pairs)
    return (difference / sum(float(z.square().sum()) for _, z in pairs)) ** 0.5


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        (name, scheme)
        for name in ("twice", "grouped", "same_even", "same_even_reflect", "replicate")
        for scheme in SCHEMES
    ]
    + [(name, SCHEMES[0]) for name in ("twice_in_place", "aliased", "list_reused", "unbatched", "keyword")]
    + [(name, SCHEMES[1]) for name in ("patches_as_batch", "relu_in_place", "input_in_place", "stale_geometry")],
)
@torch.no_grad()
def test_anchored_beats_data_free_on_unseen_images(make_net, name, scheme):
    net, x = make_net(name)
    train, test = correlated_images(), correlated_images(seed=1)
    data_free, _ = transfer_all(net, x, scheme, "data-free", train)
    before = train.clone()
    anchored, transfers = transfer_all(net, x, scheme, "anchored", train)
    assert torch.equal(train, before)
    assert transfers
    for transfer in transfers:
        assert transfer.method == "anchored"
        assert 0 <= transfer.output_error < 1
    assert all(bool(torch.isfinite(value).all()) for value in anchored.state_dict().values())
    assert output_error(net, anchored, test) < output_error(net, data_free, test)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["grouped", "same_even", "same_even_reflect", "replicate", "stale_geometry"])
@torch.no_grad()
def test_reported_error_is_that_of_the_module(make_net, name, scheme):
    net, x = make_net(name)
    images = correlated_images()
    anchored, (transfer,) = transfer_all(net, x, scheme, "anchored", images)
    assert isinstance(anchored.conv, ChainConv2d)
    assert output_error(net, anchored, images) == pytest.approx(transfer.output_error, rel=0.02, abs=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["plain", "grouped", "same_even", "same_even_reflect", "circular"])
@torch.no_grad()
def test_anchored_stays_exact_at_full_rank(make_net, name, scheme):
    net, x = make_net(name)
    images = correlated_images()
    anchored, _ = transfer_all(net, x, scheme, "anchored", images, SchemeOptions(terms=1000, rank_ratio=1.0))
    assert output_error(net, anchored, images) < 1e-3


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_wide_windows_report_the_error_of_the_linear_solve(make_net, scheme, monkeypatch):
    monkeypatch.setattr(layer, "MAX_WINDOW_FEATURES", 10)
    net, x = make_net("same_even")
    images = correlated_images()
    anchored, (transfer,) = transfer_all(net, x, scheme, "anchored", images)
    assert output_error(net, anchored, images) == pytest.approx(transfer.output_error, rel=0.02)


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_patches_too_wide_to_whiten_are_still_anchored(make_net, scheme, monkeypatch):
    net, x = make_net("same_even")
    images = correlated_images()
    data_free, _ = transfer_all(net, x, scheme, "data-free", images)
    monkeypatch.setattr(layer, "_MAX_MOMENT_FEATURES", 1)
    monkeypatch.setattr(layer, "patch_moments", None)  # moments are not even computed
    anchored, (transfer,) = transfer_all(net, x, scheme, "anchored", images)
    assert transfer.method == "anchored"
    assert output_error(net, anchored, images) < output_error(net, data_free, images)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["chain", "twice", "grouped"])
@torch.no_grad()
def test_same_images_give_the_same_bits(make_net, name, scheme):
    net, x = make_net(name)
    one, two = (transfer_all(net, x, scheme, "anchored", correlated_images())[0].state_dict() for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(8, 8, 12, 12),
        torch.full((8, 8, 12, 12), 1000.0),
        correlated_images(1),
        correlated_images(8) * torch.tensor([0, 1, 1, 0, 1, 0, 1, 1.0])[:, None, None],
        correlated_images(8) * 1e-15,
        correlated_images(8) * 1e8,
    ],
    ids=["dead", "constant", "one image", "dead channels", "tiny", "huge"],
)
@torch.no_grad()
def test_poor_calibration_images_stay_finite(make_net, images, scheme):
    net, x = make_net("chain")
    anchored, transfers = transfer_all(net, x, scheme, "anchored", images)
    assert all(bool(torch.isfinite(value).all()) for value in anchored.state_dict().values())
    for transfer in transfers:
        assert 0 <= transfer.output_error <= 1.001
    assert bool(torch.isfinite(anchored(x)).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_activations_that_overflow_are_refused(make_net, value):
    net, x = make_net("plain")
    with pytest.raises(UnsupportedModelError, match="the convolution conv reads or returns NaN or values too large"):
        transfer_all(net, x, "depthwise_separable", "anchored", torch.full((2, 8, 12, 12), value))


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_half_precision_inside_the_network(make_net, scheme):
    net, x = make_net("autocast")
    images = correlated_images()
    anchored, _ = transfer_all(net, x, scheme, "anchored", images)
    data_free, _ = transfer_all(net, x, scheme, "data-free", images)
    assert output_error(net, anchored, images) < output_error(net, data_free, images)


@torch.no_grad()
def test_double_precision_keeps_its_precision():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)).double().eval()
    images = correlated_images().double()
    full = SchemeOptions(terms=9)
    anchored, _ = transfer_all(net, images[:1], "depthwise_separable", "anchored", images, full)
    assert anchored[0].weight.dtype is torch.float64
    assert output_error(net, anchored, images) < 1e-9


@torch.no_grad()
def test_original_is_not_changed(make_net):
    net, x = make_net("residual")
    before = copy.deepcopy(net.state_dict())
    transfer_all(net, x, "depthwise_separable", "anchored", correlated_images())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in net.modules())


@torch.no_grad()
def test_activations_of_earlier_batches_are_not_kept(make_net):
    net, x = make_net("chain")
    trace = trace_network(net, x)
    alive: list[weakref.ref] = []
    most = 0

    def watched():
        nonlocal most
        for batch in correlated_images(32).split(4):
            most = max(most, sum(reference() is not None for reference in alive))
            yield batch

    def remember(module, args, output):
        alive.extend((weakref.ref(args[0]), weakref.ref(output)))

    handle = torch.nn.modules.module.register_module_forward_hook(remember)
    try:
        plan = propose_plan(trace, "depthwise_separable", OPTIONS)
        convert_network(net, trace, plan, watched)
    finally:
        handle.remove()
    assert len(alive) > 100
    assert most <= 8  # those of one batch; 8 batches would leave dozens


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("has_held_out", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_refining_never_raises_the_total_error(scheme, has_held_out, groups):
    for seed in range(2):
        torch.manual_seed(seed)
        conv = nn.Conv2d(8, 8, (4, 3), padding="same", groups=groups)
        net = nn.Sequential(conv).eval()
        site = trace_network(net, torch.randn(1, 8, 12, 12)).sites[0]
        form = find_scheme(scheme).design(site.spec, OPTIONS)
        module = ChainConv2d(form, site.spec, bias=True)
        module.set_weights(find_scheme(scheme).factorize(conv.weight, form), conv.bias)
        window = site.spec.as_factor()
        sums = []
        for number in range(2):
            images = correlated_images(4, seed=seed + 10 * number)
            part = LeastSquaresSums(groups, 8 // groups * 12, 8 // groups)
            targets = conv(images).transpose(0, 1).reshape(groups, 8 // groups, -1)
            if number == 0 or has_held_out:
                part.add(patches(images, window), targets)
            sums.append(part)
        count = 2 if has_held_out else 1
        images = torch.cat([correlated_images(4, seed=seed + 10 * number) for number in range(count)])
        before = float((module(images) - conv(images)).norm() / conv(images).norm())
        reported = refine_factors(module, *sums)
        after = float((module(images) - conv(images)).norm() / conv(images).norm())
        assert after <= before + 1e-4
        assert reported == pytest.approx(after, rel=0.02, abs=1e-3)


@torch.no_grad()
def test_terms_that_cancel_after_the_solve_are_made_orthogonal_and_even(make_net, monkeypatch):
    net, x = make_net("chain")
    images = correlated_images(64)
    factorize_anew = layer._factorize_anew
    solved = []

    def mix_first(module, *rest):
        """The same kernel from two terms that are large and nearly opposite, as a long descent leaves them."""
        (first_dw, first_pw), (second_dw, second_pw) = ([c.weight for c in term] for term in module.factor_modules())
        mixing = 30 * torch.tensor([[1.0, 0.98], [0.98, 1.0]])
        inverse = torch.linalg.inv(mixing)
        dws, pws = (first_dw.clone(), second_dw.clone()), (first_pw.clone(), second_pw.clone())
        for t, (dw, pw) in enumerate(((first_dw, first_pw), (second_dw, second_pw))):
            dw.copy_(mixing[t, 0] * dws[0] + mixing[t, 1] * dws[1])
            pw.copy_(inverse[0, t] * pws[0] + inverse[1, t] * pws[1])
        solved.append(module.weight.clone())
        factorize_anew(module, *rest)

    monkeypatch.setattr(layer, "_factorize_anew", mix_first)
    converted, _ = transfer_all(net, x, "depthwise_separable", "anchored", images)
    module = converted[0]
    assert torch.allclose(module.weight, solved[0], rtol=1e-4, atol=1e-4 * float(solved[0].abs().max()))
    outputs = torch.stack([term[0](images) for term in module.terms]).transpose(1, 2).flatten(2)  # (T, C, positions)
    moments = torch.einsum("tcp,scp->cts", outputs, outputs) / outputs.shape[-1]
    energy = moments.diagonal(dim1=1, dim2=2)
    correlation = moments[:, 0, 1].abs() / (energy[:, 0] * energy[:, 1]).sqrt()
    assert module.terms[0][0].groups == len(correlation)
    assert correlation.max() < 0.1
    assert energy.max() < 2 * energy.min()
