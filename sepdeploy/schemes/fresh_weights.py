"""Random weights for a chain that is trained from scratch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sepdeploy.core.chain import Activation, Chain, Factor
from sepdeploy.schemes.module import ChainConv2d

__all__ = ["draw_weights"]

_ACTIVATION_GAIN = 2.0
"""An activation lets about half the power of its input through (He et al., 2015)."""


@torch.no_grad()
def draw_weights(module: ChainConv2d, variance: float, bias: Tensor | None = None) -> None:
    """Draw uniform weights so that the chain as a whole has a given output variance.

    Every convolution but the last of a chain keeps the variance of its input, whatever its groups; the last one scales
    it. Independent terms share the variance evenly. nn.Conv2d's own initialization of a dense kernel has the variance
    1/3; Kaiming's has 2.

    Args:
        module: The chains.
        variance: Of each output, for uncorrelated inputs of variance 1 and away from the border.
        bias: The bias (O,); None is zeros where the module has one.
    """
    form = module.form
    module.set_weights(tuple(_drawn(term, variance / len(form.terms)) for term in form.terms), bias)


def _drawn(chain: Chain, variance: float) -> tuple[Tensor, ...]:
    last = max(place for place, stage in enumerate(chain.stages) if isinstance(stage, Factor))
    weights, gain = [], 1.0
    for place, stage in enumerate(chain.stages):
        if isinstance(stage, Activation):
            gain *= _ACTIVATION_GAIN
        elif isinstance(stage, Factor):
            weights.append(_uniform(stage, gain * (variance if place == last else 1.0)))
            gain = 1.0
    return tuple(weights)


def _uniform(factor: Factor, variance: float) -> Tensor:
    """A kernel (O, in_per_group, Kh, Kw) whose outputs have `variance`; places beyond a smaller group are zero."""
    taps = math.prod(factor.kernel_size)
    sizes = torch.tensor(factor.in_groups, device="cpu").repeat_interleave(
        torch.tensor(factor.out_groups, device="cpu")
    )[:, None, None, None]
    # A uniform distribution on [-b, b] has the variance b^2 / 3. Groups may have no input at all if they are padded.
    bound = torch.sqrt(3 * variance / (sizes.clamp_min(1) * taps))
    column = torch.arange(factor.in_per_group, device="cpu")[None, :, None, None]
    return torch.empty(factor.weight_shape, device="cpu").uniform_(-1, 1) * bound * (column < sizes)
