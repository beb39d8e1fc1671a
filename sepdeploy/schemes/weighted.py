"""Stages with their weights: what lowerings rewrite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from sepdeploy.core.chain import Chain, ChainSum, Factor, Stage, Towers

__all__ = [
    "WeightedChain",
    "WeightedStage",
    "WeightedSum",
    "chain_of",
    "factor_stage",
    "form_of",
    "rewrite_towers",
    "terms_of",
    "towers",
]


@dataclass(frozen=True, slots=True, eq=False)
class WeightedStage:
    """One stage of a chain and its weights.

    Attributes:
        stage: The stage.
        weight: Kernel (O, in_per_group, Kh, Kw) of a factor, scale (C,) of a norm, else None.
        bias: Bias (O,) of a factor that has one, shift (C,) of a norm, else None.
        branches: The chains of towers, in order.
    """

    stage: Stage
    weight: Tensor | None = None
    bias: Tensor | None = None
    branches: tuple[WeightedChain, ...] = ()


WeightedChain = tuple[WeightedStage, ...]
WeightedSum = tuple[WeightedChain, ...]
"""The terms of a sum."""


def form_of(terms: WeightedSum) -> ChainSum:
    """The form without the weights."""
    return ChainSum(tuple(chain_of(term) for term in terms))


def chain_of(chain: WeightedChain) -> Chain:
    """The chain without the weights."""
    return Chain(tuple(item.stage for item in chain))


def factor_stage(factor: Factor, weight: Tensor, bias: Tensor | None) -> WeightedStage:
    """A factor with its weights; it has a bias if one is given, whatever `factor` says."""
    return WeightedStage(replace(factor, has_bias=bias is not None), weight, bias)


def towers(branches: tuple[WeightedChain, ...], join: Literal["concat", "sum"]) -> WeightedStage:
    """Towers of weighted chains."""
    return WeightedStage(Towers(tuple(chain_of(branch) for branch in branches), join), branches=branches)


def terms_of(chain: WeightedChain) -> WeightedSum:
    """A chain as the terms of a sum: the branches of towers that are added up, where it is nothing else."""
    stage = chain[0].stage
    is_sum = len(chain) == 1 and isinstance(stage, Towers) and stage.join == "sum"
    return chain[0].branches if is_sum else (chain,)


def rewrite_towers(chain: WeightedChain, rewrite: Callable[[WeightedChain], WeightedChain]) -> WeightedChain:
    """Apply `rewrite` to the chain and, from the inside out, to every branch of its towers."""
    inner = []
    for item in chain:
        if isinstance(item.stage, Towers):
            branches = tuple(rewrite_towers(branch, rewrite) for branch in item.branches)
            item = towers(branches, item.stage.join)
        inner.append(item)
    return rewrite(tuple(inner))
