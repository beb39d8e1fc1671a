"""split_groups and merge_towers: a grouped convolution as towers side by side, and back.

Each group is a convolution of its own channels, and the outputs of all groups are concatenated: AlexNet's two towers,
and the equivalent building block of ResNeXt (Xie et al., 2017, figure 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own convention)

from sepdeploy.core.chain import Factor, Slice, Towers
from sepdeploy.schemes.lowerings.lowering import Refusal
from sepdeploy.schemes.lowerings.span_rewrite import Span, SpanRewrite, factor_of, weight_of
from sepdeploy.schemes.weighted import WeightedChain, WeightedStage, factor_stage, towers

__all__ = ["MERGE_TOWERS", "SPLIT_GROUPS", "Tower", "concatenated", "split_factor"]

Tower = tuple[Slice, WeightedStage]
"""A slice of the input channels, then the convolution of one group."""


def split_factor(item: WeightedStage, factor: Factor) -> tuple[Tower, ...] | Refusal:
    """A tower for each group of a factor, in order; groups without outputs are left out."""
    result: list[Tower] = []
    start = row = 0
    for ins, outs in zip(factor.in_groups, factor.out_groups, strict=True):
        if outs and not ins:
            return Refusal.EMPTY_GROUP
        if outs:
            dense = replace(factor, in_channels=ins, out_channels=outs, groups=1, pads_groups=False)
            bias = None if item.bias is None else item.bias[row : row + outs]
            conv = factor_stage(dense, weight_of(item)[row : row + outs, :ins], bias)
            result.append((Slice(factor.in_channels, start, start + ins), conv))
        start, row = start + ins, row + outs
    return tuple(result)


def concatenated(split: tuple[Tower, ...]) -> WeightedStage:
    """Towers side by side."""
    return towers(tuple((WeightedStage(channels), conv) for channels, conv in split), "concat")


def _split(chain: WeightedChain, index: int) -> Span | Refusal | None:
    factor = factor_of(chain, index)
    if factor is None or factor.groups == 1:
        return None
    split = split_factor(chain[index], factor)
    return split if isinstance(split, Refusal) else (index, index + 1, (concatenated(split),))


def _merge(chain: WeightedChain, index: int) -> Span | Refusal | None:
    stage = chain[index].stage
    if not isinstance(stage, Towers) or stage.join != "concat":
        return None
    pairs = list(_neighbours(chain[index]))
    factors, convs = [factor for factor, _ in pairs], [conv for _, conv in pairs]
    if len(pairs) != len(stage.branches) or sum(factor.in_channels for factor in factors) != stage.in_channels:
        return Refusal.TOWERS_DIFFER
    if len({_geometry(factor) for factor in factors}) != 1:
        return Refusal.TOWERS_DIFFER
    merged = _grouped(factors, stage)
    if merged is None:
        return Refusal.UNEVEN_TOWERS
    weights = [F.pad(w, (0, 0, 0, 0, 0, merged.in_per_group - w.shape[1])) for w in map(weight_of, convs)]
    has_bias = any(conv.bias is not None for conv in convs)
    biases = [w.new_zeros(len(w)) if c.bias is None else c.bias for c, w in zip(convs, weights, strict=True)]
    conv = factor_stage(merged, torch.cat(weights), torch.cat(biases) if has_bias else None)
    return index, index + 1, (conv,)


def _neighbours(item: WeightedStage) -> Iterator[tuple[Factor, WeightedStage]]:
    """The convolution of each tower, up to the first that is more than one of the channels next in order."""
    start = 0
    for branch in item.branches:
        channels, factor = branch[0].stage, factor_of(branch, len(branch) - 1)
        if len(branch) != 2 or not isinstance(channels, Slice) or factor is None:
            return
        if channels.start != start or factor.groups > 1:
            return
        start = channels.stop
        yield factor, branch[1]


def _grouped(factors: list[Factor], stage: Towers) -> Factor | None:
    """The factor whose groups are the `factors` in order; None if there is none."""
    ins, outs = tuple(factor.in_channels for factor in factors), tuple(factor.out_channels for factor in factors)
    for pads_groups in (False, True):
        merged = replace(
            factors[0],
            in_channels=stage.in_channels,
            out_channels=stage.out_channels,
            groups=len(factors),
            pads_groups=pads_groups,
        )
        if (merged.in_groups, merged.out_groups) == (ins, outs):
            return merged
    return None


def _geometry(factor: Factor) -> Factor:
    """A factor that two dense convolutions share if they differ in nothing but channels and bias."""
    return replace(factor, in_channels=1, out_channels=1, has_bias=False, pads_groups=False)


SPLIT_GROUPS = SpanRewrite(
    "split_groups", "a grouped convolution as towers, one per group, concatenated", _split, Refusal.NOT_GROUPED
)
MERGE_TOWERS = SpanRewrite(
    "merge_towers", "towers on neighbouring channels as one grouped convolution", _merge, Refusal.NO_TOWERS
)
