import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from sepdeploy.core.chain import Activation, Chain, ChainSum, Factor, Norm, Shuffle, Slice, Towers
from sepdeploy.core.conv import ConvSpec
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.errors import ContractError, UsageError
from sepdeploy.schemes.module import ChainConv2d, batchnorm_affine
from sepdeploy.schemes.scheme import find_scheme
from sepdeploy.schemes.stage_modules import ChannelShuffle

SPEC = ConvSpec(8, 12, (3, 3), padding=(1, 1, 1, 1), has_bias=True)


def make(spec=SPEC, scheme="depthwise_separable", bias=True):
    torch.manual_seed(0)
    return ChainConv2d(find_scheme(scheme).design(spec, SchemeOptions()), spec, bias=bias)


def test_looks_like_the_convolution_it_replaces():
    module, conv = make(), nn.Conv2d(8, 12, 3, padding=1)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
                 "padding_mode"):  # fmt: skip
        assert getattr(module, name) == getattr(conv, name)
    assert module.weight.shape == conv.weight.shape
    assert module.bias.shape == conv.bias.shape


@torch.no_grad()
def test_bias_is_added_once():
    module = make()
    for parameter in module.parameters():
        parameter.zero_()
    module.bias.fill_(3)
    assert torch.equal(module(torch.randn(2, 8, 5, 5)), torch.full((2, 12, 5, 5), 3.0))
    assert sum(conv.bias is not None for term in module.factor_modules() for conv in term) == 1


def test_call_by_keyword_as_nn_conv2d_takes_it():
    module, x = make(), torch.randn(1, 8, 5, 5)
    assert torch.equal(module(input=x), module(x))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_unbatched_input(mode):
    spec = ConvSpec(8, 12, (4, 4), padding=(1, 2, 1, 2), padding_mode=mode)
    module, x = make(spec, "spatial_separable"), torch.randn(8, 6, 6)
    assert torch.allclose(module(x), module(x[None])[0], atol=1e-6)


def test_weights_without_a_place_are_refused():
    module = make(bias=False)
    assert module.bias is None
    weights = tuple(tuple(conv.weight for conv in term) for term in module.factor_modules())
    module.set_weights(weights)
    with pytest.raises(UsageError, match="made without a bias"):
        module.set_weights(weights, torch.zeros(12))


def test_missing_bias_is_zero():
    module = make()
    weights = tuple(tuple(conv.weight for conv in term) for term in module.factor_modules())
    module.set_weights(weights, None)
    assert not bool(module.bias.any())


@torch.no_grad()
def test_shuffle_between_factors():
    spec = ConvSpec(8, 8, (1, 1))
    chain = Chain((Factor(8, 8, (1, 1), groups=4), Shuffle(4), Factor(8, 8, (1, 1), groups=2)))
    module = ChainConv2d(ChainSum((chain,)), spec, bias=True)
    first, second = module.factor_modules()[0]
    assert first.bias is None
    assert second.bias is not None
    x = torch.randn(1, 8, 3, 3)
    y = first(x).reshape(1, 4, 2, 3, 3).transpose(1, 2).reshape(1, 8, 3, 3)
    assert torch.allclose(module(x), second(y), atol=1e-6)
    assert torch.allclose(F.conv2d(x, module.weight, module.bias), second(y), atol=1e-6)


def test_copies_and_state_dicts_carry_everything():
    module, x = make(), torch.randn(1, 8, 5, 5)
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    other = make()
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))


def run(form, bias=False, dtype=torch.float64):
    """The module of a form of 1x1 geometry, with random weights."""
    torch.manual_seed(0)
    return ChainConv2d(form, ConvSpec(form.in_channels, form.out_channels, (1, 1)), bias=bias, dtype=dtype)


