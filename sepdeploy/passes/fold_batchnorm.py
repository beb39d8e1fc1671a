"""Fold batch norms into the convolutions before them, exact in inference."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sepdeploy.errors import ContractError
from sepdeploy.passes.replace_convs import replace_modules
from sepdeploy.schemes.module import ChainConv2d

__all__ = ["fold_batchnorm"]


@torch.no_grad()
def fold_batchnorm(model: nn.Module, pairs: Mapping[str, str]) -> tuple[str, ...]:
    """Scale each convolution as its batch norm would, and put an identity in the norm's place; in place.

    y = gamma * (conv(x) - mean) / sqrt(var + eps) + beta is the convolution with every output channel scaled by
    gamma / sqrt(var + eps), plus a bias.

    Args:
        model: The network, in eval mode.
        pairs: Convolution name -> name of the batch norm that alone reads it (`ConvSite.norm`).

    Returns:
        Names of the norms that are gone.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    folded: dict[str, nn.Module] = {}
    for conv_name, norm_name in pairs.items():
        conv, norm = modules[conv_name], modules[norm_name]
        if not isinstance(norm, nn.BatchNorm2d):
            raise ContractError(f"{norm_name} is no BatchNorm2d")
        scale, shift = _affine_of(norm)
        if isinstance(conv, ChainConv2d):
            lasts = [term[-1] for term in conv.factor_modules()]
        elif isinstance(conv, nn.Conv2d):
            lasts = [conv]
        else:
            raise ContractError(f"{conv_name} is no convolution")
        for last in lasts:
            last.weight.mul_(scale.to(last.weight.dtype)[:, None, None, None])
        # Only the first term carries a bias: adding it to each would count it several times.
        bias = shift if lasts[0].bias is None else lasts[0].bias.double() * scale + shift
        lasts[0].bias = nn.Parameter(bias.to(lasts[0].weight.dtype))
        folded[norm_name] = nn.Identity()
    replace_modules(model, folded)
    return tuple(folded)


def _affine_of(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) in float64 that the norm applies in eval mode."""
    if norm.running_mean is None or norm.running_var is None:
        raise ContractError("a batch norm without running statistics cannot be folded")
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return scale, shift
