"""At full rank every scheme computes the original convolution, whatever its geometry."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.conv import ConvSpec
from sepdeploy.core.plan import Candidate, SchemeOptions
from sepdeploy.passes.replace_convs import replace_modules
from sepdeploy.schemes.module import ChainConv2d
from sepdeploy.schemes.scheme import find_scheme
from sepdeploy.transfer.layer import transfer_layer

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # PyTorch's own

SCHEMES = ["dense", "depthwise_separable", "spatial_separable"]
FULL_RANK = SchemeOptions(terms=1000, rank_ratio=1.0)
TOLERANCE = 1e-5  # float32 rounding of up to 4 x 4 x 8 products in another order

quick = settings(deadline=None, max_examples=60, derandomize=True, database=None)


@st.composite
def convs(draw):
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    padding = draw(st.one_of(st.tuples(st.integers(0, 2), st.integers(0, 2)), st.sampled_from(["same", "valid"])))
    stride = (1, 1) if padding == "same" else draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    torch.manual_seed(draw(st.integers(0, 10)))
    return nn.Conv2d(
        groups * draw(st.integers(1, 5)),
        groups * draw(st.integers(1, 5)),
        kernel,
        stride=stride,
        padding=padding,
        dilation=draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    )


def relative_error(output, expected):
    assert output.shape == expected.shape
    return float((output - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("scheme_name", SCHEMES)
@given(conv=convs())
@quick
@torch.no_grad()
def test_replaced_network_computes_the_same(scheme_name, conv):
    net = nn.Sequential(conv).eval()
    x = torch.randn(2, conv.in_channels, 9, 8)
    site = trace_network(net, x[:1]).sites[0]
    scheme = find_scheme(scheme_name)
    candidate = Candidate(scheme_name, scheme.design(site.spec, FULL_RANK), macs=0, params=0)
    converted = copy.deepcopy(net)
    module, transfer = transfer_layer(net, converted, site, candidate, list, "data-free")
    replace_modules(converted, {"0": module})
    assert converted[0] is module
    assert relative_error(converted(x), net(x)) < TOLERANCE
    assert relative_error(module(x[0]), conv(x[0])) < TOLERANCE  # unbatched, as nn.Conv2d takes it
    assert relative_error(module.weight, conv.weight) < TOLERANCE
    assert transfer.kernel_error < TOLERANCE


@pytest.mark.parametrize("scheme_name", SCHEMES)
@given(
    padding=st.tuples(*[st.integers(0, 3)] * 4),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    groups=st.sampled_from([1, 2]),
    mode=st.sampled_from(["zeros", "circular"]),
)
@quick
@torch.no_grad()
def test_any_asymmetric_padding(scheme_name, padding, kernel, stride, groups, mode):
    spec = ConvSpec(4, 6, kernel, stride, padding, (1, 1), groups, has_bias=True, padding_mode=mode)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 4 // groups, *kernel, generator=generator)
    bias, x = torch.randn(6, generator=generator), torch.randn(2, 4, 7, 6, generator=generator)
    top, bottom, left, right = padding
    padded = F.pad(x, (left, right, top, bottom), mode="constant" if mode == "zeros" else mode)
    expected = F.conv2d(padded, weight, bias, stride, groups=groups)
    scheme = find_scheme(scheme_name)
    form = scheme.design(spec, FULL_RANK)
    module = ChainConv2d(form, spec, bias=True)
    module.set_weights(scheme.factorize(weight, form), bias)
    assert relative_error(module(x), expected) < TOLERANCE


@pytest.mark.parametrize("scheme_name", SCHEMES)
@given(conv=convs(), height=st.integers(7, 12), width=st.integers(7, 12), terms=st.integers(1, 3))
@quick
@torch.no_grad()
def test_cost_and_size_are_what_pytorch_computes(scheme_name, conv, height, width, terms):
    x = torch.randn(1, conv.in_channels, height, width)
    spec = trace_network(conv, x).sites[0].spec
    form = find_scheme(scheme_name).design(spec, SchemeOptions(terms=terms, rank_ratio=0.5))
    module = ChainConv2d(form, spec, bias=False)
    with FlopCounterMode(display=False) as counter:
        output = module(x)
    if spec.padding_mode != "zeros":
        top, bottom, left, right = spec.padding
        height, width = height + top + bottom, width + left + right
    assert form.output_size((height, width)) == tuple(output.shape[2:])
    assert form.macs((height, width)) == counter.get_total_flops() // 2
    assert form.params == sum(parameter.numel() for parameter in module.parameters())
    assert (form.in_channels, form.out_channels) == (conv.in_channels, conv.out_channels)


@pytest.mark.parametrize(
    ("scheme_name", "options"),
    [
        ("depthwise_separable", [SchemeOptions(terms=t) for t in range(1, 10)]),
        ("spatial_separable", [SchemeOptions(rank_ratio=r / 12) for r in range(1, 13)]),
    ],
)
@given(conv=convs())
@settings(quick, max_examples=25)
@torch.no_grad()
def test_error_never_rises_with_rank(scheme_name, options, conv):
    assume(conv.kernel_size != (1, 1))
    net = nn.Sequential(conv).eval()
    site = trace_network(net, torch.randn(1, conv.in_channels, 9, 8)).sites[0]
    scheme = find_scheme(scheme_name)
    errors = []
    for option in options:
        candidate = Candidate(scheme_name, scheme.design(site.spec, option), macs=0, params=0)
        errors.append(transfer_layer(net, net, site, candidate, list, "data-free")[1].kernel_error)
    assert all(after <= before + 1e-6 for before, after in itertools.pairwise(errors))
    assert errors[-1] < TOLERANCE
