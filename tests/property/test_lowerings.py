"""Whatever the chain, a lowering computes the same or says why not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sepdeploy.core.chain import Activation, Chain, ChainSum, Factor, Norm, Shuffle
from sepdeploy.core.conv import ConvSpec
from sepdeploy.schemes.lowerings.lowering import LOWERINGS, Refusal, find_lowering
from sepdeploy.schemes.module import ChainConv2d
from sepdeploy.schemes.weighted import form_of

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}
quick = settings(deadline=None, max_examples=30, derandomize=True, database=None)
sizes = st.integers(1, 3)


@st.composite
def factors(draw, ins):
    outs = draw(st.integers(1, 7))
    is_pointwise = draw(st.booleans())
    return Factor(
        ins,
        outs,
        (1, 1) if is_pointwise else draw(st.tuples(sizes, sizes)),
        stride=draw(st.sampled_from([(1, 1), (1, 1), (2, 1)])),
        padding=draw(st.sampled_from([(0, 0, 0, 0), (0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 2, 0)])),
        dilation=draw(st.sampled_from([(1, 1), (1, 2)])),
        groups=draw(st.integers(1, min(ins, outs))),
        has_bias=draw(st.booleans()),
        pads_groups=draw(st.booleans()),
    )


@st.composite
def chains(draw):
    channels = draw(st.integers(2, 8))
    stages = [draw(factors(channels))]
    for _ in range(draw(st.integers(0, 4))):
        channels = Chain(tuple(stages)).out_channels
        kind = draw(st.sampled_from(["factor", "factor", "shuffle", "norm", "relu"]))
        if kind == "factor":
            stages.append(draw(factors(channels)))
        elif kind == "shuffle":
            stages.append(Shuffle(draw(st.integers(1, channels)), draw(st.sampled_from(["gather", "channels_last"]))))
        else:
            stages.append(Norm(channels) if kind == "norm" else Activation("relu"))
    return Chain(tuple(stages))


@st.composite
def sums(draw):
    if draw(st.booleans()):
        return ChainSum((draw(chains()),) * draw(st.integers(1, 3)))
    channels, groups = draw(st.integers(2, 6)), draw(st.integers(1, 2))
    multiplier = draw(st.integers(1, 3))
    depthwise = Factor(channels, channels * multiplier, (3, 3), groups=channels, has_bias=draw(st.booleans()))
    pointwise = Factor(channels * multiplier, 4, (1, 1), groups=groups, has_bias=draw(st.booleans()))
    return ChainSum((Chain((depthwise, pointwise)),) * draw(st.integers(1, 3)))


def module_of(form, dtype):
    torch.manual_seed(0)
    module = ChainConv2d(form, ConvSpec(form.in_channels, form.out_channels, (1, 1)), bias=False, dtype=dtype).eval()
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
    return module


def agrees(output, expected, dtype):
    assert output.shape == expected.shape
    # After a ReLU all outputs may be zero, or tiny beside what they are made of: at least a hundredth counts.
    return float((output - expected).abs().max()) <= TOLERANCE[dtype] * max(float(expected.abs().max()), 0.01)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@given(form=sums(), names=st.lists(st.sampled_from(sorted(LOWERINGS)), min_size=1, max_size=4))
@settings(quick, max_examples=150)
@torch.no_grad()
def test_any_lowerings_in_a_row_agree(dtype, form, names):
    if min(form.output_size((14, 13))) < 1:
        return
    module = module_of(form, dtype)
    x = torch.randn(2, form.in_channels, 14, 13, dtype=dtype)
    expected = module(x)
    terms = module.weighted()
    for name in names:
        rewritten = find_lowering(name).rewrite(terms)
        if isinstance(rewritten, Refusal):
            continue
        terms = rewritten
        lowered = ChainConv2d.from_weighted(terms, module.spec, dtype=dtype)
        assert form_of(terms).output_size((14, 13)) == form.output_size((14, 13))
        assert agrees(lowered(x), expected, dtype), name


@pytest.mark.parametrize("name", sorted(LOWERINGS))
@given(form=sums())
@quick
@torch.no_grad()
def test_each_lowering_agrees(name, form):
    module = module_of(form, torch.float64)
    if min(form.output_size((14, 13))) < 1:
        return
    x = torch.randn(2, form.in_channels, 14, 13, dtype=torch.float64)
    terms = find_lowering(name).rewrite(module.weighted())
    if isinstance(terms, Refusal):
        return
    lowered = ChainConv2d.from_weighted(terms, module.spec, dtype=torch.float64)
    assert agrees(lowered(x), module(x), torch.float64)
