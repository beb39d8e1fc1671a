"""What all lowerings share: they replace neighbouring stages wherever a pattern of them occurs, in towers too."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from sepdeploy.core.chain import Factor, Shuffle
from sepdeploy.errors import ContractError
from sepdeploy.schemes.kernels import compose_chain
from sepdeploy.schemes.lowerings.lowering import Refusal
from sepdeploy.schemes.weighted import (
    WeightedChain,
    WeightedStage,
    WeightedSum,
    chain_of,
    rewrite_towers,
    terms_of,
    towers,
)

__all__ = [
    "Match",
    "Span",
    "SpanRewrite",
    "factor_of",
    "is_pointwise_kernel",
    "kernel_of",
    "neighbour",
    "shuffled_order",
    "summed_bias",
    "weight_of",
]

Span = tuple[int, int, WeightedChain]
"""Stages from the first index up to the second (exclusive), and what takes their place."""

Match = Callable[[WeightedChain, int], Span | Refusal | None]
"""The span to replace that the stage at an index gives rise to; why it is left; None if it is of no interest."""


@dataclass(frozen=True, slots=True)
class SpanRewrite:
    """A lowering that replaces spans of stages, in each chain from left to right, in towers from the inside out.

    Attributes:
        name: Key in the registry.
        summary: What it does, in one line.
        match: Finds the spans.
        nothing: The refusal where no stage is of interest.
    """

    name: str
    summary: str
    match: Match
    nothing: Refusal

    def rewrite(self, terms: WeightedSum) -> WeightedSum | Refusal:
        """The same function in the other form, wherever it applies; why not, if it applies nowhere."""
        refusals: list[Refusal] = []
        replaced = 0

        def rewrite_chain(chain: WeightedChain) -> WeightedChain:
            nonlocal replaced
            index = 0
            while index < len(chain):
                found = self.match(chain, index)
                if isinstance(found, tuple):
                    start, stop, new = found
                    chain = (*chain[:start], *new, *chain[stop:])
                    index = start + len(new)
                    replaced += 1
                    continue
                if found is not None:
                    refusals.append(found)
                index += 1
            return chain

        with torch.no_grad():
            # Several terms are towers too: so a pattern finds a sum wherever it stands.
            root = terms[0] if len(terms) == 1 else (towers(terms, "sum"),)
            rewritten = terms_of(rewrite_towers(root, rewrite_chain))
        return rewritten if replaced else next(iter(refusals), self.nothing)


def factor_of(chain: WeightedChain, index: int | None) -> Factor | None:
    """The factor at an index; None if there is another stage, or none, or no index."""
    stage = None if index is None or index >= len(chain) else chain[index].stage
    return stage if isinstance(stage, Factor) else None


def is_pointwise_kernel(factor: Factor | None) -> bool:
    """Whether it is a 1x1 convolution, of whatever stride and padding."""
    return factor is not None and factor.kernel_size == (1, 1)


def weight_of(item: WeightedStage) -> Tensor:
    """The weight of a stage that has one."""
    if item.weight is None:
        raise ContractError(f"{item.stage} has no weight")
    return item.weight


def summed_bias(items: Iterable[WeightedStage]) -> Tensor | None:
    """Biases of stages whose outputs are added up; None if none has one."""
    biases = [item.bias for item in items if item.bias is not None]
    return reduce(torch.add, biases) if biases else None


def neighbour(chain: WeightedChain, index: int, step: int) -> int | None:
    """Index of the first stage that is no shuffle, after (`step` 1) or before (-1) an index; None at the end."""
    index += step
    while 0 <= index < len(chain):
        if not isinstance(chain[index].stage, Shuffle):
            return index
        index += step
    return None


def kernel_of(chain: WeightedChain) -> Tensor:
    """The dense kernel (O, I, Kh, Kw) of factors and shuffles in a row, in float64."""
    weights = [item.weight.double() for item in chain if item.weight is not None]
    return compose_chain(weights, chain_of(chain))


def shuffled_order(shuffles: WeightedChain, channels: int) -> Tensor:
    """For each channel after the shuffles the one before them that it takes."""
    order = torch.arange(channels)
    for item in shuffles:
        if isinstance(item.stage, Shuffle):
            order = order[list(item.stage.order(channels))]
    return order
