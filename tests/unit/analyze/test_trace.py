import copy

import pytest
import torch
from torch import nn
from torch.nn.modules import module as module_hooks

from sepdeploy.analyze.trace import conv_spec, trace_network
from sepdeploy.core.plan import Reason
from sepdeploy.errors import UnsupportedModelError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # PyTorch's own

HOOKS = [name for name in vars(nn.Conv2d(1, 1, 1)) if "hooks" in name]


def sites(make_net, name, **options):
    net, example = make_net(name, **options)
    return {site.name: site for site in trace_network(net, example).sites}


def global_hooks():
    return {name: len(value) for name, value in vars(module_hooks).items() if name.startswith("_global_") and
            isinstance(value, dict)}  # fmt: skip


@pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning")
def test_network_and_process_are_left_as_they_were(make_net, net_name):
    net, example = make_net(net_name)
    modules = dict(net.named_modules())
    state = copy.deepcopy(net.state_dict())
    hooks = {name: {kind: len(getattr(module, kind)) for kind in HOOKS} for name, module in modules.items()}
    keys = {name: set(vars(module)) for name, module in modules.items()}
    input_before, global_before = example.clone(), global_hooks()
    trace_network(net, example)
    assert torch.equal(example, input_before)
    assert global_hooks() == global_before
    assert torch.is_grad_enabled()
    if net_name in ("remade_in_forward", "norm_in_training"):
        return  # they change themselves
    assert net.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) or value.isnan().any() for key, value in net.state_dict().items())
    assert hooks == {name: {kind: len(getattr(m, kind)) for kind in HOOKS} for name, m in net.named_modules()}
    assert keys == {name: set(vars(module)) for name, module in net.named_modules()}


def test_hooks_are_gone_after_a_failure():
    before = global_hooks()
    with pytest.raises(UsageError, match=r"does not run on an input of shape \(1, 3, 8, 8\)"):
        trace_network(nn.Conv2d(4, 4, 3), torch.zeros(1, 3, 8, 8))
    assert global_hooks() == before


def test_every_net_has_unique_names_and_counts_that_sum(make_net, net_name):
    net, example = make_net(net_name)
    trace = trace_network(net, example)
    names = [site.name for site in trace.sites]
    assert len(names) == len(set(names))
    assert trace.total_macs == sum(site.macs for site in trace.sites)  # these nets do nothing else that counts
    assert trace.total_params == sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize(
    ("options", "macs"),
    [
        ({}, 8 * 8 * 9 * 144),
        ({"stride": 2}, 8 * 8 * 9 * 36),
        ({"groups": 4}, 8 * 2 * 9 * 144),
        ({"dilation": 2}, 8 * 8 * 9 * 100),
        ({"kernel": (3, 5), "padding": "same"}, 8 * 8 * 15 * 144),
        ({"kernel": 4, "padding": "same"}, 8 * 8 * 16 * 144),
        ({"padding": "valid"}, 8 * 8 * 9 * 100),
        ({"padding": (2, 1), "padding_mode": "circular"}, 8 * 8 * 9 * 14 * 12),
        ({"outputs": 5, "bias": False}, 5 * 8 * 9 * 144),
    ],
)
def test_macs_against_formula(make_net, options, macs):
    site = sites(make_net, "plain", **options)["conv"]
    assert site.macs == macs
    assert site.calls[0].input_shape == (1, 8, 12, 12)
    height, width = site.calls[0].output_shape[2:]
    assert site.params == site.spec.params
    size = (12, 12)
    if site.spec.padding_mode != "zeros":
        top, bottom, left, right = site.spec.padding
        size = (size[0] + top + bottom, size[1] + left + right)
    assert site.spec.as_factor().output_size(size) == (height, width)
    assert site.spec.as_factor().macs(size) == macs


def test_macs_of_other_dimensions(make_net):
    found = sites(make_net, "mixed_dimensions")
    assert found["up"].macs == 8 * 8 * 4 * 144
    assert found["c1"].macs == 8 * 8 * 3 * 576
    assert found["c3"].macs == 2 * 27 * (6 * 10 * 46)
    assert [site.reason for site in found.values()] == [Reason.TRANSPOSED, Reason.NOT_CONV2D, Reason.NOT_CONV2D]


def test_conv_called_twice_has_two_calls_and_one_norm(make_net):
    site = sites(make_net, "twice")["conv"]
    assert len(site.calls) == 2
    assert site.macs == 2 * site.calls[0].macs
    assert (site.norm, site.reason) == ("bn", None)


def test_shared_weights(make_net):
    found = sites(make_net, "shared_weight")
    assert {site.reason for site in found.values()} == {Reason.SHARED_WEIGHT}
    assert [site.norm for site in found.values()] == [None, None]  # folding one norm would scale both


def test_weight_that_a_functional_call_reads_too(make_net):
    found = sites(make_net, "weight_used_elsewhere")
    assert found["conv"].reason is Reason.SHARED_WEIGHT
    assert found["conv"].norm is None
    assert found[":conv2d[0]"].reason is Reason.FUNCTIONAL