def by_hand(x, factor, weight, bias=None):
    """A grouped convolution group by group, whatever the sizes of the groups."""
    top, bottom, left, right = factor.padding
    x = F.pad(x, (left, right, top, bottom))
    outputs = [
        F.conv2d(part, kernel[:, : part.shape[1]], stride=factor.stride, dilation=factor.dilation)
        for part, kernel in zip(x.split(factor.in_groups, 1), weight.split(factor.out_groups), strict=True)
        if part.shape[1]
    ]
    y = torch.cat(outputs, 1)
    y = F.pad(y, (0, 0, 0, 0, 0, factor.out_channels - y.shape[1]))
    return y if bias is None else y + bias[:, None, None]


UNEVEN = [
    Factor(10, 7, (3, 2), stride=(2, 1), padding=(1, 1, 2, 2), dilation=(1, 2), groups=4),
    Factor(10, 7, (3, 2), stride=(2, 1), padding=(1, 0, 2, 1), dilation=(1, 2), groups=4),
    Factor(9, 12, (1, 1), groups=4),
    Factor(5, 5, (2, 2), groups=3, pads_groups=True, padding=(1, 1, 0, 0)),
    Factor(10, 7, (3, 2), padding=(0, 1, 1, 1), groups=4, pads_groups=True),
    Factor(10, 12, (1, 1), groups=6, pads_groups=True),  # its last group has no inputs
]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("factor", UNEVEN)
@torch.no_grad()
def test_uneven_groups_run_as_the_groups_they_are(factor, has_bias):
    module = run(ChainSum((Chain((factor,)),)), bias=has_bias)
    ((weight,),) = module.factor_weights()
    x = torch.randn(2, factor.in_channels, 6, 7, dtype=torch.float64)
    y = module(x)
    assert torch.allclose(y, by_hand(x, factor, weight, module.bias), rtol=0, atol=1e-12)
    assert torch.allclose(module(x[0]), y[0], rtol=0, atol=1e-12)
    assert y.shape[2:] == factor.output_size((6, 7))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("factor", UNEVEN)
def test_no_weight_is_stored_that_params_does_not_count(factor, has_bias):
    module = run(ChainSum((Chain((factor,)),)), bias=has_bias)
    assert sum(parameter.numel() for parameter in module.parameters()) == module.form.params


@pytest.mark.parametrize("factor", UNEVEN)
@torch.no_grad()
def test_weights_and_bias_of_uneven_groups_can_be_set(factor):
    source, target = (run(ChainSum((Chain((factor,)),)), bias=True) for _ in range(2))
    for parameter in target.parameters():
        parameter.fill_(7)
    before = list(target.parameters())
    target.set_weights(source.factor_weights(), source.bias)
    x = torch.randn(1, factor.in_channels, 5, 5, dtype=torch.float64)
    assert torch.equal(target(x), source(x))
    # In place: an optimizer that holds the parameters still holds them.
    assert all(old is new for old, new in zip(before, target.parameters(), strict=True))


@pytest.mark.parametrize("factor", UNEVEN)
@torch.no_grad()
def test_outputs_are_scaled_with_and_without_a_bias_before(factor):
    terms = (Chain((factor,)),) * 2
    scale = torch.linspace(-2, 3, factor.out_channels, dtype=torch.float64)
    shift = torch.linspace(1, 2, factor.out_channels, dtype=torch.float64)
    x = torch.randn(1, factor.in_channels, 5, 5, dtype=torch.float64)
    for has_bias in (False, True):
        module = run(ChainSum(terms), bias=has_bias)
        expected = module(x) * scale[:, None, None] + shift[:, None, None]
        module.scale_outputs(scale, shift)
        assert torch.allclose(module(x), expected, rtol=0, atol=1e-12)
        assert module.form.terms[0].factors[-1].has_bias


@pytest.mark.parametrize("shuffle", [Shuffle(3), Shuffle(5), Shuffle(1), Shuffle(12)])
def test_shuffles_written_down_in_two_ways(shuffle):
    x = torch.randn(2, 12, 3, 4)
    gather = ChannelShuffle(shuffle, 12)
    assert torch.equal(gather(x), x[:, list(shuffle.order(12))])
    transposed = ChannelShuffle(Shuffle(shuffle.groups, "channels_last"), 12)
    assert torch.equal(transposed(x), gather(x))
    assert torch.equal(transposed(x[0]), gather(x)[0])
    assert transposed.is_channels_last == (12 % shuffle.groups == 0)


