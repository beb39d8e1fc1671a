import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st

from sepdeploy.core.chain import Shuffle
from sepdeploy.core.conv import ConvSpec
from sepdeploy.core.plan import Reason, SchemeOptions
from sepdeploy.core.receptive_field import receptive_field
from sepdeploy.errors import UsageError
from sepdeploy.schemes.module import ChainConv2d
from sepdeploy.schemes.scheme import SCHEMES, find_scheme

quick = settings(deadline=None, max_examples=100, derandomize=True, database=None)

SPEC = ConvSpec(16, 32, (3, 3), stride=(2, 1), padding=(1, 1, 2, 0), dilation=(1, 2), groups=2, has_bias=True)


@pytest.mark.parametrize(
    ("scheme", "spec", "reason"),
    [
        ("dense", SPEC, Reason.SCHEME_IS_DENSE),
        ("depthwise_separable", SPEC, None),
        ("spatial_separable", SPEC, None),
        ("depthwise_separable", ConvSpec(16, 16, (1, 1)), Reason.POINTWISE),
        ("depthwise_separable", ConvSpec(16, 16, (1, 3)), None),
        ("spatial_separable", ConvSpec(16, 16, (1, 3)), Reason.ONE_DIMENSIONAL_KERNEL),
        ("spatial_separable", ConvSpec(16, 16, (3, 1)), Reason.ONE_DIMENSIONAL_KERNEL),
        ("depthwise_separable", ConvSpec(16, 32, (3, 3), groups=16), Reason.DEPTHWISE),
        ("spatial_separable", ConvSpec(16, 32, (3, 3), groups=16), Reason.DEPTHWISE),
        ("depthwise_separable", ConvSpec(1, 32, (3, 3)), Reason.FEW_CHANNELS),
        ("depthwise_separable", ConvSpec(3, 32, (3, 3)), Reason.FEW_CHANNELS),
        ("spatial_separable", ConvSpec(12, 12, (3, 3), groups=4), Reason.FEW_CHANNELS),
        ("spatial_separable", ConvSpec(4, 1, (3, 3)), None),
        ("depthwise", ConvSpec(16, 8, (3, 1)), None),
        ("depthwise", ConvSpec(16, 8, (1, 1)), Reason.POINTWISE),
        ("depthwise", ConvSpec(16, 16, (3, 3), groups=16), Reason.DEPTHWISE),
        ("depthwise", SPEC, Reason.GROUPED),
        ("depthwise", ConvSpec(3, 32, (3, 3)), Reason.FEW_CHANNELS),
        ("grouped", ConvSpec(16, 8, (1, 1)), None),
        ("grouped", ConvSpec(16, 16, (3, 3), groups=16), Reason.DEPTHWISE),
        ("grouped", SPEC, Reason.GROUPED),
        ("grouped", ConvSpec(3, 32, (3, 3)), Reason.FEW_CHANNELS),
        ("low_rank", ConvSpec(16, 8, (1, 1)), None),
        ("low_rank", SPEC, None),
        ("low_rank", ConvSpec(16, 16, (3, 3), groups=16), Reason.DEPTHWISE),
        ("low_rank", ConvSpec(12, 12, (3, 3), groups=4), Reason.FEW_CHANNELS),
        ("optimized_separable", ConvSpec(16, 8, (1, 1)), None),
        ("optimized_separable", ConvSpec(16, 8, (1, 3)), None),
        ("optimized_separable", SPEC, Reason.GROUPED),
        ("optimized_separable", ConvSpec(16, 16, (3, 3), groups=16), Reason.DEPTHWISE),
        ("optimized_separable", ConvSpec(3, 32, (3, 3)), Reason.FEW_CHANNELS),
        ("spatial_optimized", ConvSpec(16, 8, (2, 3)), None),
        ("spatial_optimized", ConvSpec(16, 8, (1, 1)), Reason.POINTWISE),
        ("spatial_optimized", ConvSpec(16, 8, (1, 3)), Reason.ONE_DIMENSIONAL_KERNEL),
        ("spatial_optimized", SPEC, Reason.GROUPED),
        ("spatial_optimized", ConvSpec(16, 16, (3, 3), groups=16), Reason.DEPTHWISE),
        ("spatial_optimized", ConvSpec(3, 32, (3, 3)), Reason.FEW_CHANNELS),
    ],
)
def test_refusals(scheme, spec, reason):
    assert find_scheme(scheme).check(spec) is reason


