"""Fold batch norms into the convolutions before them, exact in inference."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from sepdeploy.errors import ContractError
from sepdeploy.passes.replace_convs import replace_modules
from sepdeploy.schemes.module import ChainConv2d, batchnorm_affine

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
        scale, shift = batchnorm_affine(norm)
        if isinstance(conv, ChainConv2d):
            conv.scale_outputs(scale, shift)
        elif isinstance(conv, nn.Conv2d):
            bias = shift if conv.bias is None else conv.bias.double() * scale + shift
            conv.weight.mul_(scale.to(conv.weight.dtype)[:, None, None, None])
            conv.bias = nn.Parameter(bias.to(conv.weight.dtype))
        else:
            raise ContractError(f"{conv_name} is no convolution")
        folded[norm_name] = nn.Identity()
    replace_modules(model, folded)
    return tuple(folded)
