import copy

import pytest
import torch
from torch import nn

from sepdeploy.core.chain import Chain, ChainSum, Factor, Shuffle
from sepdeploy.core.conv import ConvSpec
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.errors import UsageError
from sepdeploy.schemes.module import ChainConv2d, compose_kernels
from sepdeploy.schemes.scheme import find_scheme

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
    with pytest.raises(UsageError, match="with shuffles is not available"):
        _ = module.weight


def test_copies_and_state_dicts_carry_everything():
    module, x = make(), torch.randn(1, 8, 5, 5)
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    other = make()
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))


def test_two_spatial_factors_compose_to_their_outer_product():
    form = ChainSum((Chain((Factor(1, 1, (3, 1)), Factor(1, 1, (1, 2)))),))
    column, row = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, 7.0])
    kernel = compose_kernels(((column.reshape(1, 1, 3, 1), row.reshape(1, 1, 1, 2)),), form, 1)
    assert torch.equal(kernel[0, 0], torch.outer(column, row))