def test_depthwise_separable_form():
    form = find_scheme("depthwise_separable").design(SPEC, SchemeOptions(terms=3))
    assert len(form.terms) == 3
    depthwise, pointwise = form.terms[0].factors
    assert (depthwise.groups, depthwise.out_channels, depthwise.stride, depthwise.padding, depthwise.dilation) == (
        16, 16, (2, 1), (1, 1, 2, 0), (1, 2),
    )  # fmt: skip
    assert (pointwise.kernel_size, pointwise.groups, pointwise.stride, pointwise.padding) == (
        (1, 1), 2, (1, 1), (0, 0, 0, 0),
    )  # fmt: skip
    assert form.params == 3 * (16 * 9 + 32 * 8)


@pytest.mark.parametrize(("spec", "terms"), [(ConvSpec(8, 8, (3, 3)), 8), (ConvSpec(8, 32, (2, 2)), 4)])
def test_terms_stop_at_full_rank(spec, terms):
    assert len(find_scheme("depthwise_separable").design(spec, SchemeOptions(terms=50)).terms) == terms


def test_spatial_separable_form():
    vertical, horizontal = find_scheme("spatial_separable").design(SPEC, SchemeOptions()).terms[0].factors
    assert (vertical.kernel_size, vertical.stride, vertical.padding, vertical.dilation, vertical.groups) == (
        (3, 1), (2, 1), (1, 1, 0, 0), (1, 1), 2,
    )  # fmt: skip
    assert (horizontal.kernel_size, horizontal.stride, horizontal.padding, horizontal.dilation) == (
        (1, 3), (1, 1), (0, 0, 2, 0), (1, 2),
    )  # fmt: skip
    assert vertical.out_channels == horizontal.in_channels == 2 * 6  # 0.25 * min(8 * 3, 16 * 3) per group


@pytest.mark.parametrize(
    ("ratio", "rank"), [(1.0, 96), (0.999, 96), (0.5, 48), (0.26, 24), (0.1, 8), (0.05, 5), (0.001, 1)]
)
def test_ranks_fill_blocks_of_eight_below_the_full_rank(ratio, rank):
    form = find_scheme("spatial_separable").design(ConvSpec(32, 32, (3, 3)), SchemeOptions(rank_ratio=ratio))
    assert form.terms[0].factors[0].out_channels == rank


