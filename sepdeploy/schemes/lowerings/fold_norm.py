"""fold_norm: a batch norm between two stages folded into the convolution before it, else into the one after it."""

from __future__ import annotations

import torch
from torch import Tensor

from sepdeploy.core.chain import Factor, Norm
from sepdeploy.errors import ContractError
from sepdeploy.schemes.kernels import input_channels
from sepdeploy.schemes.lowerings.lowering import Refusal
from sepdeploy.schemes.lowerings.span_rewrite import (
    Span,
    SpanRewrite,
    factor_of,
    neighbour,
    shuffled_order,
    weight_of,
)
from sepdeploy.schemes.weighted import WeightedChain, WeightedStage, factor_stage

__all__ = ["FOLD_NORM"]


def _fold(chain: WeightedChain, index: int) -> Span | Refusal | None:
    norm = chain[index]
    if not isinstance(norm.stage, Norm):
        return None
    scale, shift = weight_of(norm).double(), norm.bias
    if shift is None:
        raise ContractError("a batch norm has a shift")
    before, after = neighbour(chain, index, -1), neighbour(chain, index, 1)
    factor = factor_of(chain, before)
    if before is not None and factor is not None:
        shuffles = chain[before + 1 : index]
        back = shuffled_order(shuffles, len(scale)).argsort()
        return before, index + 1, (_scaled_outputs(chain[before], factor, scale[back], shift[back]), *shuffles)
    factor = factor_of(chain, after)
    if after is None or factor is None:
        return Refusal.NORM_STANDS_ALONE
    if any(factor.padding) and bool(shift.any()):
        return Refusal.NORM_BEFORE_PADDING
    shuffles = chain[index + 1 : after]
    order = shuffled_order(shuffles, len(scale))
    return index, after + 1, (*shuffles, _scaled_inputs(chain[after], factor, scale[order], shift[order]))


def _scaled_outputs(item: WeightedStage, factor: Factor, scale: Tensor, shift: Tensor) -> WeightedStage:
    """The norm after the convolution: s (W x + a) + b = (s W) x + (s a + b)."""
    weight = weight_of(item)
    bias = shift.double() if item.bias is None else item.bias.double() * scale + shift
    scaled = weight.double() * scale[:, None, None, None]
    return factor_stage(factor, scaled.to(weight.dtype), bias.to(weight.dtype))


def _scaled_inputs(item: WeightedStage, factor: Factor, scale: Tensor, shift: Tensor) -> WeightedStage:
    """The norm before the convolution: W (s x + b) + a = (W s) x + (W b + a).

    W b is summed over all taps: where nothing is padded, each of them sees the shift.
    """
    weight = weight_of(item)
    per_column = [torch.cat([values, values.new_zeros(1)])[input_channels(factor)] for values in (scale, shift)]
    scaled, shifted = (weight.double() * values[:, :, None, None] for values in per_column)
    bias = shifted.sum((1, 2, 3))
    if item.bias is not None:
        bias = bias + item.bias.double()
    return factor_stage(factor, scaled.to(weight.dtype), bias.to(weight.dtype))


FOLD_NORM = SpanRewrite(
    "fold_norm", "a batch norm between two stages folded into the convolution beside it", _fold, Refusal.NO_NORM
)
