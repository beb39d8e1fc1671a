"""Networks and images at the edge of what can be transferred: right, or refused with the reason."""

import math

import pytest
import torch
from torch import nn

from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.plan import Reason, SchemeOptions
from sepdeploy.errors import UnsupportedModelError
from sepdeploy.planning.candidates import propose_plan
from sepdeploy.planning.convert import convert_network
from sepdeploy.schemes.module import ChainConv2d, ChainLinear
from sepdeploy.schemes.scheme import SCHEMES
from sepdeploy.transfer import refine

ALL_SCHEMES = [name for name in SCHEMES if name != "dense"]
TWO_SCHEMES = ["depthwise_separable", "spatial_separable"]
OPTIONS = SchemeOptions(terms=1, rank_ratio=0.3)


def images(count=16, seed=0, channels=8, size=10):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def conv(inputs=8, outputs=8, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def sequential(*modules):
    """The modules one after the other, with the same weights in every run."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(*modules).eval()
    for parameter in net.parameters():
        bound = 1 / math.sqrt(parameter[0].numel())
        parameter.data.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) * bound)
    return net


@pytest.fixture(autouse=True)
def one_round(monkeypatch):
    """Descents short enough for a test; what is promised holds after any number of rounds."""
    monkeypatch.setattr(refine, "_MAX_ROUNDS", 1)
    monkeypatch.setattr(refine, "_ITERATIONS_PER_ROUND", 8)


@torch.no_grad()
def convert(net, x, scheme="depthwise_separable", method="anchored", batch=8, options=OPTIONS):
    """The converted network, the transfers and the plan; nothing that is returned or reported is NaN."""
    trace = trace_network(net, x[:1], includes_linear=True)
    plan = propose_plan(trace, scheme, options)
    converted, transfers = convert_network(net, trace, plan, lambda: iter(x.split(batch)), method=method)
    assert len(transfers) == len(plan.replaced)
    assert all(bool(parameter.isfinite().all()) for parameter in converted.parameters())
    for transfer in transfers:
        assert transfer.output_error is None or math.isfinite(transfer.output_error)
    return converted, transfers, plan


@torch.no_grad()
def error(net, converted, x):
    expected = net(x.clone()).double()
    return float((converted(x.clone()).double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("scheme", ALL_SCHEMES)
def test_dead_channels(scheme):
    net = sequential(conv(), nn.ReLU(), conv())
    net[0].weight.data[2:5] = 0  # channels that are 0 behind the ReLU
    net[0].bias.data[2:5] = -1
    net[2].weight.data[3], net[2].weight.data[:, 6] = 0, 0
    anchored, _, plan = convert(net, images(), scheme)
    data_free, _, _ = convert(net, images(), scheme, "data-free")
    assert len(plan.replaced) == 2
    unseen = images(seed=1)
    assert error(net, anchored, unseen) < error(net, data_free, unseen)
    alive = 5 * images(seed=2)
    alive[:, 2:5] += 3  # where a dead channel's input differs from all that was seen, nothing explodes
    with torch.no_grad():
        assert float(anchored(alive).abs().max()) < 10 * float(net(alive).abs().max())


@pytest.mark.parametrize("scheme", ALL_SCHEMES)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_images(scheme, value):
    net = sequential(conv(), nn.ReLU(), conv())
    same = torch.full((8, 8, 10, 10), value)
    anchored, _, _ = convert(net, same, scheme)
    data_free, _, _ = convert(net, same, scheme, "data-free")
    assert error(net, anchored, same) <= error(net, data_free, same) + 1e-6


@pytest.mark.parametrize("scheme", ALL_SCHEMES)
def test_images_all_equal_and_a_single_one_are_the_same(scheme):
    net = sequential(conv(), nn.ReLU(), conv())
    for x in (images(1), images(1).repeat(8, 1, 1, 1)):
        anchored, _, _ = convert(net, x, scheme)
        data_free, _, _ = convert(net, x, scheme, "data-free")
        assert error(net, anchored, x) < error(net, data_free, x)
        assert error(net, anchored, images(seed=1)) < 1.2


@pytest.mark.parametrize("scheme", TWO_SCHEMES)
def test_left_over_batch_of_one_image(scheme):
    net = sequential(conv(), nn.ReLU(), conv())
    anchored, _, _ = convert(net, images(17), scheme, batch=8)
    data_free, _, _ = convert(net, images(17), scheme, "data-free")
    assert error(net, anchored, images(seed=1)) < error(net, data_free, images(seed=1))


def test_no_images_at_all_are_only_needed_without_any():
    net = sequential(conv(), nn.ReLU(), conv())
    trace = trace_network(net, images(1))
    plan = propose_plan(trace, "depthwise_separable", OPTIONS)
    _, transfers = convert_network(net, trace, plan, lambda: iter(()), method="data-free")
    assert len(transfers) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_stay_with_the_reason(value):
    net = sequential(conv(), nn.ReLU(), conv())
    net[0].weight.data[0, 0, 0, 0] = value
    plan = propose_plan(trace_network(net, images(1)), "depthwise_separable", OPTIONS)
    assert plan.kept["0"].reason is Reason.NOT_FINITE
    assert set(plan.replaced) == {"2"}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_activations_that_are_not_finite_are_refused(value):
    net = sequential(conv(), nn.BatchNorm2d(8), conv())
    net[1].running_mean[3] = value
    with pytest.raises(UnsupportedModelError, match=r"the convolution \d reads or returns NaN or values too large"):
        convert(net, images())


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8, track_running_stats=False), nn.InstanceNorm2d(8)])
def test_norms_without_running_statistics(norm):
    net = nn.Sequential(conv(), norm, nn.ReLU(), conv()).eval()
    anchored, transfers, _ = convert(net, images())
    data_free, _, _ = convert(net, images(), method="data-free")
    assert len(transfers) == 2
    assert error(net, anchored, images(seed=1)) < error(net, data_free, images(seed=1))


def test_frozen_parameters_are_transferred_and_their_layers_can_be_trained():
    net, frozen = (sequential(conv(), nn.BatchNorm2d(8), nn.ReLU(), conv()) for _ in range(2))
    frozen.requires_grad_(False)
    expected, _, _ = convert(net, images())
    converted, _, plan = convert(frozen, images())
    assert set(plan.replaced) == {"0", "3"}
    values = converted.state_dict()
    assert all(torch.equal(value, values[key]) for key, value in expected.state_dict().items())
    # What replaces a frozen layer has lost accuracy and must be able to win it back; the rest stays as the user has it.
    trainable = {name.split(".")[0] for name, value in converted.named_parameters() if value.requires_grad}
    assert trainable == {"0", "3"}
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_shared_weights_stay_with_the_reason(make_net):
    net, x = make_net("shared_weight")
    converted, transfers, plan = convert(net, x)
    assert transfers == ()
    assert {kept.reason for kept in plan.kept.values()} == {Reason.SHARED_WEIGHT}
    assert torch.equal(converted(x), net(x))
    assert converted[0].weight is converted[3].weight


class TwoResolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.unused = conv(), conv()

    def forward(self, x):
        self.unused(x)
        y = self.conv(x).relu()
        return self.conv(nn.functional.max_pool2d(y, 2)).mean((2, 3)) + y.mean((2, 3))


@pytest.mark.parametrize("scheme", ALL_SCHEMES)
def test_called_twice_with_different_resolutions_and_an_output_that_nobody_reads(scheme):
    torch.manual_seed(0)
    net = TwoResolutions().eval()
    anchored, transfers, plan = convert(net, images(), scheme)
    data_free, _, _ = convert(net, images(), scheme, "data-free")
    assert set(plan.replaced) == {"conv", "unused"}
    assert isinstance(anchored.conv, ChainConv2d)
    assert {transfer.name for transfer in transfers} == {"conv", "unused"}
    # Equal where held-out images show nothing to be gained, as for schemes whose closed form is all that they can do.
    assert error(net, anchored, images(seed=1)) <= error(net, data_free, images(seed=1))


@pytest.mark.parametrize("scheme", ALL_SCHEMES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_kernel_of_zeros(scheme, has_bias):
    net = sequential(conv(), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, bias=has_bias))
    net[2].weight.data.zero_()
    for method in ("data-free", "anchored"):
        converted, transfers, _ = convert(net, images(), scheme, method)
        assert transfers[1].kernel_error == 0
        assert torch.allclose(converted(images(seed=1)), net(images(seed=1)), atol=1e-4)


@pytest.mark.parametrize("scheme", ALL_SCHEMES)
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12])
def test_kernels_of_any_magnitude(scheme, size):
    net = sequential(conv())
    net[0].bias.data.zero_()
    plain, (expected,), _ = convert(net, images(), scheme)
    errors = error(net, plain, images(seed=1))
    net[0].weight.data *= size
    converted, (transfer,), _ = convert(net, images(), scheme)
    assert transfer.kernel_error == pytest.approx(expected.kernel_error, rel=1e-3)
    assert transfer.output_error == pytest.approx(expected.output_error, rel=0.05)
    assert error(net.double(), converted.double(), images(seed=1).double()) == pytest.approx(errors, rel=0.05)


def test_activations_beyond_float32_are_refused():
    net = sequential(conv(), conv())
    for layer in (net[0], net[1]):
        layer.weight.data *= 1e30
    with pytest.raises(UnsupportedModelError, match=r"the convolution \d reads or returns NaN or values too large"):
        convert(net, images())
    convert(net, images(), method="data-free")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scheme", TWO_SCHEMES)
def test_networks_of_other_precisions_keep_theirs(dtype, scheme):
    net = sequential(conv(), nn.ReLU(), conv())
    single, _, _ = convert(net, images(), scheme)
    errors = error(net, single, images(seed=1))
    net = net.to(dtype)
    converted, _, _ = convert(net, images().to(dtype), scheme)
    assert {parameter.dtype for parameter in converted.parameters()} == {dtype}
    assert error(net, converted, images(seed=1).to(dtype)) == pytest.approx(errors, rel=0.05)


@pytest.mark.parametrize("scheme", ALL_SCHEMES)
def test_fewer_positions_than_channels(scheme):
    net = sequential(conv(48, 48))
    few = images(8, channels=48, size=2)
    anchored, _, _ = convert(net, few, scheme)
    data_free, _, _ = convert(net, few, scheme, "data-free")
    unseen = images(64, seed=1, channels=48, size=2)
    # Held-out images allow little; what they cannot tell stays near the closed form.
    assert error(net, anchored, unseen) < 1.3 * error(net, data_free, unseen)
    weights = [
        max(float(value.abs().max()) for value in model.state_dict().values()) for model in (anchored, data_free)
    ]
    assert weights[0] < 100 * weights[1]


@pytest.mark.parametrize("scheme", ALL_SCHEMES)
@pytest.mark.parametrize("shape", [(64, 32), (64, 3, 32)])
def test_linear_layers(scheme, shape):
    net = sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 40))
    mix = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))  # features that depend on each other
    x, unseen = (torch.randn(*shape[:-1], 6, generator=torch.Generator().manual_seed(seed)) @ mix for seed in (1, 2))
    converted, transfers, plan = convert(net, x, scheme, batch=16)
    if scheme in ("grouped", "low_rank", "optimized_separable"):
        assert len(transfers) == 2
        assert isinstance(converted[0], ChainLinear)
        data_free, _, _ = convert(net, x, scheme, "data-free")
        assert error(net, converted, unseen) < error(net, data_free, unseen)
    else:
        assert {kept.reason for kept in plan.kept.values()} == {Reason.POINTWISE}
