"""Algorithm 1 of "Optimized Separable Convolution" against its equations, and against trying everything."""

import contextlib
import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sepdeploy.core.chain import Shuffle
from sepdeploy.core.plan import MAX_FACTORS, SchemeOptions
from sepdeploy.core.receptive_field import receptive_field
from sepdeploy.errors import UsageError
from sepdeploy.schemes.design import ChainDesign, balanced_groups, design_chain, middle_channels

quick = settings(deadline=None, max_examples=150, derandomize=True, database=None)

CHANNELS = st.integers(1, 40)
KERNELS = st.tuples(st.integers(1, 5), st.integers(1, 5))
ROUNDINGS = ("uneven", "divisor", "auto")
POLICIES = ("normal", "linear", "bottleneck", "inverted")

OPTIONS = st.builds(
    SchemeOptions,
    factors=st.sampled_from([1, 2, 2, 3, 4, 5, 7, None]),
    overlap=st.sampled_from([0.25, 0.5, 1.0, 1.0, 1.5, 2.0, 4.0, 1e9]),
    policy=st.sampled_from(POLICIES),
    middle_channels=st.one_of(st.just(()), st.tuples(st.integers(1, 40))),
    min_group_channels=st.sampled_from([1, 1, 2, 4, 8]),
    group_rounding=st.sampled_from(ROUNDINGS),
)


def options(**changes):
    return SchemeOptions(**({"group_rounding": "uneven"} | changes))


def room(design, overlap):
    """Most groups by the channel condition (15): g_1 ... g_N <= C_2 ... C_N / gamma."""
    return math.prod(design.channels[1:-1]) / overlap * (1 + 1e-9)