NESTED = Chain(
    (
        Factor(6, 8, (2, 2), groups=4, has_bias=True),
        Norm(8),
        Activation("relu"),
        Towers(
            (
                Chain((Slice(8, 0, 5), Factor(5, 4, (1, 1), groups=3))),
                Chain((Slice(8, 5, 8), Towers((Chain((Factor(3, 2, (1, 1)),)),) * 2, "sum"))),
            ),
            "concat",
        ),
        Shuffle(2),
        Factor(6, 5, (1, 1), padding=(0, 1, 0, 0)),
    )
)


@torch.no_grad()
def test_towers_run_their_branches_side_by_side():
    module = run(ChainSum((NESTED,))).eval()
    (stem, first, left, right, last), x = module.factor_modules()[0], torch.randn(1, 6, 4, 4, dtype=torch.float64)
    y = F.relu(stem(x) / (1 + 1e-5) ** 0.5)
    y = torch.cat([first(y[:, :5]), left(y[:, 5:]) + right(y[:, 5:])], 1)[:, [0, 3, 1, 4, 2, 5]]
    assert torch.allclose(module(x), last(F.pad(y, (0, 0, 0, 1))), rtol=0, atol=1e-12)
    assert [len(weights) for weights in module.factor_weights()] == [len(NESTED.factors)]
    assert sum(parameter.numel() for parameter in module.parameters()) == NESTED.params


@torch.no_grad()
def test_weighted_stages_carry_the_whole_module():
    form = ChainSum((NESTED,) * 2)
    module = run(form, bias=True)
    for norm in (part for part in module.modules() if isinstance(part, nn.BatchNorm2d)):
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
        norm.weight.uniform_(0.5, 2)
        norm.bias.uniform_(-1, 1)
    module.eval()
    copied = ChainConv2d.from_weighted(module.weighted(), module.spec, dtype=torch.float64)
    x = torch.randn(1, 6, 4, 4, dtype=torch.float64)
    assert copied.form == module.form
    assert not copied.training
    assert torch.allclose(copied(x), module(x), rtol=0, atol=1e-12)


def test_weighted_stages_are_copies():
    module = run(ChainSum((Chain((UNEVEN[0],)),)))
    ((item,),) = module.weighted()
    item.weight.zero_()
    assert bool(module.factor_weights()[0][0].any())


def test_no_bias_or_scale_where_a_term_does_not_end_in_a_convolution():
    module = run(ChainSum((Chain((Factor(4, 4, (1, 1)), Shuffle(2))),)))
    with pytest.raises(UsageError, match="no place for a bias or a scale"):
        module.set_bias(torch.zeros(4))
    with pytest.raises(UsageError, match="no place for a bias or a scale"):
        module.scale_outputs(torch.ones(4), torch.zeros(4))


@pytest.mark.parametrize("affine", [False, True])
@torch.no_grad()
def test_affine_part_of_a_norm(affine):
    norm = nn.BatchNorm2d(3, affine=affine).eval()
    norm.running_mean.copy_(torch.tensor([1.0, -2.0, 3.0]))
    norm.running_var.copy_(torch.tensor([4.0, 0.25, 1.0]))
    if affine:
        norm.weight.copy_(torch.tensor([2.0, -1.0, 0.5]))
        norm.bias.copy_(torch.tensor([0.0, 1.0, -1.0]))
    scale, shift = batchnorm_affine(norm)
    x = torch.randn(2, 3, 2, 2)
    folded = x * scale[:, None, None] + shift[:, None, None]
    assert scale.dtype is shift.dtype is torch.float64
    assert torch.allclose(folded.float(), norm(x), atol=1e-5)
    with pytest.raises(ContractError, match="no batch norm with running statistics, and cannot be folded"):
        batchnorm_affine(nn.BatchNorm2d(3, track_running_stats=False))
