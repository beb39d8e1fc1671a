"""terms_as_multiplier and terms_as_branches: T depthwise-separable terms as one pair with multiplier T, and back.

The sum of T pairs depthwise, pointwise (network decoupling, Guo et al., 2018) is one depthwise convolution that returns
T channels for each of C, followed by one pointwise convolution that reads all T * C.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

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
from sepdeploy.schemes.weighted import WeightedChain, WeightedStage, factor_stage, towers

__all__ = ["TERMS_AS_BRANCHES", "TERMS_AS_MULTIPLIER"]


def _multiply(chain: WeightedChain, index: int) -> Span | Refusal | None:
    stage = chain[index].stage
    if not isinstance(stage, Towers) or stage.join != "sum" or len(stage.branches) == 1:
        return None
    branches = chain[index].branches
    depthwise, pointwise = factor_of(branches[0], 0), factor_of(branches[0], 1)
    channels, terms = stage.in_channels, len(branches)
    if depthwise is None or pointwise is None or len(branches[0]) != 2 or len(set(map(_geometry, branches))) != 1:
        return Refusal.TERMS_DIFFER
    if depthwise.groups != channels or depthwise.out_channels != channels or not is_pointwise_kernel(pointwise):
        return Refusal.TERMS_DIFFER
    merged = _with_inputs(pointwise, terms * channels, terms)
    if merged is None:
        return Refusal.TERMS_DO_NOT_GROUP
    # Output c * T + t of a grouped convolution is the t-th of group c.
    first = factor_stage(
        replace(depthwise, out_channels=terms * channels),
        torch.stack([weight_of(branch[0]) for branch in branches], 1).flatten(0, 1),
        _stacked([branch[0] for branch in branches]),
    )
    weight = torch.stack([weight_of(branch[1]) for branch in branches], 2).flatten(1, 2)
    bias = summed_bias(branch[1] for branch in branches)
    return index, index + 1, (first, factor_stage(merged, weight, bias))


def _branch(chain: WeightedChain, index: int) -> Span | Refusal | None:
    depthwise, pointwise = factor_of(chain, index), factor_of(chain, index + 1)
    if depthwise is None or pointwise is None or not is_pointwise_kernel(pointwise):
        return None
    channels = depthwise.in_channels
    terms = depthwise.out_channels // channels
    if depthwise.groups != channels or depthwise.out_channels != terms * channels or terms == 1:
        return None
    single = _with_inputs(pointwise, channels, terms, has_fewer=True)
    if single is None:
        return Refusal.TERMS_DO_NOT_GROUP
    weight, bias = weight_of(chain[index]), chain[index].bias
    # Output c * T + t is the t-th of channel c; the 1x1 convolution's columns run alike.
    narrow = replace(depthwise, out_channels=channels)
    branches = tuple(
        (
            factor_stage(narrow, weight[term::terms], None if bias is None else bias[term::terms]),
            factor_stage(
                single, weight_of(chain[index + 1])[:, term::terms], chain[index + 1].bias if term == 0 else None
            ),
        )
        for term in range(terms)
    )
    return index, index + 2, (towers(branches, "sum"),)


def _with_inputs(pointwise: Factor, channels: int, terms: int, *, has_fewer: bool = False) -> Factor | None:
    """The 1x1 factor for `channels` inputs; None if its groups are then not T times (or a T-th of) what they are."""
    other = replace(pointwise, in_channels=channels)
    few, many = (other, pointwise) if has_fewer else (pointwise, other)
    return other if tuple(terms * size for size in few.in_groups) == many.in_groups else None


def _geometry(branch: WeightedChain) -> tuple[object, ...]:
    """What all terms must have in common: everything but weights and biases."""
    return tuple(
        replace(item.stage, has_bias=False) if isinstance(item.stage, Factor) else item.stage for item in branch
    )


def _stacked(items: list[WeightedStage]) -> Tensor | None:
    """Biases (C,) of each term as those (C * T,) of the multiplied channels; None if no term has one."""
    if all(item.bias is None for item in items):
        return None
    biases = [weight_of(item).new_zeros(len(weight_of(item))) if item.bias is None else item.bias for item in items]
    return torch.stack(biases, 1).flatten()


TERMS_AS_MULTIPLIER = SpanRewrite(
    "terms_as_multiplier",
    "T depthwise-separable terms as one pair whose depthwise convolution returns T channels for each",
    _multiply,
    Refusal.NO_TERMS,
)
TERMS_AS_BRANCHES = SpanRewrite(
    "terms_as_branches", "a depthwise channel multiplier T as T pairs that are added up", _branch, Refusal.NO_MULTIPLIER
)
