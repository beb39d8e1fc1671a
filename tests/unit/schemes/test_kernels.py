import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st

from sepdeploy.core.chain import Activation, Chain, ChainSum, Factor, Norm, Shuffle, Slice, Towers, group_sizes
from sepdeploy.core.conv import ConvSpec
from sepdeploy.errors import UsageError
from sepdeploy.schemes.kernels import compose_chain, compose_kernels, dense_kernel, join_groups, split_groups
from sepdeploy.schemes.module import ChainConv2d

quick = settings(deadline=None, max_examples=50, derandomize=True, database=None)

TOLERANCE = 1e-12  # float64 sums of some hundred products in another order, relative to the largest
CHANNELS = st.integers(1, 9)
SIZES = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def factors(draw, inputs, kernel_size, outputs=None):
    outputs = outputs or draw(CHANNELS)
    groups = draw(st.integers(1, min(inputs, outputs)))
    return Factor(inputs, outputs, kernel_size, groups=groups, pads_groups=draw(st.booleans()))


@st.composite
def branches(draw, inputs, kernel_sizes, outputs):
    """Factors with these kernels after a slice and with shuffles between them."""
    start = draw(st.integers(0, inputs - 1))
    stages = [Slice(inputs, start, draw(st.integers(start + 1, inputs)))]
    for index, kernel_size in enumerate(kernel_sizes):
        channels = stages[-1].out_channels
        if draw(st.booleans()):
            stages.append(Shuffle(draw(st.integers(1, channels))))
        stages.append(draw(factors(channels, kernel_size, outputs if index == len(kernel_sizes) - 1 else None)))
    return Chain(tuple(stages))


@st.composite
def chains(draw, inputs=None, outputs=None):
    inputs = inputs or draw(CHANNELS)
    kernels = draw(st.lists(SIZES, min_size=1, max_size=3))
    if draw(st.booleans()):
        return draw(branches(inputs, kernels, outputs))
    join = draw(st.sampled_from(["concat", "sum"]))
    counts = [draw(CHANNELS)] * draw(st.integers(1, 3))
    towers = Towers(tuple(draw(branches(inputs, kernels, count)) for count in counts), join)
    last = draw(factors(towers.out_channels, draw(SIZES), outputs))
    return Chain((Shuffle(draw(st.integers(1, inputs))), towers, Shuffle(last.groups), last))


def relative_error(output, expected):
    assert output.shape == expected.shape
    return float((output - expected).abs().max() / expected.abs().max())


def random_module(form, seed=0):
    torch.manual_seed(seed)
    spec = ConvSpec(form.in_channels, form.out_channels, (1, 1))
    return ChainConv2d(form, spec, bias=False, dtype=torch.float64)


def impulse_response(module, extent):
    """The kernel as the module itself shows it: its outputs on one impulse per input channel."""
    channels, (height, width) = module.form.in_channels, extent
    impulses = torch.zeros(channels, channels, 2 * height - 1, 2 * width - 1, dtype=torch.float64)
    impulses[:, :, height - 1, width - 1] = torch.eye(channels)
    return module(impulses).flip(2, 3).transpose(0, 1)


def extent_of(form):
    """Height and width of the kernel of a form without padding."""
    return tuple(100 - size + 1 for size in form.output_size((100, 100)))


@given(st.data())
@quick
@torch.no_grad()
def test_composed_kernel_is_the_impulse_response(data):
    first = data.draw(chains())
    form = ChainSum((first,))
    module = random_module(form, data.draw(st.integers(0, 5)))
    expected = impulse_response(module, extent_of(form))
    kernel = compose_kernels(module.factor_weights(), form)
    assert kernel.shape == expected.shape
    assert float((kernel - expected).abs().max()) <= TOLERANCE * max(1.0, float(expected.abs().max()))


@given(st.data())
@quick
@torch.no_grad()
def test_kernels_of_a_sum_add_up(data):
    inputs, outputs = data.draw(CHANNELS), data.draw(CHANNELS)
    kernels = data.draw(st.lists(SIZES, min_size=1, max_size=3))
    terms = tuple(data.draw(branches(inputs, kernels, outputs)) for _ in range(data.draw(st.integers(1, 3))))
    form = ChainSum(terms)
    module = random_module(form)
    kernel = compose_kernels(module.factor_weights(), form)
    expected = sum(compose_chain(w, term) for w, term in zip(module.factor_weights(), terms, strict=True))
    assert relative_error(kernel, impulse_response(module, extent_of(form))) <= TOLERANCE
    assert relative_error(kernel, expected) <= TOLERANCE


