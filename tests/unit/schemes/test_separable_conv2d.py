import copy

import pytest
import torch
from torch import nn

import sepdeploy
from sepdeploy.analyze.trace import conv_spec, trace_network
from sepdeploy.errors import UsageError
from sepdeploy.schemes.scheme import SCHEMES, find_scheme
from sepdeploy.schemes.separable_conv2d import SeparableConv2d

BUILDING = [name for name in SCHEMES if name != "dense"]


def variance(module, channels, images=32, size=10) -> float:
    """Of the outputs away from the border, over images, pixels and channels, for white inputs of variance 1."""
    x = torch.randn(images, channels, size, size)
    with torch.no_grad():
        return float(module(x)[:, :, 2:-2, 2:-2].var())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # of nn.Conv2d
@pytest.mark.parametrize("scheme", BUILDING)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"stride": 2, "padding": 1},
        {"stride": (2, 1), "padding": (2, 1), "dilation": 2},
        {"padding": "same", "kernel_size": (4, 3)},
        {"padding": "valid", "bias": False},
        {"padding": (1, 2), "padding_mode": "reflect"},
    ],
    ids=str,
)
def test_it_has_the_shapes_and_attributes_of_conv2d(scheme, arguments):
    arguments = {"kernel_size": 3, **arguments}
    dense = nn.Conv2d(12, 20, **arguments)
    separable = SeparableConv2d(12, 20, **arguments, scheme=scheme)
    for x in (torch.randn(2, 12, 15, 14), torch.randn(12, 15, 14)):
        assert separable(x).shape == dense(x).shape
    assert separable.spec == conv_spec(dense)
    assert separable.weight.shape == dense.weight.shape
    assert (separable.bias is None) == (dense.bias is None)
    names = ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups", "padding_mode")
    assert all(getattr(separable, name) == getattr(dense, name) for name in names)


@pytest.mark.parametrize("scheme", BUILDING)
@pytest.mark.parametrize("options", [{}, {"middle": "norm"}], ids=str)
def test_outputs_start_with_the_variance_of_conv2d(scheme, options):
    torch.manual_seed(0)
    channels, pieces = 60, 6
    dense = sum(variance(nn.Conv2d(channels, 64, 3, bias=False), channels) for _ in range(pieces)) / pieces
    ours = [
        variance(SeparableConv2d(channels, 64, 3, bias=False, scheme=scheme, **options), channels)
        for _ in range(pieces)
    ]
    assert sum(ours) / pieces == pytest.approx(dense, rel=0.15)


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "depthwise_separable", "terms": 4},
        {"factors": 3},
        {"factors": None},
        {"group_rounding": "padded"},
        {"group_rounding": "uneven", "policy": "linear"},
        {"middle": "norm_activation"},
        {"middle": "norm_activation", "factors": 3},
    ],
    ids=str,
)
def test_the_variance_does_not_depend_on_the_form(options):
    torch.manual_seed(0)
    ours = [variance(SeparableConv2d(50, 70, 3, bias=False, **options), 50) for _ in range(12)]
    assert sum(ours) / len(ours) == pytest.approx(1 / 3, rel=0.2)


def test_the_bias_starts_as_that_of_conv2d():
    torch.manual_seed(0)
    bias = SeparableConv2d(64, 4096, 3).bias
    limit = (64 * 9) ** -0.5
    assert bias.abs().max() <= limit
    assert bias.abs().max() > 0.99 * limit
    assert float(bias.detach().var()) == pytest.approx(limit**2 / 3, rel=0.05)


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (
            {"chain_groups": (8, 8)},
            [
                "optimized_separable: 64 > 64, kernel_size=(3, 3), stride=(1, 1): 3x3 g8 64, shuffle 8, 1x1 g8 64",
                "5,184 parameters, 0.14 of dense; 5,120 MACs per output pixel, 0.14 of dense",
                "sees all 64 channels in a 3x3 window",
            ],
        ),
        (
            {"scheme": "depthwise"},
            [
                "depthwise: 64 > 64, kernel_size=(3, 3), stride=(1, 1): 3x3 dw 64",
                "640 parameters, 0.02 of dense; 576 MACs per output pixel, 0.02 of dense",
                "sees 1 of 64 channels: the receptive field is broken",
            ],
        ),
    ],
)
def test_it_prints_what_it_is(options, lines):
    printed = [line.strip() for line in repr(SeparableConv2d(64, 64, 3, padding=1, **options)).splitlines()]
    assert printed[1:4] == lines


