"""Fold batch norms into the convolutions and linear layers before them, exact in inference."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sepdeploy.analyze.batch_norms import behind_norm, norm_parts
from sepdeploy.errors import ContractError
from sepdeploy.passes.convolve_batchnorms import ConvolvedNorm
from sepdeploy.passes.replace_convs import copy_network, replace_modules
from sepdeploy.schemes.module import ChainConv2d, batchnorm_affine

__all__ = ["fold_batchnorm", "unfold_batchnorm"]


@torch.no_grad()
def fold_batchnorm(model: nn.Module, pairs: Mapping[str, str]) -> tuple[str, ...]:
    """Scale each layer as its batch norm would, and leave of the norm what it holds besides; in place.

    y = gamma * (conv(x) - mean) / sqrt(var + eps) + beta is the convolution with every output channel scaled by
    gamma / sqrt(var + eps), plus a bias.

    Args:
        model: The network, in eval mode.
        pairs: Layer name -> name of the batch norm that alone reads it (`ConvSite.norm`, `norms_behind_layers`).

    Returns:
        Names of the norms that are gone.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    folded: dict[str, nn.Module] = {}
    for conv_name, norm_name in pairs.items():
        conv, norm = modules[conv_name], modules[norm_name]
        scale, shift = batchnorm_affine(norm)
        if isinstance(conv, ChainConv2d):
            conv.scale_outputs(scale, shift)
        elif isinstance(conv, nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            bias = shift if conv.bias is None else conv.bias.double() * scale + shift
            _scale_outputs(conv, scale.to(conv.weight.dtype))
            conv.bias = nn.Parameter(bias.to(conv.weight.dtype))
        else:
            raise ContractError(f"{conv_name} is no convolution and no linear layer")
        folded[norm_name] = behind_norm(norm)
    replace_modules(model, folded)
    return tuple(folded)


def _scale_outputs(layer: nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d | nn.Linear, scale: Tensor) -> None:
    """Multiply the weights of each output channel; those of a transposed convolution without groups are (I, O, ...)."""
    rows = layer.weight.movedim(1, 0) if isinstance(layer, nn.ConvTranspose2d) else layer.weight
    rows.mul_(scale.reshape(-1, *[1] * (rows.dim() - 1)))


@torch.no_grad()
def unfold_batchnorm(network: nn.Module, folded: nn.Module, pairs: Mapping[str, str]) -> nn.Module:
    """A copy of `network`, batch norms and all, that computes what a folded version of it computes.

    The weights are those of `folded`; each norm does nothing but add the bias where its convolution has none.
    Norms that `convolve_batchnorms` wrote as convolutions get their weights.

    Args:
        network: As it was before `fold_batchnorm`, in eval mode.
        folded: What became of it, with any weights.
        pairs: As they were given to `fold_batchnorm`.
    """
    copy: nn.Module = copy_network(network).eval()
    parts = dict(folded.named_modules(remove_duplicate=False))
    own = folded.state_dict()
    for name, parameter in copy.named_parameters():
        if name in own:
            parameter.copy_(own[name].reshape(parameter.shape))  # of a norm that was written as a convolution
    modules = dict(copy.named_modules(remove_duplicate=False))
    for conv_name, norm_name in pairs.items():
        shift = None if modules[conv_name].bias is not None else parts[conv_name].bias
        _set_affine(modules[norm_name], None, shift)
    for name, part in parts.items():
        if isinstance(part, ConvolvedNorm):
            _set_affine(modules[name], *part.affine())
    return copy


def _set_affine(norm: nn.Module, scale: Tensor | None, shift: Tensor | None) -> None:
    """Let a batch norm do nothing but scale, by 1 if None, and shift, by 0.

    Without weights it has a positive factor only; those that int8 changes stay positive.
    """
    parts = norm_parts(norm)
    if parts is None:
        raise ContractError(f"{type(norm).__name__} is no batch norm with running statistics")
    scale = torch.ones_like(parts.mean) if scale is None else scale
    shift = torch.zeros_like(parts.mean) if shift is None else shift
    if parts.weight is not None:
        parts.variance.fill_(1 - parts.eps)
        parts.weight.copy_(scale)
    else:
        parts.variance.copy_(scale**-2 - parts.eps)
    if parts.bias is not None:
        parts.mean.zero_()
        parts.bias.copy_(shift)
    else:
        parts.mean.copy_(-shift / scale)
