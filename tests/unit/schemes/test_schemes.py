import pytest
import torch

from sepdeploy.core.conv import ConvSpec
from sepdeploy.core.plan import Reason, SchemeOptions
from sepdeploy.errors import UsageError
from sepdeploy.schemes.scheme import find_scheme

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
@pytest.mark.parametrize("scheme", ["dense", "depthwise_separable", "spatial_separable"])
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
    with pytest.raises(UsageError, match="dense, depthwise_separable, spatial_separable"):
        find_scheme("winograd")


@pytest.mark.parametrize(("field", "value"), [("terms", 0), ("rank_ratio", 0.0), ("rank_ratio", 1.01),
                                              ("rank_ratio", float("nan"))])  # fmt: skip
def test_options_outside_their_range(field, value):
    with pytest.raises(UsageError, match=f"--{field.replace('_', '-')} must be"):
        SchemeOptions(**{field: value})
