from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sepdeploy.core.stages import Factor, Norm, Run, Shuffle, Slice, group_sizes
from sepdeploy.errors import UsageError

CHANNELS = st.integers(1, 60)

quick = settings(deadline=None, derandomize=True, database=None)


@given(CHANNELS, st.data())
@quick
def test_groups_share_the_channels_evenly(channels, data):
    groups = data.draw(st.integers(1, channels))
    sizes = group_sizes(channels, groups)
    assert (len(sizes), sum(sizes)) == (groups, channels)
    assert max(sizes) - min(sizes) <= 1
    assert sizes == tuple(sorted(sizes, reverse=True))


@given(CHANNELS, st.data())
@quick
def test_padded_groups_are_full_up_to_the_last_channel(channels, data):
    groups = data.draw(st.integers(1, channels))
    sizes = group_sizes(channels, groups, is_padded=True)
    full = -(-channels // groups)
    assert (len(sizes), sum(sizes)) == (groups, channels)
    assert sizes[: channels // full] == (full,) * (channels // full)


@given(CHANNELS, CHANNELS, st.data())
@quick
def test_runs_are_the_groups_and_every_weight_connects_two_channels(inputs, outputs, data):
    factor = Factor(inputs, outputs, (2, 3), groups=data.draw(st.integers(1, min(inputs, outputs))))
    sizes = [(run.in_per_group, run.out_per_group) for run in factor.runs for _ in range(run.groups)]
    assert sizes == list(zip(factor.in_groups, factor.out_groups, strict=True))
    assert len(factor.runs) <= 3
    assert factor.params == 6 * sum(ins * outs for ins, outs in sizes)
    assert factor.in_per_group == max(factor.in_groups)
    assert factor.is_even == (len(set(factor.in_groups)) == len(set(factor.out_groups)) == 1)


def test_padded_groups_count_their_filling():
    factor = Factor(10, 9, (3, 3), groups=4, pads_groups=True)
    assert factor.runs == (Run(4, 3, 3),)
    assert factor.params == 4 * 3 * 3 * 9
    assert factor.macs((5, 5)) == factor.params * 9
    assert replace(factor, has_bias=True).params == factor.params + 12
    assert replace(factor, has_bias=True).macs((5, 5)) == factor.macs((5, 5))
    assert Factor(10, 9, (3, 3), groups=4).params == (3 * 3 + 3 * 2 + 2 * 2 + 2 * 2) * 9


@pytest.mark.parametrize("pads_groups", [False, True])
def test_padding_changes_nothing_where_groups_divide(pads_groups):
    factor = Factor(12, 8, (3, 1), groups=4, has_bias=True, pads_groups=pads_groups)
    assert factor.is_even
    assert factor.in_groups == (3,) * 4
    assert factor.params == 12 * 8 * 3 // 4 + 8
    assert factor.macs((6, 4)) == (12 * 8 * 3 // 4) * 4 * 4  # a bias costs no multiplication


@pytest.mark.parametrize(
    ("change", "is_pointwise"),
    [({}, True), ({"groups": 2, "dilation": (3, 3)}, True), ({"stride": (1, 2)}, False),
     ({"padding": (0, 0, 0, 1)}, False), ({"kernel_size": (1, 2)}, False)],
)  # fmt: skip
def test_pointwise_factors_are_matrix_products_at_each_position(change, is_pointwise):
    assert (
        Factor(**({"in_channels": 4, "out_channels": 6, "kernel_size": (1, 1)} | change)).is_pointwise is is_pointwise
    )


@pytest.mark.parametrize(
    "change",
    [{"in_channels": 0}, {"out_channels": -4}, {"kernel_size": (0, 3)}, {"stride": (1, 0)}, {"dilation": (0, 1)},
     {"groups": 0}, {"padding": (0, 0, -1, 0)}],
)  # fmt: skip
def test_sizes_that_are_not_positive(change):
    with pytest.raises(UsageError, match="every size of a convolution must be positive"):
        Factor(**({"in_channels": 4, "out_channels": 4, "kernel_size": (3, 3)} | change))


@pytest.mark.parametrize(("inputs", "outputs"), [(4, 6), (6, 4)])
def test_more_groups_than_channels(inputs, outputs):
    assert Factor(inputs, outputs, (1, 1), groups=4).groups == 4
    with pytest.raises(UsageError, match=f"5 groups are more than {inputs} input or {outputs} output channels"):
        Factor(inputs, outputs, (1, 1), groups=5)


@given(CHANNELS, st.data())
@quick
def test_shuffle_deals_the_rows_out_one_by_one(channels, data):
    groups = data.draw(st.integers(1, channels))
    order = Shuffle(groups).order(channels)
    assert sorted(order) == list(range(channels))
    row_of = [row for row, size in enumerate(group_sizes(channels, groups)) for _ in range(size)]
    for start in range(channels - groups + 1):
        assert {row_of[channel] for channel in order[start : start + groups]} == set(range(groups))


def test_shuffle_is_shufflenets_where_groups_divide():
    assert Shuffle(3).order(6) == (0, 2, 4, 1, 3, 5)
    assert Shuffle(1).order(4) == Shuffle(4).order(4) == (0, 1, 2, 3)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 2), (3, 2), (0, 5)])
def test_slices_lie_within_their_channels(start, stop):
    assert Slice(4, 1, 3).out_channels == 2
    with pytest.raises(UsageError, match=f"channels {start} to {stop} are no part of 4"):
        Slice(4, start, stop)


def test_a_norm_has_scale_and_shift():
    assert Norm(12).params == 24
