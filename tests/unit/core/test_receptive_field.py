"""The computed field against the gradients of the module that runs the same chain with positive weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sepdeploy.core.chain import Activation, Chain, ChainSum, Factor, Norm, Shuffle, Slice, Towers
from sepdeploy.core.conv import ConvSpec
from sepdeploy.core.receptive_field import receptive_field
from sepdeploy.schemes.module import ChainConv2d

quick = settings(deadline=None, max_examples=60, derandomize=True, database=None)

SIZES = st.tuples(st.integers(1, 3), st.integers(1, 3))
STEPS = st.tuples(st.integers(1, 2), st.integers(1, 2))
PADDING = st.tuples(*[st.integers(0, 2)] * 4)


@st.composite
def factors(draw, inputs, outputs=None, kernels=SIZES, stride=None, padding=None):
    outputs = outputs or draw(st.integers(1, 7))
    return Factor(
        inputs,
        outputs,
        draw(kernels),
        stride=stride or draw(STEPS),
        padding=padding or draw(PADDING),
        dilation=draw(STEPS),
        groups=draw(st.integers(1, min(inputs, outputs))),
        pads_groups=draw(st.booleans()),
    )


@st.composite
def same_size_branches(draw, inputs, outputs, stride):
    """A chain whose output is as large as that of any other one with this stride."""
    start = draw(st.integers(0, inputs - 1))
    stop = draw(st.integers(start + 1, inputs))
    factor = draw(factors(stop - start, outputs, stride=stride))
    total = [step * (taps - 1) for step, taps in zip(factor.dilation, factor.kernel_size, strict=True)]
    before = [draw(st.integers(0, extent)) for extent in total]
    padding = (before[0], total[0] - before[0], before[1], total[1] - before[1])
    factor = Factor(
        factor.in_channels, outputs, factor.kernel_size, stride, padding, factor.dilation, factor.groups,
        pads_groups=factor.pads_groups,
    )  # fmt: skip
    rest = (Shuffle(factor.groups), Factor(outputs, outputs, (1, 1), groups=draw(st.integers(1, outputs))))
    return Chain((Slice(inputs, start, stop), factor, *(rest if draw(st.booleans()) else ())))


@st.composite
def towers(draw, inputs, outputs=None):
    join, stride = draw(st.sampled_from(["sum", "concat"])), draw(STEPS)
    shared = outputs or draw(st.integers(1, 5))
    counts = [shared] * draw(st.integers(1, 3))
    if join == "concat" and outputs is None:
        counts = [draw(st.integers(1, 5)) for _ in counts]
    return Towers(tuple(draw(same_size_branches(inputs, count, stride)) for count in counts), join)


@st.composite
def chains(draw):
    channels = draw(st.integers(1, 8))
    stages = []
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["factor", "factor", "factor", "towers"]))
        stages.append(draw(factors(channels) if kind == "factor" else towers(channels)))
        channels = stages[-1].out_channels
        if draw(st.booleans()):
            stages.append(Shuffle(draw(st.integers(1, channels))))
        if draw(st.booleans()):
            stages += [Norm(channels), Activation("relu")]
    return Chain(tuple(stages))


def total_stride(chain):
    """Input pixels between neighbouring outputs."""
    rows = cols = 1
    for stage in chain.stages:
        factor = stage.branches[0].factors[0] if isinstance(stage, Towers) else stage
        if isinstance(factor, Factor):
            rows, cols = rows * factor.stride[0], cols * factor.stride[1]
    return rows, cols


def positive_module(form):
    module = ChainConv2d(form, ConvSpec(form.in_channels, form.out_channels, (1, 1)), bias=False).eval()
    for parameter in module.parameters():
        torch.nn.init.uniform_(parameter, 0.5, 1.0)
    return module


def computed(field):
    """Per output channel all (input channel, row, column) that the field says it sees, offsets from its position."""
    seen = [set() for _ in field.channels]
    for (rows, cols), masks in field.fields:
        for places, mask in zip(seen, masks, strict=True):
            channels = [channel for channel in range(field.in_channels) if mask >> channel & 1]
            places |= {(channel, row, col) for channel in channels for row in rows for col in cols}
    return seen


def measured(form, stride, rows, cols):
    """The same from gradients, at an output whose whole field (given by its offsets) lies within the image."""
    place = [-(min(offsets) // step) if min(offsets) < 0 else 0
             for offsets, step in zip((rows, cols), stride, strict=True)]  # fmt: skip
    origin = [step * position for step, position in zip(stride, place, strict=True)]
    size = [start + max(0, *offsets) + 1 for start, offsets in zip(origin, (rows, cols), strict=True)]
    x = torch.rand(1, form.in_channels, *size).add_(0.5).requires_grad_()
    outputs = positive_module(form)(x)[0, :, place[0], place[1]]
    seen = []
    for output in outputs:
        (gradient,) = torch.autograd.grad(output, x, retain_graph=True)
        seen.append({(c, r - origin[0], q - origin[1]) for c, r, q in gradient[0].nonzero().tolist()})
    return seen


def check(form, stride):
    field = receptive_field(form)
    rows = {row for (rows, _), _ in field.fields for row in rows}
    cols = {col for (_, cols), _ in field.fields for col in cols}
    expected = measured(form, stride, rows, cols)
    assert computed(field) == expected
    assert field.channels == tuple(len({channel for channel, _, _ in places}) for places in expected)
    if all(any(masks) for _, masks in field.fields):
        pixels = set().union(*expected)
        extents = [[place[axis] for place in pixels] for axis in (1, 2)]
        assert field.window == tuple(max(extent) - min(extent) + 1 for extent in extents)


@given(chains())
@quick
def test_every_output_sees_exactly_the_computed_channels_and_pixels(chain):
    check(ChainSum((chain,)), total_stride(chain))


@given(st.data())
@quick
def test_sums_see_what_any_term_sees(data):
    inputs, outputs, stride = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7)), data.draw(STEPS)
    terms = tuple(data.draw(same_size_branches(inputs, outputs, stride)) for _ in range(data.draw(st.integers(1, 3))))
    check(ChainSum(terms), stride)


def test_dilated_and_strided_taps_leave_gaps():
    chain = Chain((Factor(1, 1, (2, 1), stride=(3, 1)), Factor(1, 1, (2, 3), padding=(1, 0, 0, 0), dilation=(2, 1))))
    ((pixels, masks),) = receptive_field(chain).fields
    assert pixels == (frozenset({-3, -2, 3, 4}), frozenset({0, 1, 2}))
    assert masks == (1,)
    assert receptive_field(chain).window == (8, 3)


def test_one_factor_is_a_form_too():
    factor = Factor(6, 3, (3, 5), groups=3)
    assert receptive_field(factor).channels == (2, 2, 2)
    assert receptive_field(factor).window == (3, 5)
    assert (
        receptive_field(factor) == receptive_field(Chain((factor,))) == receptive_field(ChainSum((Chain((factor,)),)))
    )


def test_covering_is_about_channels_at_every_pixel():
    """A sum of a wide one-channel window and a dense 1x1 has the window and the channels of the dense 3x3, not both."""
    dense = receptive_field(Factor(4, 4, (3, 3), padding=(1, 1, 1, 1)))
    depthwise = Chain((Factor(4, 4, (3, 3), padding=(1, 1, 1, 1), groups=4),))
    cross = receptive_field(ChainSum((depthwise, Chain((Factor(4, 4, (1, 1)),)))))
    assert (cross.window, cross.channels) == (dense.window, dense.channels)
    assert dense.covers(cross)
    assert not cross.covers(dense)
    assert cross.share_of(dense) == pytest.approx((9 + 3) / 36)
    assert dense.share_of(cross) == 1
    separable = receptive_field(Chain((*depthwise.stages, Factor(4, 4, (1, 1)))))
    assert separable.covers(dense)
    assert separable.share_of(dense) == 1


def test_a_shifted_window_covers_only_what_overlaps():
    centred = receptive_field(Factor(2, 2, (3, 3), padding=(1, 1, 1, 1)))
    shifted = receptive_field(Factor(2, 2, (3, 3), padding=(0, 2, 1, 1)))
    assert not shifted.covers(centred)
    assert shifted.share_of(centred) == pytest.approx(2 / 3)


def test_padded_groups_may_leave_an_output_without_inputs():
    """10 channels in 6 groups of 2 fill five groups; what belongs to the sixth has nothing to read."""
    field = receptive_field(Factor(10, 12, (1, 1), groups=6, pads_groups=True))
    assert field.channels == (2,) * 10 + (0,) * 2
    assert min(receptive_field(Factor(10, 12, (1, 1), groups=6)).channels) == 1
