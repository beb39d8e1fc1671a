"""The block that a layer is to its runtime, as a network of its own: built from shapes alone, to be measured."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from sepdeploy.core.chain import Chain, ChainSum, Size
from sepdeploy.core.conv import ConvSite, ConvSpec
from sepdeploy.core.selection import Activation, FusedBlock
from sepdeploy.errors import ContractError
from sepdeploy.passes.lower_chains import lower_chains
from sepdeploy.schemes.fresh_weights import draw_weights
from sepdeploy.schemes.module import ChainConv2d, ChainLinear

__all__ = ["BLOCK_VERSION", "blocks_of_site", "build_block", "dense_block", "dense_form", "example_of"]

BLOCK_VERSION = 1
"""Part of what prices are remembered by: to be raised when blocks, or the files made of them, change."""

_SEED = 0
_BIAS_DEVIATION = 0.1

_ACTIVATIONS: dict[Activation, type[nn.Module]] = {
    "": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "hardsigmoid": nn.Hardsigmoid,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
}


def dense_form(spec: ConvSpec) -> ChainSum:
    """The layer itself, as a chain of one factor."""
    return ChainSum((Chain((spec.as_factor(),)),))


def dense_block(
    spec: ConvSpec, input_size: Size, *, positions: int = 1, activation: Activation = "", is_linear: bool = False
) -> FusedBlock:
    """The block of a layer that is kept.

    >>> dense_block(ConvSpec(8, 16, (3, 3)), (6, 6)).form.out_channels
    16
    """
    return FusedBlock(
        dense_form(spec),
        replace(spec, has_bias=True),
        input_size,
        positions=positions,
        activation=activation,
        is_linear=is_linear,
    )


def blocks_of_site(
    site: ConvSite, form: ChainSum, activation: Activation = "", lowering: tuple[str, ...] = ()
) -> tuple[FusedBlock, ...]:
    """One block for each call of a layer.

    Args:
        site: A convolution, or a linear layer as tracing lists it.
        form: What it becomes; `dense_form(site.spec)` for what it is.
        activation: What follows it.
        lowering: How the form is written down.

    Raises:
        ContractError: if the site has no geometry.
    """
    if site.spec is None:
        raise ContractError(f"{site.name} has no geometry")
    spec = replace(site.spec, has_bias=True)  # blocks have one whatever the layer has: the same price for both
    is_linear = spec.is_pointwise and "linear" in site.module_type.lower()
    blocks = []
    for call in site.calls:
        images, _, height, width = call.input_shape
        if is_linear:
            images, height, width = images * height * width, 1, 1
        blocks.append(FusedBlock(form, spec, (height, width), images, activation, lowering, is_linear))
    return tuple(blocks)


def example_of(block: FusedBlock) -> Tensor:
    """A random input: (N, C, H, W), for a linear layer (1, C) or (1, N, C), float32; always the same."""
    channels = block.spec.in_channels
    shape: tuple[int, ...] = (block.positions, channels, *block.input_size)
    if block.is_linear:
        shape = (1, channels) if block.positions == 1 else (1, block.positions, channels)
    return torch.randn(shape, generator=torch.Generator().manual_seed(_SEED))


@torch.no_grad()
def build_block(block: FusedBlock) -> nn.Module:
    """A network of the block alone, in eval mode.

    Weights are random, always the same, and keep the variance of the values, so that nothing is infinite, denormal or
    out of the range of 8 bits. A layer that is kept is a plain nn.Conv2d or nn.Linear, as in the original network.

    Raises:
        UsageError: if the form ends in no convolution, so that it cannot have a bias, or no lowering has such a name.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        kind = ChainLinear if block.is_linear else ChainConv2d
        chains = kind(block.form, block.spec, bias=True)
        draw_weights(chains, 1.0, _BIAS_DEVIATION * torch.randn(block.spec.out_channels))
    layer: nn.Module = chains
    if block.is_linear and block.form == dense_form(block.spec):
        layer = _linear(chains)
    network = nn.Sequential(layer, _ACTIVATIONS[block.activation]()).eval().requires_grad_(False)
    lower_chains(network, block.lowering)
    return network


def _linear(chains: ChainConv2d) -> nn.Linear:
    """The matrix product that chains of a single factor compute."""
    linear = nn.Linear(chains.in_channels, chains.out_channels)
    linear.weight.copy_(chains.weight)
    linear.bias.copy_(torch.zeros(chains.out_channels) if chains.bias is None else chains.bias)
    return linear
