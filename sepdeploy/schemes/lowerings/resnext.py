"""resnext: a grouped convolution and the 1x1 convolution after it as a sum of towers, one per group.

Split, transform, aggregate: each tower takes some channels, transforms them and expands to all outputs, and the towers
are added up (Xie et al., 2017, equation 2). The cardinality is the number of groups; for a depthwise convolution that
is the number of channels ("The Hybrid Hypothesis", section 3). The 1x1's columns are dealt out to the towers.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from sepdeploy.schemes.lowerings.group_towers import split_factor
from sepdeploy.schemes.lowerings.lowering import Refusal
from sepdeploy.schemes.lowerings.span_rewrite import (
    Span,
    SpanRewrite,
    factor_of,
    is_pointwise_kernel,
    kernel_of,
    neighbour,
    weight_of,
)
from sepdeploy.schemes.weighted import WeightedChain, WeightedStage, factor_stage, towers

__all__ = ["RESNEXT"]


def _sum_towers(chain: WeightedChain, index: int) -> Span | Refusal | None:
    after = neighbour(chain, index, 1)
    transform, expand = factor_of(chain, index), factor_of(chain, after)
    if after is None or transform is None or transform.groups == 1 or expand is None or not is_pointwise_kernel(expand):
        return None
    split = split_factor(chain[index], transform)
    if isinstance(split, Refusal):
        return split
    kernel = kernel_of(chain[index + 1 : after + 1]).to(weight_of(chain[after]).dtype)
    columns = torch.split(kernel, [len(weight_of(conv)) for _, conv in split], 1)
    branches = []
    for number, ((channels, conv), part) in enumerate(zip(split, columns, strict=True)):
        narrow = replace(expand, in_channels=part.shape[1], groups=1, pads_groups=False)
        expanded = factor_stage(narrow, part, chain[after].bias if number == 0 else None)
        branches.append((WeightedStage(channels), conv, expanded))
    return index, after + 1, (towers(tuple(branches), "sum"),)


RESNEXT = SpanRewrite(
    "resnext",
    "a grouped convolution and the 1x1 after it as a sum of towers: slice, transform, expand",
    _sum_towers,
    Refusal.NOT_GROUPED_THEN_POINTWISE,
)