@given(CHANNELS, CHANNELS, SIZES, st.data())
@quick
@torch.no_grad()
def test_dense_kernel_of_one_factor(inputs, outputs, kernel_size, data):
    factor = data.draw(factors(inputs, kernel_size, outputs))
    module = random_module(ChainSum((Chain((factor,)),)))
    ((weight,),) = module.factor_weights()
    assert weight.shape == factor.weight_shape
    dense = dense_kernel(weight, factor)
    assert dense.shape == (outputs, inputs, *kernel_size)
    # Exactly the connections within groups, each weight in its place.
    input_group = torch.arange(factor.groups).repeat_interleave(torch.tensor(factor.in_groups))
    output_group = torch.arange(factor.groups).repeat_interleave(torch.tensor(factor.out_groups))
    is_connected = output_group[:, None] == input_group
    assert torch.equal((dense != 0).flatten(2).any(2), is_connected)
    x = torch.randn(2, inputs, 5, 5, dtype=torch.float64)
    assert torch.allclose(F.conv2d(x, dense), module(x), rtol=0, atol=TOLERANCE)


@given(st.integers(1, 30), st.booleans(), st.data())
@quick
def test_splitting_into_groups_and_joining_them(channels, is_padded, data):
    sizes = group_sizes(channels, data.draw(st.integers(1, channels)), is_padded=is_padded)
    x = torch.rand(channels, 2, 3) + 1
    groups = split_groups(x, sizes)
    assert groups.shape == (len(sizes), max(sizes), 2, 3)
    for group, rows, size in zip(groups, x.split(sizes), sizes, strict=True):
        assert torch.equal(group[:size], rows)
        assert not bool(group[size:].any())
    assert torch.equal(join_groups(groups, sizes), x)


def test_two_spatial_factors_compose_to_their_outer_product():
    form = ChainSum((Chain((Factor(1, 1, (3, 1)), Factor(1, 1, (1, 2)))),))
    column, row = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, 7.0])
    kernel = compose_kernels(((column.reshape(1, 1, 3, 1), row.reshape(1, 1, 1, 2)),), form, 1)
    assert torch.equal(kernel[0, 0], torch.outer(column, row))


@pytest.mark.parametrize("sizes", [((3, 1), (1, 3)), ((2, 3), (1, 2)), ((1, 1), (2, 2)), ((3, 3), (1, 1))])
@torch.no_grad()
def test_both_ways_to_multiply_agree(sizes):
    """Where both factors have taps along an axis the product is a convolution, else a matrix product."""
    chain = Chain((Factor(6, 8, sizes[0], groups=2), Shuffle(2), Factor(8, 9, sizes[1], groups=3)))
    module = random_module(ChainSum((chain,)))
    kernel = compose_chain(module.factor_weights()[0], chain)
    assert relative_error(kernel, impulse_response(module, extent_of(chain))) <= TOLERANCE


@torch.no_grad()
def test_groups_of_the_whole_are_taken_from_the_diagonal():
    factor = Factor(6, 4, (2, 2), groups=2)
    chain = Chain((factor, Factor(4, 8, (1, 1), groups=2)))
    module = random_module(ChainSum((chain,)))
    grouped = compose_kernels(module.factor_weights(), module.form, groups=2)
    assert grouped.shape == (8, 3, 2, 2)
    x = torch.randn(1, 6, 4, 4, dtype=torch.float64)
    assert torch.allclose(F.conv2d(x, grouped, groups=2), module(x), rtol=0, atol=TOLERANCE)


def test_gradients_reach_every_factor():
    chain = Chain((Factor(5, 7, (2, 1), groups=3), Shuffle(3), Factor(7, 5, (1, 2), groups=2)))
    module = random_module(ChainSum((chain,)))
    module.weight.square().sum().backward()
    assert all(bool(parameter.grad.any()) for parameter in module.parameters())


@pytest.mark.parametrize(("stage", "kind"), [(Norm(4), "norm"), (Activation("relu"), "activation")])
def test_stages_that_are_no_convolution(stage, kind):
    chain = Chain((Factor(4, 4, (1, 1)), stage))
    with pytest.raises(UsageError, match=f"a chain with a {kind} computes no convolution; fold or remove it first"):
        compose_chain((torch.ones(4, 4, 1, 1),), chain)


def test_nothing_to_compose():
    with pytest.raises(UsageError, match="a chain without weights has no kernel"):
        compose_chain((), Chain((Slice(4, 0, 2),)))