@pytest.mark.parametrize("padding_mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_other_padding_modes_are_left_to_the_module(scheme, padding_mode):
    spec = ConvSpec(8, 8, (3, 3), padding=(1, 1, 1, 1), padding_mode=padding_mode)
    for term in find_scheme(scheme).design(spec, SchemeOptions()).terms:
        assert all(factor.padding == (0, 0, 0, 0) for factor in term.factors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["dense", "depthwise_separable", "spatial_separable"])
def test_factors_fit_their_form_and_keep_the_type(scheme, dtype):
    chosen = find_scheme(scheme)
    form = chosen.design(SPEC, SchemeOptions())
    weight = torch.randn(32, 8, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = weight.clone()
    for values, chain in zip(chosen.factorize(weight, form), form.terms, strict=True):
        for value, factor in zip(values, chain.factors, strict=True):
            assert value.shape == (factor.out_channels, factor.in_channels // factor.groups, *factor.kernel_size)
            assert value.dtype is dtype
            assert value.is_contiguous()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("scheme", ["depthwise_separable", "spatial_separable"])
def test_zero_kernel_gives_zeros_not_nan(scheme):
    chosen = find_scheme(scheme)
    form = chosen.design(SPEC, SchemeOptions())
    for values in chosen.factorize(torch.zeros(32, 8, 3, 3), form):
        assert all(bool((value == 0).all()) for value in values)


def test_unknown_scheme_lists_all():
    with pytest.raises(UsageError, match=f"choose one of {', '.join(SCHEMES)}"):
        find_scheme("winograd")


@pytest.mark.parametrize(("field", "value"), [("terms", 0), ("rank_ratio", 0.0), ("rank_ratio", 1.01),
                                              ("rank_ratio", float("nan")), ("factors", 0), ("factors", 13),
                                              ("overlap", 0.0), ("overlap", math.inf),
                                              ("overlap", math.nan)])  # fmt: skip
def test_options_outside_their_range(field, value):
    with pytest.raises(UsageError, match=f"--{field.replace('_', '-')} must be"):
        SchemeOptions(**{field: value})


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("channels", [64, 144])
@pytest.mark.parametrize("kernel", [3, 5])
def test_complexity_is_the_number_of_weights(scheme, channels, kernel):
    """Table 1; exact, but for numbers of groups that have to be whole."""
    form = find_scheme(scheme).design(ConvSpec(channels, channels, (kernel, kernel)), SchemeOptions())
    middle = form.terms[0].factors[0].out_channels
    names = {"C": channels, "K": kernel, "T": len(form.terms), "r": middle, "g": 4, "e": math.e, "log": math.log}
    expected = eval(find_scheme(scheme).complexity, {"__builtins__": {}}, names)
    is_rounded = scheme in ("optimized_separable", "spatial_optimized")
    assert form.params == (pytest.approx(expected, rel=0.15) if is_rounded else expected)
    assert form.params >= expected * (1 - 1e-9)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_prefixes_are_the_papers(scheme):
    prefixes = {"depthwise": "dw-", "depthwise_separable": "d-", "spatial_separable": "s-",
                "optimized_separable": "o-", "spatial_optimized": "so-"}  # fmt: skip
    assert find_scheme(scheme).prefix == prefixes.get(scheme, "")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_who_sees_the_whole_volume(scheme):
    """The row 'Vol. RF' of table 1."""
    spec = ConvSpec(24, 20, (3, 4), stride=(2, 1), padding=(1, 1, 2, 1), dilation=(1, 2))
    form = find_scheme(scheme).design(spec, SchemeOptions())
    assert receptive_field(form).window == receptive_field(spec.as_factor()).window == (3, 7)
    sees_all = receptive_field(form).covers(receptive_field(spec.as_factor()))
    assert sees_all == (scheme not in ("depthwise", "grouped"))


@pytest.mark.parametrize(
    ("options", "groups"),
    [({}, 4), ({"groups": (3,)}, 3), ({"groups": (50,)}, 16), ({"min_group_channels": 8}, 2),
     ({"min_group_channels": 32}, 1), ({"groups": (None,)}, 4), ({"group_rounding": "divisor"}, 1)],
)  # fmt: skip
def test_grouped_form(options, groups):
    (factor,) = find_scheme("grouped").design(ConvSpec(16, 17, (3, 3)), SchemeOptions(**options)).terms[0].factors
    assert factor.groups == groups
    assert not factor.pads_groups


def test_grouped_form_whose_groups_must_divide_the_channels():
    options = SchemeOptions(groups=(8,), group_rounding="divisor")
    (factor,) = find_scheme("grouped").design(ConvSpec(12, 18, (3, 3)), options).terms[0].factors
    assert factor.groups == 6


def test_grouped_takes_one_number_of_groups():
    with pytest.raises(UsageError, match="one number of groups, got 2"):
        find_scheme("grouped").design(ConvSpec(16, 16, (3, 3)), SchemeOptions(groups=(2, 4)))


def test_depthwise_form_of_unequal_channels():
    (factor,) = find_scheme("depthwise").design(ConvSpec(10, 16, (3, 3)), SchemeOptions()).terms[0].factors
    assert factor.groups == 10
    assert factor.params == 16 * 9


def test_low_rank_form():
    first, second = find_scheme("low_rank").design(SPEC, SchemeOptions()).terms[0].factors
    assert first == replace(SPEC.as_factor(), out_channels=2 * 4)  # 0.25 * min(8 * 9, 16) per group
    assert (second.in_channels, second.out_channels, second.kernel_size, second.groups) == (8, 32, (1, 1), 2)
    assert second.is_pointwise


def test_optimized_separable_form():
    spec = ConvSpec(64, 64, (3, 3), stride=(2, 2), padding=(1, 1, 1, 1), dilation=(2, 2))
    first, shuffle, second = find_scheme("optimized_separable").design(spec, SchemeOptions()).terms[0].stages
    assert (first.kernel_size, first.stride, first.padding, first.dilation) == (
        (3, 3), (2, 2), (1, 1, 1, 1), (2, 2),
    )  # fmt: skip
    assert shuffle == Shuffle(first.groups)
    assert second.is_pointwise
    assert first.groups * second.groups == 64


def test_spatial_optimized_form():
    spec = ConvSpec(64, 64, (3, 5), stride=(2, 3), padding=(1, 0, 2, 1), dilation=(2, 1))
    first, _, second = find_scheme("spatial_optimized").design(spec, SchemeOptions()).terms[0].stages
    assert (first.kernel_size, first.stride, first.padding, first.dilation) == ((3, 1), (2, 1), (1, 0, 0, 0), (2, 1))
    assert (second.kernel_size, second.stride, second.padding, second.dilation) == (
        (1, 5),
        (1, 3),
        (0, 0, 2, 1),
        (1, 1),
    )


def test_the_kernel_may_stand_in_the_second_factor_instead():
    scheme, spec = find_scheme("optimized_separable"), ConvSpec(16, 16, (3, 3))
    (other,) = scheme.alternatives(spec, SchemeOptions())
    assert [factor.kernel_size for factor in other.terms[0].factors] == [(1, 1), (3, 3)]
    for fixed in ({"kernel_position": 1}, {"kernel_sizes": ((2, 2), (2, 2))}, {"factors": 3}):
        assert scheme.alternatives(spec, SchemeOptions(**fixed)) == ()
    assert scheme.alternatives(ConvSpec(16, 16, (1, 1)), SchemeOptions()) == ()


@st.composite
def specs(draw):
    groups = draw(st.sampled_from([1, 1, 1, 2]))
    return ConvSpec(
        groups * draw(st.integers(4, 12)),
        groups * draw(st.integers(1, 12)),
        draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        stride=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        padding=draw(st.tuples(*[st.integers(0, 3)] * 4)),
        dilation=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        groups=groups,
        has_bias=draw(st.booleans()),
    )


@st.composite
def options_for(draw, spec):
    """Options that fit the geometry, kernels split at random among them."""
    kernels = ()
    if draw(st.booleans()):
        first = tuple(draw(st.integers(1, size)) for size in spec.kernel_size)
        kernels = (first, tuple(size - own + 1 for size, own in zip(spec.kernel_size, first, strict=True)))
    return SchemeOptions(
        terms=draw(st.integers(1, 3)),
        rank_ratio=draw(st.sampled_from([0.1, 0.25, 1.0])),
        factors=draw(st.sampled_from([2, 3, 4, None])),
        overlap=draw(st.sampled_from([0.5, 1.0, 2.0])),
        kernel_sizes=kernels,
        group_rounding=draw(st.sampled_from(["auto", "uneven", "divisor", "padded"])),
    )


@pytest.mark.parametrize("scheme", SCHEMES)
@given(st.data())
@quick
@torch.no_grad()
def test_form_is_a_convolution_of_the_same_geometry(scheme, data):
    """With any weights: the module and a dense convolution with the kernel that it composes to give the same."""
    spec = data.draw(specs())
    reason = find_scheme(scheme).check(spec)
    if reason not in (None, Reason.SCHEME_IS_DENSE):
        return
    form = find_scheme(scheme).design(spec, data.draw(options_for(spec)))
    module = ChainConv2d(form, spec, bias=spec.has_bias, dtype=torch.float64)
    x = torch.randn(2, spec.in_channels, 13, 14, dtype=torch.float64)
    top, bottom, left, right = spec.padding
    kernel = module.weight
    assert kernel.shape == (spec.out_channels, spec.in_channels // spec.groups, *spec.kernel_size)
    expected = F.conv2d(
        F.pad(x, (left, right, top, bottom)), kernel, module.bias, spec.stride, dilation=spec.dilation,
        groups=spec.groups,
    )  # fmt: skip
    y = module(x)
    assert y.shape == expected.shape
    assert y.shape[2:] == form.output_size((13, 14)) == spec.as_factor().output_size((13, 14))
    assert torch.allclose(y, expected, rtol=0, atol=1e-10)
    assert sum(parameter.numel() for parameter in module.parameters()) == module.form.params


def test_options_that_do_not_fit_are_refused_in_a_sentence():
    spec = ConvSpec(16, 16, (5, 5))
    for scheme in ("optimized_separable", "spatial_optimized"):
        with pytest.raises(UsageError, match="cover 3 pixels, not 5: their sizes must add up to"):
            find_scheme(scheme).design(spec, SchemeOptions(kernel_sizes=((3, 3), (1, 1))))
