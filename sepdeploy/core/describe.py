"""Separable forms in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from sepdeploy.core.chain import Activation, Chain, ChainSum, Factor, Norm, Shuffle, Slice, Stage
from sepdeploy.core.receptive_field import receptive_field

__all__ = ["describe_field", "describe_form"]


def describe_form(form: ChainSum) -> str:
    """The stages of a separable form in order, convolutions with their output channels.

    >>> pair = Chain((Factor(16, 16, (3, 3), groups=16), Factor(16, 32, (1, 1))))
    >>> describe_form(ChainSum((pair, pair)))
    '2 x (3x3 dw 16, 1x1 32)'
    """
    return _joined(form.terms, " + ")


def describe_field(form: ChainSum | Chain | Factor, reference: Factor) -> str:
    """Which channels and pixels every output of `form` sees, against a convolution in whose place it stands.

    >>> describe_field(Factor(8, 8, (3, 3), groups=4), Factor(8, 8, (3, 3)))
    'sees 2 of 8 channels: the receptive field is broken'
    """
    mine, theirs = receptive_field(form), receptive_field(reference)
    fewest, wanted = min(mine.channels), max(theirs.channels)
    height, width = theirs.window
    if mine.covers(theirs):
        return f"sees all {wanted} channels in a {height}x{width} window"
    if fewest < wanted:
        return f"sees {fewest} of {wanted} channels: the receptive field is broken"
    return f"misses pixels of the {height}x{width} window: the receptive field is broken"


def _joined(chains: Iterable[Chain], separator: str) -> str:
    """Each chain in words; equal ones are counted."""
    counts = Counter(", ".join(map(_describe_stage, chain.stages)) for chain in chains)
    if counts.total() == 1:
        return next(iter(counts))
    return separator.join(f"({text})" if count == 1 else f"{count} x ({text})" for text, count in counts.items())


def _describe_stage(stage: Stage) -> str:
    if isinstance(stage, Factor):
        return _describe_factor(stage)
    if isinstance(stage, Shuffle):
        return f"shuffle {stage.groups}"
    if isinstance(stage, Norm):
        return "norm"
    if isinstance(stage, Activation):
        return stage.function
    if isinstance(stage, Slice):
        return f"slice {stage.out_channels}"
    return f"{stage.join}[{_joined(stage.branches, ' | ' if stage.join == 'concat' else ' + ')}]"


def _describe_factor(factor: Factor) -> str:
    is_depthwise = factor.groups == factor.in_channels and factor.groups > 1
    groups = " dw" if is_depthwise else f" g{factor.groups}" if factor.groups > 1 else ""
    uneven = "" if factor.is_even else " padded" if factor.pads_groups else " uneven"
    return f"{factor.kernel_size[0]}x{factor.kernel_size[1]}{groups}{uneven} {factor.out_channels}"
