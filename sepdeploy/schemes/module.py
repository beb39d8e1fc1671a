"""`ChainConv2d`: the one module that runs any sum of chains in place of an nn.Conv2d."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own convention)
from torch import Tensor, nn

from sepdeploy.core.chain import ChainSum, Factor, Shuffle
from sepdeploy.core.conv import ConvSpec
from sepdeploy.errors import UsageError
from sepdeploy.schemes.scheme import FactorWeights

__all__ = ["ChainConv2d", "compose_kernels"]


class ChainConv2d(nn.Module):
    """A convolution written as a sum of chains of grouped convolutions.

    It has the attributes of the nn.Conv2d that it replaces (`in_channels`, `kernel_size`, `stride`, ...), so that
    networks which look at them keep working; `weight` is the equivalent dense kernel, computed when read.
    The factors are plain nn.Conv2d modules, which optimizers, quantizers and exporters know. The bias sits on the last
    factor of the first term, all the others have none: between linear stages it would be redundant.

    Args:
        form: The chains.
        spec: Geometry of the convolution that it replaces.
        bias: Whether there is a bias, whatever `spec` says: transfer may need one where the original had none.
        dtype: Type of the weights.
    """

    def __init__(self, form: ChainSum, spec: ConvSpec, *, bias: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.form = form
        self.spec = spec
        self.in_channels = spec.in_channels
        self.out_channels = spec.out_channels
        self.kernel_size = spec.kernel_size
        self.stride = spec.stride
        self.padding = (spec.padding[0], spec.padding[2])
        self.dilation = spec.dilation
        self.groups = spec.groups
        self.padding_mode = spec.padding_mode
        self.terms = nn.ModuleList()
        for index, chain in enumerate(form.terms):
            last = len(chain.factors) - 1
            stages: list[nn.Module] = []
            for stage in chain.stages:
                if isinstance(stage, Shuffle):
                    stages.append(nn.ChannelShuffle(stage.groups))
                else:
                    seen = sum(isinstance(module, nn.Conv2d) for module in stages)
                    stages += _factor_modules(stage, bias=bias and index == 0 and seen == last, dtype=dtype)
            self.terms.append(nn.Sequential(*stages))

    def forward(self, input: Tensor) -> Tensor:
        """Convolve `input` (N, C, H, W) or (C, H, W); named as nn.Conv2d names it, for calls by keyword."""
        x = input
        if self.padding_mode != "zeros":
            top, bottom, left, right = self.spec.padding
            x = F.pad(x, (left, right, top, bottom), mode=self.padding_mode)
        out: Tensor = self.terms[0](x)
        for term in self.terms[1:]:
            out = out + term(x)
        return out

    def factor_modules(self) -> list[list[nn.Conv2d]]:
        """The convolution modules of each term, in order."""
        return [[stage for stage in term.children() if isinstance(stage, nn.Conv2d)] for term in self.terms]

    @property
    def bias(self) -> Tensor | None:
        """The bias (O,), None if there is none."""
        return self.factor_modules()[0][-1].bias

    @property
    def weight(self) -> Tensor:
        """The equivalent dense kernel (O, I / groups, Kh, Kw); computed anew on each access, not a parameter."""
        return compose_kernels(
            tuple(tuple(module.weight for module in term) for term in self.factor_modules()), self.form, self.groups
        )

    @torch.no_grad()
    def set_weights(self, weights: FactorWeights, bias: Tensor | None = None) -> None:
        """Copy factor weights, per term and factor, and the bias (O,) into the module."""
        for modules, values in zip(self.factor_modules(), weights, strict=True):
            for module, value in zip(modules, values, strict=True):
                module.weight.copy_(value)
        own = self.bias
        if own is not None:
            own.zero_() if bias is None else own.copy_(bias)
        elif bias is not None:
            raise UsageError("this ChainConv2d was made without a bias")

    def extra_repr(self) -> str:
        """Geometry, for print(model)."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"terms={len(self.form.terms)}"
        )


def _factor_modules(factor: Factor, *, bias: bool, dtype: torch.dtype) -> list[nn.Module]:
    """An nn.Conv2d, with an nn.ZeroPad2d before it if the padding is not symmetric."""
    top, bottom, left, right = factor.padding
    is_symmetric = top == bottom and left == right
    conv = nn.Conv2d(
        factor.in_channels,
        factor.out_channels,
        factor.kernel_size,
        stride=factor.stride,
        padding=(top, left) if is_symmetric else 0,
        dilation=factor.dilation,
        groups=factor.groups,
        bias=bias,
        dtype=dtype,
    )
    return [conv] if is_symmetric else [nn.ZeroPad2d((left, right, top, bottom)), conv]


def compose_kernels(weights: FactorWeights, form: ChainSum, groups: int) -> Tensor:
    """The dense kernel that a sum of chains without shuffles computes.

    Two correlations in a row are the correlation with the full convolution of their kernels.

    Args:
        weights: Per term and factor.
        form: The chains that the weights belong to.
        groups: Groups of the dense kernel; every chain must respect them.

    Returns:
        (O, I / groups, Kh, Kw).

    Raises:
        UsageError: if there is a shuffle or no term.
    """
    if any(isinstance(stage, Shuffle) for chain in form.terms for stage in chain.stages):
        raise UsageError("the dense kernel of a chain with shuffles is not available")
    total: Tensor | None = None
    for term, chain in zip(weights, form.terms, strict=True):
        factors = chain.factors
        kernel = _ungrouped(term[0], factors[0].groups)
        for weight, factor in zip(term[1:], factors[1:], strict=True):
            second = _ungrouped(weight, factor.groups)
            height, width = second.shape[-2:]
            # (I, mid, kh, kw) images convolved with the flipped second kernel give (I, O, kh', kw').
            images = kernel.transpose(0, 1)
            kernel = F.conv2d(images, second.flip(2, 3), padding=(height - 1, width - 1)).transpose(0, 1)
        total = kernel if total is None else total + kernel
    if total is None:
        raise UsageError("a sum of no chains has no kernel")
    out_channels, in_channels = total.shape[:2]
    blocks = total.reshape(groups, out_channels // groups, groups, in_channels // groups, *total.shape[2:])
    index = torch.arange(groups)
    return blocks[index, :, index].reshape(out_channels, in_channels // groups, *total.shape[2:])


def _ungrouped(weight: Tensor, groups: int) -> Tensor:
    """A grouped kernel (O, I / groups, Kh, Kw) as the block-diagonal dense one (O, I, Kh, Kw)."""
    if groups == 1:
        return weight
    out_channels, in_per_group = weight.shape[:2]
    dense = weight.new_zeros(groups, out_channels // groups, groups, in_per_group, *weight.shape[2:])
    index = torch.arange(groups)
    dense[index, :, index] = weight.reshape(groups, out_channels // groups, in_per_group, *weight.shape[2:])
    return dense.reshape(out_channels, groups * in_per_group, *weight.shape[2:])