def test_macs_before_a_stride_count_for_every_output_pixel():
    """Kx1 runs with stride (2, 1): 1xK reads every column and every second row."""
    module = SeparableConv2d(32, 32, 3, 2, 1, scheme="spatial_separable", rank_ratio=1 / 3)
    first, second = module.form.terms[0].factors
    assert first.stride == (2, 1)
    traced = trace_network(module.eval(), torch.zeros(1, 32, 64, 64))
    assert f"{traced.total_macs // 32**2:,} MACs per output pixel" in module.extra_repr()
    assert second.out_channels == 32


def test_copies_state_dicts_and_export():
    torch.manual_seed(0)
    module = SeparableConv2d(10, 14, 3, padding=1, group_rounding="uneven", middle="norm").eval()
    x = torch.randn(2, 10, 8, 8)
    expected = module(x)
    assert torch.equal(copy.deepcopy(module)(x), expected)
    other = SeparableConv2d(10, 14, 3, padding=1, group_rounding="uneven", middle="norm").eval()
    assert not torch.equal(other(x), expected)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), expected)
    exported = torch.export.export(module, (x,)).module()
    assert torch.allclose(exported(x), expected, atol=1e-6)
    assert torch.equal(copy.deepcopy(module).train()(x).mean().isfinite(), torch.tensor(True))


def test_it_trains():
    torch.manual_seed(0)
    module = SeparableConv2d(16, 8, 3, padding=1, middle="norm_activation")
    x, target = torch.randn(8, 16, 6, 6), torch.randn(8, 8, 6, 6)
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    losses = []
    for _ in range(40):
        loss = (module(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert losses[-1] < 0.9 * losses[0]


def test_networks_with_it_are_traced():
    net = nn.Sequential(
        SeparableConv2d(16, 16, 3, padding=1, chain_groups=(4, 4)), nn.ReLU(), nn.Conv2d(16, 16, 3)
    ).eval()
    traced = trace_network(net, torch.zeros(1, 16, 8, 8))
    assert [site.name for site in traced.sites] == ["0.terms.0.0", "0.terms.0.2", "2"]


def test_device_and_dtype():
    module = SeparableConv2d(10, 14, 3, device="meta", dtype=torch.float16, group_rounding="uneven")
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.float16)}
    assert SeparableConv2d(8, 8, 3, dtype=torch.float64).terms[0][0].weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "options", "part"),
    [
        ((3, 16, 3), {}, "fewer than 4 channels per group"),
        ((16, 16, 1), {"scheme": "depthwise_separable"}, "a 1x1 kernel has no spatial extent"),
        ((16, 16, 3), {"scheme": "dense"}, "the dense scheme replaces nothing"),
        ((16, 16, 3), {"scheme": "magic"}, "there is no scheme 'magic'"),
        ((16, 16, 3), {"terms": 2}, "--terms belongs to --scheme depthwise_separable, not to optimized_separable"),
        ((16, 16, 3), {"width": 2}, "there is no hyper-parameter 'width'"),
        ((16, 16, 3), {"overlap": 0.0}, "--overlap must be"),
        ((16, 15, 3, 1, 0, 1, 2), {}, "divisible by groups"),
        ((16, 16, 3, 2, "same"), {}, "padding='same' is not supported for strided"),
        ((16, 16, "3"), {}, "nn.Conv2d does not take these arguments"),
    ],
)
def test_refusals(arguments, options, part):
    with pytest.raises(UsageError, match=part):
        SeparableConv2d(*arguments, **options)


def test_from_scratch_depthwise_separable_is_one_pair():
    assert len(SeparableConv2d(16, 16, 3, scheme="depthwise_separable").form.terms) == 1
    assert len(SeparableConv2d(16, 16, 3, scheme="depthwise_separable", terms=3).form.terms) == 3


def test_public_name():
    assert sepdeploy.SeparableConv2d is SeparableConv2d
    assert find_scheme("optimized_separable").name == SeparableConv2d(8, 8, 3).scheme


def test_with_norms_inside_there_is_no_dense_kernel_and_tools_that_ask_are_told():
    module = SeparableConv2d(16, 8, 3, padding=1, middle="norm")
    assert not hasattr(module, "weight")
    assert SeparableConv2d(16, 8, 3, padding=1).weight.shape == (8, 16, 3, 3)
