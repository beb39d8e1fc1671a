import copy

import pytest
import torch
from torch import nn

from sepdeploy.analyze.damage import network_damage
from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.planning.candidates import propose_plan
from sepdeploy.planning.convert import convert_network
from sepdeploy.transfer.recalibrate import recalibrate

NORM, BIAS = "batch norm re-estimation", "bias correction"


def images(count=24, seed=0, shape=(8, 12, 12)):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)) + 0.5


def batches_of(x, size=7):
    return lambda: iter(x.split(size))


def conv(inputs=8, outputs=8, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def trained(net, x):
    """In eval mode, its norms with the statistics of `x`."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = 1.0
        net.train()(x)
    return net.eval()


def converted_data_free(net, x, scheme="depthwise_separable", options=None):
    options = options or SchemeOptions(terms=1, rank_ratio=0.1)
    trace = trace_network(net, x[:1], includes_linear=scheme == "low_rank")
    plan = propose_plan(trace, scheme, options)
    converted, _ = convert_network(net, trace, plan, batches_of(x), method="data-free")
    return converted, trace, plan


def recalibrated(net, x=None, fit=None, held_out=None, batch=7, **conversion):
    """The converted network, the recalibrated one and the two steps; nothing that was given is changed."""
    x = images() if x is None else x
    fit, held_out = (x if fit is None else fit), (images(16, 1, x.shape[1:]) if held_out is None else held_out)
    converted, trace, plan = converted_data_free(net, x, **conversion)
    assert plan.replaced
    before = [copy.deepcopy(model.state_dict()) for model in (net, converted)]
    given = fit.clone(), held_out.clone()
    result, steps = recalibrate(net, converted, trace, plan, batches_of(fit, batch), batches_of(held_out))
    for model, state in zip((net, converted), before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks or module.training for module in result.modules())
    assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(given, (fit, held_out), strict=True))
    assert [step.name for step in steps] == [NORM, BIAS]
    assert steps[0].images == steps[1].images == len(held_out)
    damage = network_damage(net, converted, batches_of(held_out)())
    assert steps[0].damage_before == pytest.approx(damage, rel=1e-6)
    for step in steps:
        assert step.is_kept == (step.damage_after < step.damage_before * (1 - 1e-3))
        damage = step.damage_after if step.is_kept else damage
    assert network_damage(net, result, batches_of(held_out)()) == pytest.approx(damage, rel=1e-6)
    return converted, result, steps


def inputs_of(model, name, x):
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _module, args: seen.append(args[0].clone()))
    with torch.no_grad():
        model(x.clone())
    handle.remove()
    return torch.cat(seen)


def assert_statistics_fit(model, name, x):
    norm, read = model.get_submodule(name), inputs_of(model, name, x)
    channels = read.transpose(0, 1).flatten(1).double()
    assert torch.allclose(norm.running_mean.double(), channels.mean(1), atol=1e-5)
    assert torch.allclose(norm.running_var.double(), channels.var(1), rtol=1e-4)


@pytest.mark.parametrize("batch", [7, 23, 24, 1])  # 24 images: the last batch has 3 or 1 or all
def test_every_norm_fits_the_network_with_the_norms_before_it_already_new(batch):
    torch.manual_seed(0)
    layers = [conv(), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 12), nn.BatchNorm2d(12), nn.ReLU(), conv(12, 8)]
    net = trained(nn.Sequential(*layers, nn.BatchNorm2d(8, affine=False, momentum=None)), images())
    converted, result, (step, _) = recalibrated(net, batch=batch, options=SchemeOptions(terms=3))
    assert step.is_kept
    assert step.detail == "3 batch norms"
    for name in ("1", "4"):
        assert_statistics_fit(result, name, images())
    read = inputs_of(result, "7", images()).transpose(0, 1).flatten(1)
    assert torch.allclose(result[7].running_var, read.var(1), rtol=0.05)  # two passes for a depth of three
    assert not torch.allclose(converted[7].running_var, read.var(1), rtol=0.05)


@pytest.mark.parametrize("name", ["twice", "residual"])
def test_norms_called_twice_pool_their_calls(make_net, name):
    net, _ = make_net(name)
    net = trained(net, images())
    _, result, (step, _) = recalibrated(net)
    assert step.is_kept
    norms = ["bn"] if name == "twice" else ["bn1", "bn2"]
    for norm in norms:
        read = inputs_of(result, norm, images()).transpose(0, 1).flatten(1)
        # Twice: its own statistics change what the second call reads, so that they settle only nearly.
        tolerance = 0.1 if name == "twice" else 1e-4
        assert torch.allclose(result.get_submodule(norm).running_mean, read.mean(1), atol=tolerance)


def test_norms_before_the_first_replaced_layer_and_beside_it_stay(make_net):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.stem_norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)  # too few channels to replace
            self.conv, self.norm = conv(), nn.BatchNorm2d(8)
            self.beside, self.beside_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

        def forward(self, x):
            x = self.stem_norm(self.stem(x)).relu()
            y = self.norm(input=self.conv(x))
            return y + self.beside_norm(self.beside(x))

    torch.manual_seed(0)
    x = images(shape=(3, 12, 12))
    net = trained(Branches(), x)
    converted, result, (step, _) = recalibrated(net, x)
    assert step.is_kept
    assert step.detail == "1 batch norms"
    for name in ("stem_norm", "beside_norm"):
        assert torch.equal(result.get_submodule(name).running_mean, net.get_submodule(name).running_mean)
    assert not torch.equal(result.norm.running_mean, converted.norm.running_mean)


def test_what_makes_it_worse_is_not_kept():
    torch.manual_seed(0)
    net = trained(nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU(), conv()), images())
    converted, result, steps = recalibrated(net, fit=100 * images(seed=2), options=SchemeOptions(terms=3))
    assert [step.is_kept for step in steps] == [False, False]
    assert steps[0].damage_after > 2 * steps[0].damage_before
    state = result.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in converted.state_dict().items())


@pytest.mark.parametrize(
    "norm",
    [
        nn.Identity(),
        nn.InstanceNorm2d(8, affine=True),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.GroupNorm(2, 8),
    ],
    ids=["none", "instance", "no statistics", "group"],
)
def test_networks_without_running_statistics_say_so(norm):
    torch.manual_seed(0)
    net = nn.Sequential(conv(), norm, nn.ReLU(), conv()).eval()
    _, _, (step, bias) = recalibrated(net)
    assert not step.is_kept
    assert step.detail.startswith("no batch norm with running statistics")
    assert step.damage_after == step.damage_before
    assert bias.is_kept


def test_norms_that_never_leave_training_mode_stay(make_net):
    net, _ = make_net("norm_in_training")
    net.bn.training = True
    trace = trace_network(net, images(1))
    plan = propose_plan(trace, "depthwise_separable", SchemeOptions(terms=1))
    converted, _ = convert_network(net, trace, plan, batches_of(images()), method="data-free")
    _, (step, _) = recalibrate(net, converted, trace, plan, batches_of(images()), batches_of(images(seed=1)))
    assert step.detail.startswith("no batch norm")


@pytest.mark.parametrize("has_bias", [True, False])
def test_bias_correction_gives_the_original_mean_of_each_channel(has_bias):
    torch.manual_seed(0)
    net = nn.Sequential(conv(bias=has_bias), nn.ReLU(inplace=True), conv(bias=has_bias)).eval()
    x = images()
    converted, result, (_, step) = recalibrated(net, batch=24)
    assert step.is_kept
    assert step.detail == "2 layers"
    means = [model(x).mean((0, 2, 3)) for model in (net, converted, result)]
    assert torch.allclose(means[2], means[0], atol=1e-5)
    assert not torch.allclose(means[1], means[0], atol=0.1)


def test_bias_correction_in_batches_comes_near_to_that():
    torch.manual_seed(0)
    net = nn.Sequential(conv(), nn.ReLU(), conv()).eval()
    x = images(64)
    converted, result, _ = recalibrated(net, x, batch=4)
    expected, before, after = (model(x).mean((0, 2, 3)) for model in (net, converted, result))
    assert (after - expected).norm() < 0.1 * (before - expected).norm()


@pytest.mark.parametrize(
    "name", ["twice_in_place", "input_in_place", "unbatched", "keyword", "nhwc", "patches_as_batch"]
)
def test_calls_of_every_kind(make_net, name):
    net, _ = make_net(name)
    x = 1 + images(shape=(12, 12, 8) if name == "nhwc" else (8, 12, 12))
    _, _, (_, step) = recalibrated(net, x, held_out=1 + images(16, 1, x.shape[1:]))
    assert step.is_kept


def test_linear_layers_and_their_norms():
    torch.manual_seed(0)
    x = images(200, shape=(5, 32))
    layers = [nn.Linear(32, 32), nn.ReLU(), nn.Flatten(0, 1), nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32)]
    net = trained(nn.Sequential(*layers, nn.Linear(32, 40)), x)
    _, result, steps = recalibrated(net, x, scheme="low_rank", options=SchemeOptions(rank_ratio=0.25))
    assert steps[0].is_kept
    assert_statistics_fit(result, "4", x)
    outputs, expected = result(x), net(x)
    assert (outputs.mean(0) - expected.mean(0)).norm() < 0.1 * (outputs - expected).norm(dim=1).mean()


def test_norms_of_one_value_per_channel_and_of_three_dimensions():
    torch.manual_seed(0)
    net = trained(
        nn.Sequential(
            conv(), nn.Unflatten(1, (8, 1)), nn.BatchNorm3d(8), nn.Flatten(1, 2), nn.AdaptiveAvgPool2d(1), conv(),
            nn.BatchNorm2d(8), nn.Flatten(),
        ),
        images(),
    )  # fmt: skip
    converted, trace, plan = converted_data_free(net, images())
    one = batches_of(images(1))
    result, (step, _) = recalibrate(net, converted, trace, plan, one, batches_of(images(seed=1)))
    assert step.detail == "2 batch norms"
    assert all(bool(value.isfinite().all()) for value in result.state_dict().values())
    result, (step, _) = recalibrate(net, converted, trace, plan, batches_of(images(), 1), batches_of(images(seed=1)))
    assert step.is_kept
    assert_statistics_fit(result, "2", images())
    assert_statistics_fit(result, "6", images())


def test_images_that_give_nan_change_nothing():
    torch.manual_seed(0)
    net = trained(nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU(), conv()), images())
    bad = images()
    bad[3] = torch.nan
    converted, result, steps = recalibrated(net, fit=bad)
    assert not any(step.is_kept for step in steps)
    state = result.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in converted.state_dict().items())
    _, _, steps = recalibrated(net, held_out=bad)
    assert not any(step.is_kept for step in steps)


def test_nothing_replaced_nothing_tried(make_net):
    net, x = make_net("pointwise")
    trace = trace_network(net, x)
    plan = propose_plan(trace, "depthwise_separable", SchemeOptions())
    result, steps = recalibrate(net, net, trace, plan, batches_of(images()), batches_of(images()))
    assert steps == ()
    assert result is not net
