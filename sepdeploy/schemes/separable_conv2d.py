"""`SeparableConv2d`: a separable convolution for networks of one's own, with the arguments of nn.Conv2d."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, get_args

import torch
from torch import nn

from sepdeploy.core.chain import Chain, ChainSum
from sepdeploy.core.conv import ConvSpec, PaddingMode
from sepdeploy.core.describe import describe_field, describe_form
from sepdeploy.core.design import ACTIVATIONS, FROM_SCRATCH, ActivationName, Middle, with_middle
from sepdeploy.errors import UsageError
from sepdeploy.schemes.fresh_weights import draw_weights
from sepdeploy.schemes.module import ChainConv2d
from sepdeploy.schemes.read_options import read_options
from sepdeploy.schemes.scheme import find_scheme

__all__ = ["SeparableConv2d"]

_CONV2D_VARIANCE = 1 / 3
"""What nn.Conv2d makes of inputs of variance 1: weights uniform within 1 / sqrt(fan-in)."""


class SeparableConv2d(ChainConv2d):
    """A convolution that is separable by design and takes the place of an nn.Conv2d.

    All arguments up to `dtype` are those of nn.Conv2d. The padding stands before the first convolution with taps along
    each axis, the stride in the last one. Printing it says what it consists of, what it costs and what its outputs see.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Of the convolution as a whole, K or (Kh, Kw).
        stride: S or (Sh, Sw).
        padding: Pixels, or 'same' or 'valid'.
        dilation: D or (Dh, Dw).
        groups: Groups of the convolution as a whole, for schemes that keep them.
        bias: Whether to add a bias, in the last convolution.
        padding_mode: 'zeros', 'reflect', 'replicate' or 'circular'.
        device: Of the weights.
        dtype: Of the weights.
        scheme: Name of the scheme, as `sepdeploy schemes` lists them.
        middle: 'norm' puts a batch norm after each convolution but the last, 'norm_activation' an activation as well.
        activation: Which one.
        chain_groups: Groups of each convolution in the chain, None where they are to be found; empty finds all.
        options: Other hyper-parameters of the scheme by name, such as `factors=3` or `terms=2`; see `SchemeOptions`.
            Where none is given, depthwise separable means one pair, not two.

    Raises:
        UsageError: if the scheme has no form for this geometry, or does not read one of the options.

    >>> SeparableConv2d(16, 16, 3, padding=1, scheme="depthwise_separable").eval()(torch.zeros(1, 16, 8, 8)).shape
    torch.Size([1, 16, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        scheme: str = "optimized_separable",
        middle: Middle = "linear",
        activation: ActivationName = "relu",
        chain_groups: tuple[int | None, ...] = (),
        **options: Any,
    ) -> None:
        sizes = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        if isinstance(sizes, tuple | list) and (len(sizes) != 2 or min(sizes) < 1):
            raise UsageError(f"kernel_size must be K or (Kh, Kw), at least 1, got {kernel_size}")
        try:
            dense = nn.Conv2d(
                in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, "meta"
            )
        except (ValueError, TypeError, RuntimeError) as error:
            raise UsageError(f"nn.Conv2d does not take these arguments: {error}") from error
        if middle not in get_args(Middle):
            raise UsageError(f"there is no middle '{middle}'; choose one of {', '.join(get_args(Middle))}")
        if activation not in ACTIVATIONS:
            raise UsageError(f"there is no activation '{activation}'; choose one of {', '.join(ACTIVATIONS)}")
        spec = _spec_of(dense)
        found = find_scheme(scheme)
        if chain_groups:
            options["groups"] = chain_groups  # not a name of its own: nn.Conv2d has one for the whole
        chosen = read_options([scheme], options, FROM_SCRATCH)
        refusal = found.check(spec)
        if refusal is not None:
            raise UsageError(f"{scheme} cannot take the place of {dense}: {refusal.value}; keep nn.Conv2d there")
        form = with_middle(found.design(spec, chosen), middle, activation)
        with nullcontext() if device is None else torch.device(device):
            super().__init__(form, spec, bias=bias, dtype=dtype or torch.get_default_dtype())
        self.scheme = scheme
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, with the output variance that nn.Conv2d starts with."""
        fan_in = self.in_channels // self.groups * self.kernel_size[0] * self.kernel_size[1]
        bias = None
        if self.bias is not None:
            bias = torch.empty_like(self.bias).uniform_(-(fan_in**-0.5), fan_in**-0.5)
        draw_weights(self, _CONV2D_VARIANCE, bias)

    def extra_repr(self) -> str:
        """Scheme and convolutions, cost against the dense convolution, and what the outputs see."""
        dense = self.spec.as_factor()
        macs, dense_macs = _macs_per_pixel(self.form), _macs_per_pixel(ChainSum((Chain((dense,)),)))
        params = self.form.params
        return (
            f"{self.scheme}: {self.in_channels} > {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}: {describe_form(self.form)}\n"
            f"{params:,} parameters, {params / self.spec.params:.2f} of dense; {macs:,.0f} MACs per output pixel, "
            f"{macs / dense_macs:.2f} of dense\n"
            f"{describe_field(self.form, dense)}"
        )


def _spec_of(conv: nn.Conv2d) -> ConvSpec:
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    height, width = conv.kernel_size
    return ConvSpec(
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        kernel_size=(height, width),
        stride=(conv.stride[0], conv.stride[1]),
        padding=(top, bottom, left, right),
        dilation=(conv.dilation[0], conv.dilation[1]),
        groups=conv.groups,
        has_bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
    )


def _macs_per_pixel(form: ChainSum) -> float:
    """Multiply-accumulates per output pixel of a large image; what runs before a stride counts several times."""
    total = 0.0
    for term in form.terms:
        area = 1
        for factor in reversed(term.factors):
            total += area * factor.weights
            area *= factor.stride[0] * factor.stride[1]
    return total
