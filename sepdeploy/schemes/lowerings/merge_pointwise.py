"""merge_pointwise: 1x1 convolutions in a row, with or without shuffles between them, as one dense 1x1 convolution."""

from __future__ import annotations

from dataclasses import replace

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
from sepdeploy.schemes.weighted import WeightedChain, factor_stage

__all__ = ["MERGE_POINTWISE"]


def _merge(chain: WeightedChain, index: int) -> Span | Refusal | None:
    """B P (A x + a) + b = (B P A) x + (B P a + b), P the shuffles; strides multiply, and A's padding stays."""
    before = neighbour(chain, index, -1)
    first, second = factor_of(chain, before), factor_of(chain, index)
    if before is None or first is None or second is None:
        return None
    if not is_pointwise_kernel(first) or not is_pointwise_kernel(second):
        return None
    if any(second.padding):
        return Refusal.PADDED_NEIGHBOUR
    a, b = chain[before].bias, chain[index].bias
    if a is not None:
        shift = kernel_of(chain[before + 1 : index + 1])[:, :, 0, 0] @ a.double()
        b = (shift if b is None else b.double() + shift).to(a.dtype)
    weight = kernel_of(chain[before : index + 1]).to(weight_of(chain[index]).dtype)
    merged = replace(
        first,
        out_channels=second.out_channels,
        stride=(first.stride[0] * second.stride[0], first.stride[1] * second.stride[1]),
        groups=1,
        pads_groups=False,
    )
    return before, index + 1, (factor_stage(merged, weight, b),)


MERGE_POINTWISE = SpanRewrite(
    "merge_pointwise",
    "1x1 convolutions in a row, shuffles between them included, as one",
    _merge,
    Refusal.NO_NEIGHBOURS,
)
