"""The stages that chains are made of: grouped convolutions, channel shuffles, and what lowerings put beside them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from sepdeploy.errors import UsageError

__all__ = [
    "Activation",
    "ActivationName",
    "Factor",
    "Norm",
    "Padding",
    "Run",
    "Shuffle",
    "Size",
    "Slice",
    "group_sizes",
]

Size = tuple[int, int]
"""Height, width."""

Padding = tuple[int, int, int, int]
"""Zeros added at the top, bottom, left and right, in pixels."""


ActivationName = Literal["relu", "relu6", "silu", "hardswish"]
"""Activations that may stand between the convolutions of a chain."""


def group_sizes(channels: int, groups: int, *, is_padded: bool = False) -> tuple[int, ...]:
    """How many channels each of `groups` neighbouring groups has.

    Sizes differ by one at most, larger groups first. With `is_padded` all groups but the last ones have
    ceil(channels / groups), as if zero channels filled them up.

    >>> group_sizes(10, 4), group_sizes(10, 4, is_padded=True)
    ((3, 3, 2, 2), (3, 3, 3, 1))
    """
    if is_padded:
        size = -(-channels // groups)
        return tuple(max(0, min(size, channels - size * index)) for index in range(groups))
    small, larger = divmod(channels, groups)
    return (small + 1,) * larger + (small,) * (groups - larger)


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring groups of equal size: one ordinary grouped convolution."""

    groups: int
    in_per_group: int
    out_per_group: int


@dataclass(frozen=True, slots=True)
class Factor:
    """One grouped 2-D convolution with zero padding.

    The groups need not divide the channels: then some have one channel more than others, and every weight is used.

    Attributes:
        in_channels: Input channels.
        out_channels: Output channels.
        kernel_size: (Kh, Kw).
        stride: (Sh, Sw).
        padding: Zeros at (top, bottom, left, right).
        dilation: (Dh, Dw).
        groups: Independent groups of channels.
        has_bias: Whether a bias is added.
        pads_groups: Whether groups that do not divide the channels are filled up with zero channels to equal size, as
            the authors of optimized separable convolution do it; `params` and `macs` count the filling. The last groups
            may then have fewer channels than others by more than one, or none.

    Raises:
        UsageError: if a value is not positive (padding: negative) or there are more groups than channels.
    """

    in_channels: int
    out_channels: int
    kernel_size: Size
    stride: Size = (1, 1)
    padding: Padding = (0, 0, 0, 0)
    dilation: Size = (1, 1)
    groups: int = 1
    has_bias: bool = False
    pads_groups: bool = False
    kind: Literal["factor"] = "factor"

    def __post_init__(self) -> None:
        positive = (self.in_channels, self.out_channels, self.groups, *self.kernel_size, *self.stride, *self.dilation)
        if min(positive) < 1 or min(self.padding) < 0:
            raise UsageError(f"every size of a convolution must be positive (padding: at least 0), got {self}")
        if self.groups > min(self.in_channels, self.out_channels):
            raise UsageError(
                f"{self.groups} groups are more than {self.in_channels} input or {self.out_channels} output channels"
            )

    @property
    def in_groups(self) -> tuple[int, ...]:
        """Input channels of each group."""
        return group_sizes(self.in_channels, self.groups, is_padded=self.pads_groups)

    @property
    def out_groups(self) -> tuple[int, ...]:
        """Output channels of each group."""
        return group_sizes(self.out_channels, self.groups, is_padded=self.pads_groups)

    @property
    def is_even(self) -> bool:
        """Whether the groups divide the channels, as PyTorch's nn.Conv2d wants it."""
        return self.in_channels % self.groups == 0 and self.out_channels % self.groups == 0

    @property
    def is_pointwise(self) -> bool:
        """Whether it is a 1x1 convolution without stride and padding: a matrix product at each position."""
        return self.kernel_size == (1, 1) and self.stride == (1, 1) and not any(self.padding)

    @property
    def in_per_group(self) -> int:
        """Input channels of the largest group: the second dimension of the weight."""
        return -(-self.in_channels // self.groups)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """(O, in_per_group, Kh, Kw); rows of smaller groups end in zeros that are neither stored nor counted."""
        return (self.out_channels, self.in_per_group, *self.kernel_size)

    @property
    def runs(self) -> tuple[Run, ...]:
        """The groups as ordinary grouped convolutions side by side; at most three."""
        if self.is_even or self.pads_groups:
            return (Run(self.groups, self.in_per_group, -(-self.out_channels // self.groups)),)
        sizes = groupby(zip(self.in_groups, self.out_groups, strict=True))
        return tuple(Run(len(list(equal)), *size) for size, equal in sizes)

    @property
    def params(self) -> int:
        """Weights, and biases if it has them."""
        biases = sum(run.groups * run.out_per_group for run in self.runs) if self.has_bias else 0
        return self.weights + biases

    @property
    def weights(self) -> int:
        """Weights without biases: multiply-accumulates for each pixel of the output."""
        taps = self.kernel_size[0] * self.kernel_size[1]
        return sum(run.groups * run.in_per_group * run.out_per_group for run in self.runs) * taps

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
        return self.weights * height * width


@dataclass(frozen=True, slots=True)
class Shuffle:
    """A channel shuffle: channels viewed as rows, one per group, and read column by column (ShuffleNet, 2018).

    Rows may differ in length by one, as groups that do not divide the channels; position p of the result then still
    comes from group p mod `groups`, so that any `groups` neighbours come from all groups.

    Attributes:
        groups: Groups of the convolution before it.
        formulation: How it is written down for a runtime: 'gather' (index_select) or 'channels_last' (reshape and
            transpose of the innermost dimension; only where `groups` divides the channels, else a gather).
    """

    groups: int
    formulation: Literal["gather", "channels_last"] = "gather"
    kind: Literal["shuffle"] = "shuffle"

    def order(self, channels: int) -> tuple[int, ...]:
        """For each output position the input channel that it takes.

        >>> Shuffle(2).order(5)
        (0, 3, 1, 4, 2)
        """
        small, larger = divmod(channels, self.groups)
        starts = [row * small + min(row, larger) for row in range(self.groups)]
        return tuple(starts[place % self.groups] + place // self.groups for place in range(channels))


@dataclass(frozen=True, slots=True)
class Norm:
    """A batch norm between two factors, for networks that are trained from scratch; it folds away in inference."""

    channels: int
    kind: Literal["norm"] = "norm"

    @property
    def params(self) -> int:
        """Scale and shift."""
        return 2 * self.channels


@dataclass(frozen=True, slots=True)
class Activation:
    """A nonlinearity between two factors, as in MobileNets; it breaks the equality with a dense convolution."""

    function: ActivationName
    kind: Literal["activation"] = "activation"


@dataclass(frozen=True, slots=True)
class Slice:
    """Channels `start` to `stop` (exclusive) of `in_channels`: the way into one tower."""

    in_channels: int
    start: int
    stop: int
    kind: Literal["slice"] = "slice"

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= self.in_channels:
            raise UsageError(f"channels {self.start} to {self.stop} are no part of {self.in_channels}")

    @property
    def out_channels(self) -> int:
        """Channels that are left."""
        return self.stop - self.start
