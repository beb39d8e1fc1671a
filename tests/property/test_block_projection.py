"""The closed form of optimized-separable chains: exact where it can be, and nothing better is found where it cannot."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sepdeploy.core.chain import Chain, ChainSum, Factor, Shuffle
from sepdeploy.core.conv import ConvSpec
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.schemes.block_projection import factorize_chain
from sepdeploy.schemes.kernels import compose_chain, kernel_error
from sepdeploy.schemes.scheme import find_scheme
from sepdeploy.transfer.moments import patch_moments

quick = settings(deadline=None, max_examples=40, derandomize=True, database=None)
EXACT = 1e-5


@st.composite
def chains(draw, most_factors=2, most_channels=9):
    """Chains with uneven or padded groups and shuffles; along each axis one factor has taps."""
    count = draw(st.integers(2, most_factors))
    channels = [draw(st.integers(2, most_channels)) for _ in range(count + 1)]
    rows, columns = draw(st.integers(0, count - 1)), draw(st.integers(0, count - 1))
    kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    pads = draw(st.booleans())
    stages = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(channels)):
        groups = draw(st.integers(1, min(inputs, outputs)))
        if i:
            stages.append(Shuffle(stages[-1].groups))
        size = (kernel[0] if i == rows else 1, kernel[1] if i == columns else 1)
        stages.append(Factor(inputs, outputs, size, groups=groups, pads_groups=pads))
    return Chain(tuple(stages))


def random_kernel(chain, seed=0):
    torch.manual_seed(seed)
    size = [1 + sum(factor.kernel_size[axis] - 1 for factor in chain.factors) for axis in (0, 1)]
    return torch.randn(chain.out_channels, chain.in_channels, *size, dtype=torch.float64)


def relative_error(kernel, chain, weights):
    return float((compose_chain(weights, chain) - kernel).norm() / kernel.norm())


def inside_groups(weight, factor):
    """A weight with zeros where a smaller group has no channel."""
    sizes = torch.tensor(factor.in_groups).repeat_interleave(torch.tensor(factor.out_groups))
    return weight * (torch.arange(factor.in_per_group) < sizes[:, None])[:, :, None, None]


@given(chain=chains(), seed=st.integers(0, 5))
@quick
def test_kernels_that_a_chain_of_two_can_hold_are_found_exactly(chain, seed):
    torch.manual_seed(seed)
    weights = [inside_groups(torch.randn(factor.weight_shape).double(), factor) for factor in chain.factors]
    kernel = compose_chain(weights, chain)
    assert relative_error(kernel, chain, factorize_chain(kernel, chain)) < EXACT


@given(chain=chains(), seed=st.integers(0, 5))
@settings(quick, max_examples=15)
def test_gradient_descent_and_random_search_find_nothing_better_for_two_factors(chain, seed):
    kernel = random_kernel(chain, seed)
    best = relative_error(kernel, chain, factorize_chain(kernel, chain))
    for start in range(2):
        torch.manual_seed(start)
        weights = [torch.randn(factor.weight_shape).double() * 0.3 for factor in chain.factors]
        assert relative_error(kernel, chain, weights) >= best - 1e-9
        parameters = [weight.requires_grad_() for weight in weights]
        optimizer = torch.optim.LBFGS(parameters, max_iter=100, line_search_fn="strong_wolfe")

        def closure(parameters=parameters, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (compose_chain(parameters, chain) - kernel).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        found = relative_error(kernel, chain, [parameter.detach() for parameter in parameters])
        assert found >= best * (1 - 1e-6) - 1e-9


@given(chain=chains(most_factors=4), seed=st.integers(0, 5))
@quick
def test_error_is_at_most_that_of_no_kernel_at_all_and_of_one_factor(chain, seed):
    """The trivial bounds: the zero kernel, and the best that the last factor alone can add to the found others."""
    kernel = random_kernel(chain, seed)
    weights = factorize_chain(kernel, chain)
    error = relative_error(kernel, chain, weights)
    assert error <= 1 + 1e-9
    scaled = compose_chain(weights, chain)
    best_scale = float((scaled * kernel).sum() / scaled.square().sum().clamp_min(1e-30))
    assert error <= float((best_scale * scaled - kernel).norm() / kernel.norm()) + 2e-3


@pytest.mark.parametrize("position", [1, 2, 3])
@given(channels=st.tuples(*[st.integers(2, 5)] * 2), kernel=st.tuples(*[st.integers(1, 3)] * 2))
@settings(quick, max_examples=10)
def test_long_chains_with_wide_middles_are_exact(position, channels, kernel):
    wide = max(channels[0], channels[1]) * kernel[0] * kernel[1]
    options = SchemeOptions(factors=3, groups=(1, 1, 1), middle_channels=(wide,), kernel_position=position)
    spec = ConvSpec(channels[0], channels[1], kernel)
    scheme = find_scheme("optimized_separable")
    form = scheme.design(spec, options)
    weight = torch.randn(channels[1], channels[0], *kernel, generator=torch.Generator().manual_seed(0))
    assert kernel_error(weight, scheme.factorize(weight, form), form) < EXACT


@pytest.mark.parametrize("factors", [3, 4, 5])
def test_planted_long_chains_are_recovered(factors):
    scheme = find_scheme("optimized_separable")
    form = scheme.design(ConvSpec(32, 32, (3, 3)), SchemeOptions(factors=factors, group_rounding="divisor"))
    (chain,) = form.terms
    torch.manual_seed(1)
    kernel = compose_chain([torch.randn(factor.weight_shape).double() for factor in chain.factors], chain)
    assert relative_error(kernel, chain, factorize_chain(kernel, chain)) < EXACT


@given(chain=chains(most_factors=3), seed=st.integers(0, 5))
@quick
def test_kernels_that_overlap_along_an_axis_still_get_weights(chain, seed):
    """Preset kernels such as 2x2 after 2x2 have no closed form, but their own kernels are met well."""
    first, *middle, last = chain.stages
    chain = Chain((Factor(first.in_channels, first.out_channels, (2, 2), groups=first.groups), *middle, last))
    kernel = random_kernel(chain, seed)
    weights = factorize_chain(kernel, chain)
    zero_tap = [torch.zeros_like(weight) for weight in weights]
    assert relative_error(kernel, chain, weights) < relative_error(kernel, chain, zero_tap)


@given(chain=chains(), seed=st.integers(0, 3))
@settings(quick, max_examples=20)
def test_with_moments_the_error_on_such_inputs_is_no_larger(chain, seed):
    """With uncorrelated groups, inputs have exactly the moments that the whitening assumes."""
    kernel = random_kernel(chain, seed)
    first = chain.factors[0]
    if first.kernel_size != tuple(kernel.shape[2:]):
        return  # taps of the second factor are taken as uncorrelated: an approximation
    torch.manual_seed(seed)
    scale = torch.randn(first.in_channels).exp()[:, None, None].double()
    images = torch.randn(200, first.in_channels, *first.kernel_size).double() * scale
    moments = patch_moments(images, first)

    def output_error(weights):
        difference = (compose_chain(weights, chain) - kernel).square()
        return float((difference * scale.square()).sum())

    plain, whitened = factorize_chain(kernel, chain), factorize_chain(kernel, chain, moments)
    assert output_error(whitened) <= output_error(plain) * 1.2 + 1e-9


@given(chain=chains(most_factors=4), seed=st.integers(0, 3))
@quick
def test_both_sides_of_a_middle_channel_are_of_even_size(chain, seed):
    kernel = random_kernel(chain, seed)
    weights = factorize_chain(kernel, chain)
    sizes = [float(weight.norm()) for weight in weights]
    assert max(sizes) <= 30 * min(sizes) + 1e-9


def test_a_sum_of_one_chain_is_what_the_scheme_returns():
    scheme = find_scheme("spatial_optimized")
    form = scheme.design(ConvSpec(16, 16, (3, 5)), SchemeOptions())
    weight = torch.randn(16, 16, 3, 5, generator=torch.Generator().manual_seed(0))
    (weights,) = scheme.factorize(weight, form)
    assert isinstance(form, ChainSum)
    assert [value.shape for value in weights] == [factor.weight_shape for factor in form.terms[0].factors]
    assert kernel_error(weight, scheme.factorize(weight, form), form) < 1
