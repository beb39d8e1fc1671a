"""hybrid: a grouped convolution as towers, one per group, and after them the 1x1 convolution that fuses them.

The form of "The Hybrid Hypothesis" (section 3): ResNeXt's cardinality, as many towers as the convolution has groups
(channels, if it is depthwise), and Inception's 1x1 convolution over what they return, which sees all channels.
"""

from __future__ import annotations

from sepdeploy.schemes.lowerings.group_towers import concatenated, split_factor
from sepdeploy.schemes.lowerings.lowering import Refusal
from sepdeploy.schemes.lowerings.span_rewrite import Span, SpanRewrite, factor_of, is_pointwise_kernel, neighbour
from sepdeploy.schemes.weighted import WeightedChain

__all__ = ["HYBRID"]


def _towers(chain: WeightedChain, index: int) -> Span | Refusal | None:
    factor = factor_of(chain, index)
    fuses = is_pointwise_kernel(factor_of(chain, neighbour(chain, index, 1)))
    if factor is None or factor.groups == 1 or not fuses:
        return None
    split = split_factor(chain[index], factor)
    return split if isinstance(split, Refusal) else (index, index + 1, (concatenated(split),))


HYBRID = SpanRewrite(
    "hybrid",
    "a grouped convolution as concatenated towers, before the 1x1 convolution that fuses them",
    _towers,
    Refusal.NOT_GROUPED_THEN_POINTWISE,
)
