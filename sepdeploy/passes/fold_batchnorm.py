"""Fold batch norms into the convolutions and linear layers before them, exact in inference."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sepdeploy.errors import ContractError
from sepdeploy.passes.convolve_batchnorms import ConvolvedNorm
from sepdeploy.passes.replace_convs import copy_network, replace_modules
from sepdeploy.schemes.module import ChainConv2d, batchnorm_affine

__all__ = ["fold_batchnorm", "unfold_batchnorm"]


@torch.no_grad()
def fold_batchnorm(model: nn.Module, pairs: Mapping[str, str]) -> tuple[str, ...]:
    """Scale each layer as its batch norm would, and put an identity in the norm's place; in place.

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
        if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            raise ContractError(f"{norm_name} is no batch norm")
        scale, shift = batchnorm_affine(norm)
        if isinstance(conv, ChainConv2d):
            conv.scale_outputs(scale, shift)
        elif isinstance(conv, nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            bias = shift if conv.bias is None else conv.bias.double() * scale + shift
            _scale_outputs(conv, scale.to(conv.weight.dtype))
            conv.bias = nn.Parameter(bias.to(conv.weight.dtype))
        else:
            raise ContractError(f"{conv_name} is no convolution and no linear layer")
        folded[norm_name] = nn.Identity()
    replace_modules(model, folded)
    return tuple(folded)


def _scale_outputs(layer: nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d | nn.Linear, scale: Tensor) -> None:
    """Multiply the weights of each output channel; those of a transposed convolution without groups are (I, O, ...)."""
    rows = layer.weight.movedim(1, 0) if isinstance(layer, nn.ConvTranspose2d) else layer.weight
    rows.mul_(scale.reshape(-1, *[1] * (rows.dim() - 1)))


@torch.no_grad()
def unfold_batchnorm(network: nn.Module, folded: nn.Module, pairs: Mapping[str, str]) -> nn.Module:
    """A copy of `network`, batch norms and all, that computes what a folded version of it computes.

    The weights are those of `folded`; each norm becomes an identity, but for the bias where its convolution has none.
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
        norm = modules[norm_name]
        if (
            not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
            or norm.running_mean is None
            or norm.running_var is None
        ):
            raise ContractError(f"{norm_name} is no batch norm with statistics")
        shift = torch.zeros_like(norm.running_mean)
        if modules[conv_name].bias is None:
            shift += parts[conv_name].bias
        norm.running_var.fill_(1 - norm.eps)
        norm.running_mean.zero_()
        own_weight, own_bias = (norm._parameters.get(part) for part in ("weight", "bias"))
        if own_weight is not None:
            own_weight.fill_(1)
        if own_bias is not None:
            own_bias.copy_(shift)
        else:
            norm.running_mean.copy_(-shift)
    for name, part in parts.items():
        if isinstance(part, ConvolvedNorm):
            _take_back(modules[name], part)
    return copy


def _take_back(norm: nn.Module, convolved: ConvolvedNorm) -> None:
    """Let a norm, which has got the convolution's weights where it has weights, compute what the convolution does.

    Without weights it has a positive factor only; those that int8 changes stay positive.
    """
    if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) or norm.running_mean is None or norm.running_var is None:
        raise ContractError("what was written as a convolution is no batch norm with statistics")
    norm.running_var.fill_(1 - norm.eps)
    norm.running_mean.zero_()
    if not norm.affine:
        scale, shift = convolved.affine()
        norm.running_var.copy_(scale**-2 - norm.eps)
        norm.running_mean.copy_(-shift / scale)