@given(CHANNELS, CHANNELS, KERNELS, OPTIONS, st.booleans())
@quick
def test_every_design_satisfies_the_constraints(inputs, outputs, kernel_size, chosen, is_spatial):
    if is_spatial and chosen.factors == 1:
        chosen = replace(chosen, factors=2)
    design = design_chain(inputs, outputs, kernel_size, chosen, is_spatial=is_spatial)
    count = len(design.groups)
    assert chosen.factors in (None, count)
    assert (design.channels[0], design.channels[-1]) == (inputs, outputs)
    for axis in (0, 1):  # (13) and (14)
        assert sum(kernel[axis] for kernel in design.kernel_sizes) == kernel_size[axis] + count - 1
    if is_spatial:
        assert all(1 in kernel for kernel in design.kernel_sizes)
    assert math.prod(design.groups) <= max(1, room(design, chosen.overlap))  # (15)
    for index, groups in enumerate(design.groups):  # (16)
        least = min(design.channels[index : index + 2])
        assert 1 <= groups <= max(1, least // chosen.min_group_channels)
    if chosen.overlap >= 1:
        assert receptive_field(design.chain).channels == (inputs,) * outputs
    if chosen.group_rounding == "divisor":
        assert all(factor.is_even for factor in design.factors)
    # Groups only ever take weights away.
    assert design.params <= replace(design, groups=(1,) * count).params


def cheapest(design, most=math.inf):
    """The cheapest groups for the same channels and kernels that see everything, found by trying all."""
    caps = [min(pair) for pair in itertools.pairwise(design.channels)]
    found = []
    for groups in itertools.product(*(range(1, cap + 1) for cap in caps)):
        other = replace(design, groups=groups)
        if math.prod(groups) <= most and other.params < design.params and other.sees_all_channels:
            found.append(other)
    return min(found, key=lambda other: other.params, default=design)


@pytest.mark.parametrize("overlap", [1.0, 2.0])
@given(st.integers(1, 20), st.integers(1, 20), KERNELS, st.integers(0, 30), st.booleans())
@quick
def test_two_factors_are_the_cheapest_there_are(overlap, inputs, outputs, kernel_size, middle, is_spatial):
    chosen = options(overlap=overlap, middle_channels=(middle,) if middle else ())
    design = design_chain(inputs, outputs, kernel_size, chosen, is_spatial=is_spatial)
    assert design == cheapest(design, max(1, room(design, overlap)))


@given(st.integers(2, 9), st.integers(2, 9), st.tuples(st.integers(2, 9), st.integers(2, 9)), KERNELS)
@settings(quick, max_examples=30)
def test_three_factors_are_close_to_the_cheapest(inputs, outputs, middle, kernel_size):
    """Rounding is a search near the optimum in real numbers, so that a few weights may be lost."""
    design = design_chain(inputs, outputs, kernel_size, options(factors=3, middle_channels=middle))
    assert design.params <= 1.25 * cheapest(design).params


CHAINS = st.integers(1, 4).flatmap(
    lambda count: st.tuples(
        st.lists(st.integers(1, 200), min_size=count + 1, max_size=count + 1),
        st.lists(KERNELS, min_size=count, max_size=count),
    )
)


@given(CHAINS, st.sampled_from([0.25, 1.0, 3.0]))
@quick
def test_balanced_groups_are_equation_17_where_nothing_is_masked(chain, overlap):
    channels, kernels = chain
    count = len(kernels)
    volume = overlap * math.prod(channels) * math.prod(math.prod(kernel) for kernel in kernels)
    per_group = [volume ** (1 / count) / (channels[i + 1] * math.prod(kernels[i])) for i in range(count)]
    expected = [channels[i] / per_group[i] for i in range(count)]
    caps = [min(channels[i : i + 2]) for i in range(count)]
    is_masked = any(not 1 <= groups <= cap for groups, cap in zip(expected, caps, strict=True))
    balanced = balanced_groups(tuple(channels), tuple(kernels), overlap, {}, caps)
    if is_masked:
        assert all(1 <= groups <= cap for groups, cap in zip(balanced, caps, strict=True))
    else:
        assert balanced == pytest.approx(expected)


@given(CHAINS)
@quick
def test_masked_groups_balance_what_is_free(chain):
    """At the minimum factors within their range cost the same, those at 1 no more, those at a cap no less."""
    channels, kernels = chain
    caps = [min(pair) for pair in itertools.pairwise(channels)]
    balanced = balanced_groups(tuple(channels), tuple(kernels), 1.0, {}, caps)
    cost = [
        channels[i] / groups * channels[i + 1] * math.prod(kernels[i]) for i, groups in enumerate(balanced)
    ]  # C_{l+1} n_l KH_l KW_l of equation (12)
    at_one = [c for c, groups, cap in zip(cost, balanced, caps, strict=True) if groups == 1 < cap]
    at_cap = [c for c, groups, cap in zip(cost, balanced, caps, strict=True) if groups == cap > 1]
    free = [c for c, groups, cap in zip(cost, balanced, caps, strict=True) if 1 < groups < cap]
    assert free == pytest.approx(free[:1] * len(free))
    assert max(at_one, default=0) <= min([*free, *at_cap], default=math.inf) * (1 + 1e-9)
    assert max([*at_one, *free], default=0) <= min(at_cap, default=math.inf) * (1 + 1e-9)
    if free:  # then the channel condition holds with equality
        assert math.prod(balanced) == pytest.approx(math.prod(channels[1:-1]))


def test_masked_on_both_sides_at_once():
    """Equation (17) gives g = 40 and 0.9; only the first is fixed (at 16), then 2.25 groups are left for the second."""
    assert balanced_groups((16, 36, 9), ((5, 5), (1, 1)), 1.0, {}, [16, 9]) == [16, 2.25]
    assert design_chain(16, 9, (5, 5), options(middle_channels=(36,))).groups == (16, 2)


def test_preset_groups_are_given_and_the_others_solved_for():
    assert balanced_groups((64, 64, 64), ((1, 1), (1, 1)), 1.0, {0: 16}, [64, 64]) == [16, 4]
    assert design_chain(64, 64, (3, 3), options(groups=(None, 2))).groups == (32, 2)
    assert design_chain(64, 64, (3, 3), options(groups=(4, None))).groups == (4, 16)
    assert design_chain(30, 30, (3, 3), options(groups=(4, 7, 1))).groups == (4, 7, 1)
    too_many = design_chain(8, 8, (3, 3), options(groups=(8, 8)))
    assert too_many.groups == (8, 8)  # as asked for, although it cannot see everything
    assert not too_many.sees_all_channels


@pytest.mark.parametrize("rounding", [*ROUNDINGS, "padded"])
@given(
    st.integers(1, 24), st.integers(1, 24), st.lists(st.one_of(st.none(), st.integers(1, 24)), max_size=5), st.data()
)
@settings(quick, max_examples=60)
def test_presets_end_in_a_design_or_in_a_sentence(rounding, inputs, outputs, groups, data):
    kernels = tuple(data.draw(st.lists(KERNELS, max_size=5)))
    chosen = SchemeOptions(
        factors=None,
        groups=tuple(groups),
        kernel_sizes=kernels,
        middle_channels=tuple(data.draw(st.lists(st.integers(1, 24), max_size=4))),
        kernel_position=data.draw(st.sampled_from([None, 1, 2, 3])),
        group_rounding=rounding,
    )
    kernel_size = tuple(1 + sum(kernel[axis] - 1 for kernel in kernels) for axis in (0, 1)) if kernels else (3, 2)
    design = None
    with contextlib.suppress(UsageError):
        design = design_chain(inputs, outputs, kernel_size, chosen)
    if design is None:
        with pytest.raises(UsageError, match=r"factors have|groups are more than|--kernel-position"):
            design_chain(inputs, outputs, kernel_size, chosen)
        return
    assert all(given in (None, found) for given, found in zip(groups, design.groups, strict=bool(groups)))
    assert kernels in ((), design.kernel_sizes)
    if None in groups or not groups:
        assert design.sees_all_channels or rounding == "padded"


@pytest.mark.parametrize("ends", [(16, 64), (64, 16), (3, 2), (1, 5)])
def test_policies_of_section_2_3(ends):
    least, most = min(ends), max(ends)
    wanted = {"normal": least, "linear": sum(ends) // 2, "bottleneck": most // 4, "inverted": 4 * least}
    for policy, channels in wanted.items():
        assert middle_channels(*ends, options(policy=policy)) == max(1, channels)
        design = design_chain(*ends, (3, 3), options(policy=policy, factors=3))
        assert design.channels == (ends[0], max(1, channels), max(1, channels), ends[1])


def test_explicit_middle_channels():
    assert design_chain(8, 9, (3, 3), options(factors=3, middle_channels=(5,))).channels == (8, 5, 5, 9)
    assert design_chain(8, 9, (3, 3), options(factors=3, middle_channels=(5, 7))).channels == (8, 5, 7, 9)
    assert len(design_chain(8, 9, (3, 3), options(factors=None, middle_channels=(5, 7, 6))).groups) == 4


@pytest.mark.parametrize(
    ("count", "is_spatial", "position", "first"),
    [(1, False, None, 1), (2, False, None, 1), (3, False, None, 1), (4, False, None, 2), (5, False, None, 2),
     (6, False, None, 3), (2, False, 2, 2), (5, False, 5, 5), (2, True, None, 1), (3, True, None, 1),
     (4, True, None, 2), (6, True, None, 3), (4, True, 3, 3)],
)  # fmt: skip
def test_kernel_position(count, is_spatial, position, first):
    """floor(N / 2) as Algorithm 1 has it, but at least the first; even and rectangular kernels too."""
    for height, width in [(3, 3), (2, 4), (5, 2)]:
        chosen = options(factors=count, kernel_position=position)
        kernels = design_chain(16, 16, (height, width), chosen, is_spatial=is_spatial).kernel_sizes
        expected = [(1, 1)] * count
        if is_spatial:
            expected[first - 1 : first + 1] = [(height, 1), (1, width)]
        else:
            expected[first - 1] = (height, width)
        assert kernels == tuple(expected)


def test_preset_kernels():
    design = design_chain(16, 16, (4, 3), options(factors=None, kernel_sizes=((2, 3), (1, 1), (3, 1))))
    assert design.kernel_sizes == ((2, 3), (1, 1), (3, 1))
    assert design.sees_all_channels


def test_a_kernel_split_evenly_costs_more():
    """Section 2.3: it is a saddle point, not a minimum."""
    whole = design_chain(64, 64, (5, 5), options())
    split = design_chain(64, 64, (5, 5), options(kernel_sizes=((3, 3), (3, 3))))
    assert split.params > 1.5 * whole.params


@pytest.mark.parametrize(
    ("changes", "is_spatial", "sentence"),
    [
        ({"groups": (9, None)}, False, "9 groups are more than the 8 or 8 channels of factor 1"),
        ({"groups": (2, 2, 2), "kernel_sizes": ((2, 2), (2, 2))}, False, "2 factors have 2 numbers of groups, got 3"),
        ({"middle_channels": (4, 4), "groups": (2, 2)}, False, "2 factors have 1 middle channel counts, got 2"),
        ({"kernel_position": 3}, False, "--kernel-position 3 is beyond the last of 2 possible factors"),
        ({"kernel_position": 2}, True, "--kernel-position 2 is beyond the last of 1 possible factors"),
        ({"factors": 1}, True, "Kx1 and 1xK need at least 2 factors, got --factors 1"),
        ({"kernel_sizes": ((2, 2), (3, 2))}, False, r"kernels 2x2, 3x2 cover 4 pixels, not 3: .* add up to 3 \+ 2 - 1"),
        ({"kernel_sizes": ((2, 2), (2, 3))}, False, "cover 4 pixels, not 3"),
    ],
)
def test_contradictions_are_refused_in_one_sentence(changes, is_spatial, sentence):
    with pytest.raises(UsageError, match=sentence):
        design_chain(8, 8, (3, 3), options(factors=2, **changes) if "factors" not in changes else options(**changes),
                     is_spatial=is_spatial)  # fmt: skip


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("overlap", [1 / 16, 1 / 4, 1 / 2])
def test_an_overlap_below_one_breaks_the_receptive_field(overlap, rounding):
    design = design_chain(64, 64, (3, 3), SchemeOptions(overlap=overlap, group_rounding=rounding))
    assert not design.sees_all_channels
    seen = receptive_field(design.chain).channels
    assert max(seen) <= 64 * overlap * 1.5
    assert min(seen) >= 64 * overlap


@pytest.mark.parametrize("count", [2, 3, 5])
def test_more_overlap_is_more_paths_and_more_weights(count):
    designs = [design_chain(60, 60, (3, 3), options(overlap=gamma, factors=count)) for gamma in (0.5, 1.0, 2.0, 4.0)]
    assert [design.params for design in designs] == sorted(design.params for design in designs)
    assert designs[0].params < designs[-1].params
    # Beyond any use the chain is dense.
    assert design_chain(60, 60, (3, 3), options(overlap=1e12, factors=count)).groups == (1,) * count


@pytest.mark.parametrize("least", [1, 4, 8, 16, 32, 100])
@pytest.mark.parametrize("rounding", [*ROUNDINGS, "padded"])
def test_groups_keep_their_fewest_channels(rounding, least):
    chosen = SchemeOptions(factors=3, min_group_channels=least, group_rounding=rounding)
    for factor in design_chain(96, 72, (3, 3), chosen).factors:
        if factor.groups > 1 and not factor.pads_groups:
            assert min(*factor.in_groups, *factor.out_groups) >= least
        assert factor.groups <= max(1, min(factor.in_channels, factor.out_channels) // least)


@pytest.mark.parametrize(
    "channels", [(16, 16), (58, 58), (58, 116), (60, 120), (62, 62), (232, 232), (400, 800), (96, 24)]
)
def test_padded_groups_are_rounded_as_in_the_papers_tables(channels):
    """g_2 = ceil(C_2 / n_2) and g_1 = ceil(C_2 / g_2); a convolution costs ceil(in / g) * ceil(out / g) * g * K * K."""
    inputs, outputs = channels
    middle = min(channels)
    per_group = math.sqrt(inputs * middle * outputs * 9) / outputs
    second = max(1, math.ceil(middle / per_group))
    first = min(math.ceil(middle / second), inputs, middle)
    design = design_chain(inputs, outputs, (3, 3), SchemeOptions(group_rounding="padded"))
    assert design.groups == (first, second)
    assert design.params == (
        math.ceil(inputs / first) * math.ceil(middle / first) * first * 9
        + math.ceil(middle / second) * math.ceil(outputs / second) * second
    )
    # Rounded up, both together are too many, and the filling is paid for: uneven groups cost less where they are not.
    uneven = design_chain(inputs, outputs, (3, 3), options())
    assert uneven.params <= design.params or not design.sees_all_channels
    assert uneven.params <= 1.01 * design.params


@pytest.mark.parametrize("channels", [(64, 64), (128, 256), (256, 64), (512, 512)])
def test_two_factors_cost_what_equation_10_says(channels):
    inputs, outputs = channels
    lower_bound = 2 * math.sqrt(inputs * min(channels) * outputs * 9)
    design = design_chain(inputs, outputs, (3, 3), options())
    assert lower_bound <= design.params * (1 + 1e-9)
    assert design.params <= 1.1 * lower_bound


@pytest.mark.parametrize("overlap", [1.0, 4.0])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("channels", [32, 64, 100, 128, 256, 512, 1000])
def test_optimal_number_of_factors(channels, kernel, overlap):
    """Equations (21) and (22), but for the KxK factor: depthwise is its least, so that K * K * C come on top.

    The other factors then have a volume of gamma * C, not gamma * C * K * K, to cover. With whole numbers of channels
    in a group the cost is flat around the optimum, and of designs of equal cost the shortest is taken.
    """
    best = design_chain(channels, channels, (kernel, kernel), options(factors=None, overlap=overlap))
    depthwise = channels * kernel**2 if kernel > 1 else 0
    assert best.params <= 1.15 * math.e * channels * math.log(overlap * channels) + depthwise
    assert abs(len(best.groups) - (kernel > 1) - math.log(overlap * channels)) <= 2.25
    for count in range(1, MAX_FACTORS + 1):
        other = design_chain(channels, channels, (kernel, kernel), options(factors=count, overlap=overlap))
        assert best.params <= 1.02 * other.params


def test_divisors_are_taken_where_they_cost_little():
    plain = design_chain(64, 64, (3, 3), SchemeOptions(group_rounding="auto"))
    assert all(factor.is_even for factor in plain.factors)
    prime = design_chain(61, 61, (3, 3), SchemeOptions(group_rounding="auto"))
    assert not all(factor.is_even for factor in prime.factors)
    assert prime.params < 0.75 * design_chain(61, 61, (3, 3), SchemeOptions(group_rounding="divisor")).params
    for channels in range(4, 80):
        auto, uneven = (
            design_chain(channels, channels, (3, 3), SchemeOptions(group_rounding=rounding))
            for rounding in ("auto", "uneven")
        )
        assert uneven.params <= auto.params <= 1.1 * uneven.params


def test_shuffles_stand_between_grouped_factors_only():
    stages = ChainDesign((8, 8, 8, 8, 8), ((1, 1),) * 4, (2, 4, 1, 2)).chain.stages
    assert [stage.groups for stage in stages if isinstance(stage, Shuffle)] == [2]
    assert isinstance(stages[1], Shuffle)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_one_channel_has_nothing_to_group(count):
    design = design_chain(1, 1, (3, 3), options(factors=count))
    assert design.groups == (1,) * count
    assert design.channels == (1,) * (count + 1)
