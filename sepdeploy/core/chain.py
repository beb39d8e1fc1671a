"""Chains of grouped convolutions: the one algebra behind every separable convolution.

A `Factor` is a grouped convolution, a `Chain` is a sequence of factors with channel shuffles between them, and a
`ChainSum` is several chains in parallel whose outputs are added (the terms of a network decoupling). All are data
without weights: shapes and cost are functions of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from sepdeploy.errors import UsageError

__all__ = ["Chain", "ChainSum", "Factor", "Padding", "Shuffle", "Size"]

Size = tuple[int, int]
"""Height, width."""

Padding = tuple[int, int, int, int]
"""Zeros added at the top, bottom, left and right, in pixels."""


@dataclass(frozen=True, slots=True)
class Factor:
    """One grouped 2-D convolution with zero padding and no bias.

    Attributes:
        in_channels: Input channels, a multiple of `groups`.
        out_channels: Output channels, a multiple of `groups`.
        kernel_size: (Kh, Kw).
        stride: (Sh, Sw).
        padding: Zeros at (top, bottom, left, right).
        dilation: (Dh, Dw).
        groups: Independent groups of channels.

    Raises:
        UsageError: if a value is not positive (padding: negative) or `groups` does not divide the channels.
    """

    in_channels: int
    out_channels: int
    kernel_size: Size
    stride: Size = (1, 1)
    padding: Padding = (0, 0, 0, 0)
    dilation: Size = (1, 1)
    groups: int = 1
    kind: Literal["factor"] = "factor"

    def __post_init__(self) -> None:
        positive = (self.in_channels, self.out_channels, self.groups, *self.kernel_size, *self.stride, *self.dilation)
        if min(positive) < 1 or min(self.padding) < 0:
            raise UsageError(f"every size of a convolution must be positive (padding: at least 0), got {self}")
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise UsageError(
                f"{self.groups} groups do not divide {self.in_channels} input and {self.out_channels} output channels"
            )

    @property
    def params(self) -> int:
        """Weights, without bias."""
        return self.out_channels * (self.in_channels // self.groups) * self.kernel_size[0] * self.kernel_size[1]

    def output_size(self, input_size: Size) -> Size:
        """Spatial size of the output for an input of `input_size`, both (H, W) in pixels."""
        top, bottom, left, right = self.padding
        padded = (input_size[0] + top + bottom, input_size[1] + left + right)
        height, width = (
            (padded[i] - self.dilation[i] * (self.kernel_size[i] - 1) - 1) // self.stride[i] + 1 for i in (0, 1)
        )
        return height, width

    def macs(self, input_size: Size) -> int:
        """Multiply-accumulates for one image of `input_size` (H, W)."""
        height, width = self.output_size(input_size)
        return self.params * height * width


@dataclass(frozen=True, slots=True)
class Shuffle:
    """A channel shuffle: channels viewed as (groups, C / groups) and transposed (Zhang et al., ShuffleNet, 2018)."""

    groups: int
    kind: Literal["shuffle"] = "shuffle"


@dataclass(frozen=True, slots=True)
class Chain:
    """Grouped convolutions applied one after the other, with channel shuffles between them.

    Attributes:
        stages: At least one `Factor`; the output channels of each factor are the input channels of the next.

    Raises:
        UsageError: if there is no factor or the channels of two neighbours differ.
    """

    stages: tuple[Factor | Shuffle, ...]

    def __post_init__(self) -> None:
        factors = self.factors
        if not factors:
            raise UsageError("a chain needs at least one convolution")
        for before, after in pairwise(factors):
            if before.out_channels != after.in_channels:
                raise UsageError(
                    f"a factor with {before.out_channels} outputs cannot feed one with {after.in_channels} inputs"
                )

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The convolutions in order, without the shuffles."""
        return tuple(stage for stage in self.stages if isinstance(stage, Factor))

    @property
    def params(self) -> int:
        """Weights of all factors, without bias."""
        return sum(factor.params for factor in self.factors)

    def output_size(self, input_size: Size) -> Size:
        """Spatial size of the output for an input of `input_size`, both (H, W) in pixels."""
        for factor in self.factors:
            input_size = factor.output_size(input_size)
        return input_size

    def macs(self, input_size: Size) -> int:
        """Multiply-accumulates for one image of `input_size` (H, W)."""
        total = 0
        for factor in self.factors:
            total += factor.macs(input_size)
            input_size = factor.output_size(input_size)
        return total


@dataclass(frozen=True, slots=True)
class ChainSum:
    """Chains in parallel on the same input, their outputs added.

    Attributes:
        terms: At least one chain; all have the same input and output channels.

    Raises:
        UsageError: if there is no term or two terms differ in channels.
    """

    terms: tuple[Chain, ...]

    def __post_init__(self) -> None:
        ends = {(term.factors[0].in_channels, term.factors[-1].out_channels) for term in self.terms}
        if len(ends) != 1:
            raise UsageError(f"the terms of a sum must agree in their input and output channels, got {sorted(ends)}")

    @property
    def in_channels(self) -> int:
        """Input channels."""
        return self.terms[0].factors[0].in_channels

    @property
    def out_channels(self) -> int:
        """Output channels."""
        return self.terms[0].factors[-1].out_channels

    @property
    def params(self) -> int:
        """Weights of all terms, without bias."""
        return sum(term.params for term in self.terms)

    def output_size(self, input_size: Size) -> Size:
        """Spatial size of the output for an input of `input_size`, both (H, W) in pixels."""
        return self.terms[0].output_size(input_size)

    def macs(self, input_size: Size) -> int:
        """Multiply-accumulates for one image of `input_size` (H, W)."""
        return sum(term.macs(input_size) for term in self.terms)
