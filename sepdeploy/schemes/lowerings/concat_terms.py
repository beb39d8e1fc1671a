"""terms_as_concat: terms that end in 1x1 convolutions as one 1x1 convolution of their middle channels side by side.

W_1 y_1 + ... + W_T y_T = [W_1 ... W_T] [y_1; ...; y_T]. The terms are then added up in the accumulators of the
convolution: in int8 none of them is rounded on its own, and there are no additions left, which runtimes round
differently.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from sepdeploy.core.chain import Factor, Towers
from sepdeploy.schemes.lowerings.lowering import Refusal
from sepdeploy.schemes.lowerings.span_rewrite import (
    Span,
    SpanRewrite,
    factor_of,
    is_pointwise_kernel,
    summed_bias,
    weight_of,
)
from sepdeploy.schemes.weighted import WeightedChain, factor_stage, towers

__all__ = ["TERMS_AS_CONCAT"]


def _concatenate(chain: WeightedChain, index: int) -> Span | Refusal | None:
    stage = chain[index].stage
    if not isinstance(stage, Towers) or stage.join != "sum" or len(stage.branches) == 1:
        return None
    branches = chain[index].branches
    last = [factor_of(branch, len(branch) - 1) for branch in branches]
    pointwise = [factor for factor in last if factor is not None and is_pointwise_kernel(factor) and factor.groups == 1]
    if len(pointwise) < len(branches) or any(len(branch) == 1 for branch in branches):
        return Refusal.TERMS_END_OTHERWISE
    if len({_geometry(factor) for factor in pointwise}) > 1:
        return Refusal.TERMS_END_OTHERWISE
    merged = replace(pointwise[0], in_channels=sum(factor.in_channels for factor in pointwise))
    weight = torch.cat([weight_of(branch[-1]) for branch in branches], dim=1)
    bias = summed_bias(branch[-1] for branch in branches)
    middle = towers(tuple(branch[:-1] for branch in branches), "concat")
    return index, index + 1, (middle, factor_stage(merged, weight, bias))


def _geometry(factor: Factor) -> Factor:
    """What the last convolutions of all terms must have in common."""
    return replace(factor, in_channels=1, has_bias=False)


TERMS_AS_CONCAT = SpanRewrite(
    "terms_as_concat",
    "terms that end in a 1x1 convolution as one 1x1 convolution of their middle channels, concatenated",
    _concatenate,
    Refusal.NO_TERMS,
)
