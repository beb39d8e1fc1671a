"""shuffle_gather and shuffle_channels_last: the two ways to write a channel shuffle down as operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from sepdeploy.core.chain import Shuffle
from sepdeploy.schemes.lowerings.lowering import Refusal
from sepdeploy.schemes.lowerings.span_rewrite import Span, SpanRewrite
from sepdeploy.schemes.weighted import WeightedChain, WeightedStage, chain_of

__all__ = ["SHUFFLE_CHANNELS_LAST", "SHUFFLE_GATHER"]


def _formulate(
    formulation: Literal["gather", "channels_last"],
) -> Callable[[WeightedChain, int], Span | Refusal | None]:
    def match(chain: WeightedChain, index: int) -> Span | Refusal | None:
        stage = chain[index].stage
        if not isinstance(stage, Shuffle):
            return None
        if stage.formulation == formulation:
            return Refusal.SHUFFLE_IS_SO
        channels = chain_of(chain[:index]).out_channels if index else chain_of(chain).in_channels
        if formulation == "channels_last" and channels % stage.groups:
            return Refusal.UNEVEN_SHUFFLE
        return index, index + 1, (WeightedStage(replace(stage, formulation=formulation)),)

    return match


SHUFFLE_GATHER = SpanRewrite(
    "shuffle_gather", "a channel shuffle as one gather of channels", _formulate("gather"), Refusal.NO_SHUFFLE
)
SHUFFLE_CHANNELS_LAST = SpanRewrite(
    "shuffle_channels_last",
    "a channel shuffle as reshape, transpose, reshape of the innermost dimension",
    _formulate("channels_last"),
    Refusal.NO_SHUFFLE,
)