def test_aliases(make_net):
    assert sites(make_net, "aliased")["inner.a"].aliases == ("inner.b.0",)
    reused = sites(make_net, "list_reused")["layers.0"]
    assert (reused.aliases, len(reused.calls)) == (("layers.2",), 2)


def test_functional(make_net):
    found = sites(make_net, "functional")
    assert list(found) == ["conv", ":conv2d[0]"]
    assert found[":conv2d[0]"].reason is Reason.FUNCTIONAL
    assert found[":conv2d[0]"].params == 576


@pytest.mark.parametrize("name", ["old_weight_norm", "weight_norm", "old_spectral_norm", "spectral_norm"])
def test_parametrized_weights_are_refused_and_not_folded(make_net, name):
    site = sites(make_net, name)["0"]
    assert (site.reason, site.norm) == (Reason.PARAMETRIZED, None)
    assert site.spec.kernel_size == (3, 3)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("own_forward", Reason.CUSTOM_FORWARD),
        ("patched_forward", Reason.CUSTOM_FORWARD),
        ("hooked", Reason.HAS_HOOKS),
        ("norm_after_transposed", Reason.TRANSPOSED),
        ("not_finite", Reason.NOT_FINITE),
        ("complex_weight", Reason.QUANTIZED_OR_NOT_FLOAT),
    ],
)
def test_reasons_leave_the_norm_alone(make_net, name, reason):
    (site,) = sites(make_net, name).values()
    assert (site.reason, site.norm) == (reason, None)


def test_never_called_comes_last(make_net):
    found = sites(make_net, "never_called")
    assert list(found) == ["conv", "unused"]
    assert (found["unused"].reason, found["unused"].macs) == (Reason.NOT_CALLED, 0)


def test_forward_called_directly_is_a_functional_call(make_net):
    found = sites(make_net, "called_past_hooks")
    assert {name: site.reason for name, site in found.items()} == {
        ":conv2d[0]": Reason.FUNCTIONAL,
        "conv": Reason.NOT_CALLED,
    }


@pytest.mark.parametrize(
    "name",
    ["norm_input_read_elsewhere", "norm_of_two_convs", "norm_with_activation", "norm_in_training", "relu_in_place",
     "conv_output_returned"],
)  # fmt: skip
def test_norms_that_must_not_be_folded(make_net, name):
    assert all(site.norm is None for site in sites(make_net, name).values())


def test_hooks_on_a_norm_keep_it(make_net):
    net, example = make_net("chain")
    net[1].register_forward_hook(lambda module, args, output: 2 * output)
    assert [site.norm for site in trace_network(net, example).sites] == [None, "4"]


def test_norms_that_can_be_folded(make_net):
    assert [site.norm for site in sites(make_net, "residual").values()] == ["bn1", "bn2"]
    assert sites(make_net, "with_gradients")["conv"].norm == "bn"


def test_outputs_in_dicts_and_lists(make_net):
    net, example = make_net("dict_output")
    assert trace_network(net, example).output_shapes == ((1, 8, 12, 12), (1, 8))


def test_nhwc_input(make_net):
    net, example = make_net("nhwc")
    trace = trace_network(net, example)
    assert trace.input_shape == (1, 12, 12, 8)
    assert trace.sites[0].calls[0].input_shape == (1, 8, 12, 12)


def test_unbatched_call_counts_as_a_batch_of_one(make_net):
    (call,) = sites(make_net, "unbatched")["conv"].calls
    assert call.input_shape == (1, 8, 12, 12)


def test_patches_in_the_batch_are_counted_for_the_image(make_net):
    site = sites(make_net, "patches_as_batch")["conv"]
    assert site.calls[0].input_shape == (4, 8, 6, 6)
    assert site.macs == 4 * 8 * 8 * 9 * 36


def test_geometry_is_what_the_forward_pass_does_not_what_the_constructor_was_told(make_net):
    spec = sites(make_net, "stale_geometry")["conv"].spec
    assert (spec.out_channels, spec.stride, spec.dilation, spec.padding) == (12, (1, 1), (2, 2), (2, 2, 2, 2))


@pytest.mark.parametrize("kernel", [2, 3, 4, (5, 2)])
@pytest.mark.parametrize("dilation", [1, 2, (1, 3)])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_same_padding_is_resolved_as_pytorch_does(kernel, dilation, mode):
    conv = nn.Conv2d(1, 1, kernel, padding="same", dilation=dilation, padding_mode=mode)
    top, bottom, left, right = conv_spec(conv).padding
    assert [left, right, top, bottom] == conv._reversed_padding_repeated_twice


def test_network_that_raises_is_a_usage_error():
    class Raises(nn.Module):
        def forward(self, x):
            raise KeyError("two\nlines")

    with pytest.raises(UsageError, match="KeyError") as caught:
        trace_network(Raises(), torch.zeros(1, 3, 4, 4))
    assert "\n" not in str(caught.value)


def test_network_that_returns_no_tensor():
    class Nothing(nn.Module):
        def forward(self, x):
            return {"shape": list(x.shape)}

    with pytest.raises(UnsupportedModelError, match="returns no tensor but dict"):
        trace_network(Nothing(), torch.zeros(1, 3, 4, 4))
