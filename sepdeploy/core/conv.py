"""What tracing finds: every convolution of a network, where it is called, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sepdeploy.core.chain import Factor, Padding, Size
from sepdeploy.core.plan import Reason

__all__ = ["ConvCall", "ConvSite", "ConvSpec", "PaddingMode", "Trace"]

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


@dataclass(frozen=True, slots=True)
class ConvSpec:
    """The geometry of a 2-D convolution, as PyTorch's `nn.Conv2d` has it.

    Attributes:
        in_channels: Input channels I.
        out_channels: Output channels O.
        kernel_size: (Kh, Kw).
        stride: (Sh, Sw).
        padding: Pixels added at (top, bottom, left, right); 'same' is resolved to these.
        dilation: (Dh, Dw).
        groups: Groups of channels; the kernel is (O, I / groups, Kh, Kw).
        has_bias: Whether a bias is added.
        padding_mode: What the padding is filled with.
    """

    in_channels: int
    out_channels: int
    kernel_size: Size
    stride: Size = (1, 1)
    padding: Padding = (0, 0, 0, 0)
    dilation: Size = (1, 1)
    groups: int = 1
    has_bias: bool = False
    padding_mode: PaddingMode = "zeros"

    @property
    def is_pointwise(self) -> bool:
        """Whether the kernel is 1x1."""
        return self.kernel_size == (1, 1)

    @property
    def is_depthwise(self) -> bool:
        """Whether every group has a single input channel."""
        return self.groups == self.in_channels and self.groups > 1

    @property
    def zero_padding(self) -> Padding:
        """Zeros that the convolution itself adds; other padding modes are applied before it."""
        return self.padding if self.padding_mode == "zeros" else (0, 0, 0, 0)

    @property
    def params(self) -> int:
        """Weights and biases."""
        return self.as_factor().params + (self.out_channels if self.has_bias else 0)

    def as_factor(self) -> Factor:
        """The same convolution as a factor of a chain (without its bias and its padding mode)."""
        return Factor(
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.zero_padding,
            dilation=self.dilation,
            groups=self.groups,
        )


@dataclass(frozen=True, slots=True)
class ConvCall:
    """One execution of a convolution in one forward pass.

    Attributes:
        input_shape: (N, C, H, W) of the input; other ranks for 1-D and 3-D convolutions.
        output_shape: The same of the output.
        macs: Multiply-accumulates of this call for one image.
    """

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    macs: int


@dataclass(frozen=True, slots=True)
class ConvSite:
    """One convolution of the network with all its call sites.

    Attributes:
        name: Qualified module name, or for a functional call the enclosing module's name and a number.
        module_type: Class name of the module, or the operator of a functional call.
        spec: Its geometry; None where it is no plain 2-D convolution.
        calls: Its executions in order; empty if the forward pass never runs it.
        params: Weights and biases.
        aliases: Other qualified names under which the same module object is registered.
        norm: Name of the batch norm that is the only reader of every output, None if there is none. It may hold what
            follows it, such as an activation.
        reason: Why it cannot be replaced whatever the scheme; None if schemes may try.
    """

    name: str
    module_type: str
    spec: ConvSpec | None
    calls: tuple[ConvCall, ...]
    params: int
    aliases: tuple[str, ...] = ()
    norm: str | None = None
    reason: Reason | None = None

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all calls for one image."""
        return sum(call.macs for call in self.calls)


@dataclass(frozen=True, slots=True)
class Trace:
    """A network as one forward pass on one image shows it.

    Attributes:
        sites: Every convolution in the order of its first call; those never called come last.
        input_shape: (1, C, H, W), or (1, H, W, C) for a network that takes NHWC.
        output_shapes: Shape of each tensor that the network returns, in pytree order.
        total_macs: Multiply-accumulates of the whole network for one image: convolutions and matrix products.
        total_params: All parameters of the network.
    """

    sites: tuple[ConvSite, ...]
    input_shape: tuple[int, ...]
    output_shapes: tuple[tuple[int, ...], ...]
    total_macs: int
    total_params: int

    def site(self, name: str) -> ConvSite:
        """The convolution called `name`; KeyError if there is none."""
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(name)
